"""Trains UniPool language models: the command line, the recipes, the trunk and the two roles' loops."""
