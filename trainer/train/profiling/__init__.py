"""Recordings of optimizer steps by torch's profiler."""
