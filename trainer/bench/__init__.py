"""Measures what a machine does with a recipe's shapes."""
