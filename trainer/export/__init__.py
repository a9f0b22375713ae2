"""A trained run as files that others read, and as text.

modeling_unipool  the model for Hugging Face transformers: one file, copied into every export
source            a run's newest checkpoint: its recipe, its weights under the names of the export, its tokenizer
write             the files of an export, all of them or none
generate          text from a run or an export
commands          the command line's part
"""
