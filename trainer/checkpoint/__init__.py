"""Checkpoints: format, saving, resuming, resharding."""
