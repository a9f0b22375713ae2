"""How good a trained model is: its loss on held-out text or on a file, and its scores on tasks.

One process on one device, whatever the layout of the run: the model is the export's.

loss      loss, perplexity and bits per byte of the validation split or of a text
tasks     scores by lm-evaluation-harness
scores    what those are
options   what a command that has tasks takes
record    eval.json in the folder that was evaluated
commands  the command line's part
"""
