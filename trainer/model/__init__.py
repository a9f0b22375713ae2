"""The trunk, a micro-batch as a coroutine, and the clients that have its requests answered by the pool."""
