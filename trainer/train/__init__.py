"""Training: the loop, the trunk rank, the pool rank, what they report."""
