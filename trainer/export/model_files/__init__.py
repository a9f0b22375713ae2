"""The model for transformers, in files that need nothing of this project: every export has a copy of them."""
