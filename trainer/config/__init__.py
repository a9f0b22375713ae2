"""Recipes: their keys, defaults, constraints, and the files that come with the trainer."""
