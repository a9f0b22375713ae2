"""A trained run as files that others read, and as text.

modeling_unipool, experts_unipool, configuration_unipool
                  the model for Hugging Face transformers: copied into every export
source            a run's newest checkpoint: its recipe, its weights under the names of the export, its tokenizer
write             the files of an export, all of them or none
folder            an export's folder, read by our own commands
generate          text from a run or an export
commands          the command line's part
"""
