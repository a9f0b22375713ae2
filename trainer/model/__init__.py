"""The trunk, a micro-batch as a coroutine, and what answers its requests to the pool."""
