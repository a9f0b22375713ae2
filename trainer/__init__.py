"""Trains UniPool language models: the command line, the recipes, the trunk and the two roles' loops."""

__version__ = "0.1.0"
