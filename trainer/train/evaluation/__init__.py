"""What a run does with its current weights beside training."""
