"""Prometheus metrics, the console, the run's folder."""
