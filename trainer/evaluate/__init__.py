"""Evaluation of a trained model: its loss on held-out text or on a file, and its scores on tasks.

It runs in one process on one device, whatever the layout of the run, with the model of the export.

loss      loss, perplexity and bits per byte of the validation split or of a text
tasks     scores of lm-evaluation-harness
scores    what these scores are, and their table
options   the options of commands that score tasks
commands  `eval` on the command line, and eval.json
"""
