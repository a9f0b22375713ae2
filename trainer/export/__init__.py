"""Exports of a trained run: files for Hugging Face transformers, generated text, and weights to start a run from.

model_files/      the model for transformers; every export has a copy of these files
hub/              the model card, and uploads
names             what a recipe's model is called in an export: names and shapes of tensors, fields of the configuration
saved_run         a run's newest checkpoint: its recipe, its weights by their exported names, its tokenizer
write             writes an export
folder            reads an export
loaded_model      a model from a run or an export, ready for evaluation
generate          generates text
initial           initialises a run with the weights of an export (`train.init_from`)
commands          `export` and `generate` on the command line
"""
