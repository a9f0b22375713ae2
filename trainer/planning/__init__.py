"""Costs, schedules and predictions of a recipe."""
