"""Other models to train on from: checkpoints of Hugging Face models, upcycling into a pool, and pools of another size.

families          which Hugging Face models the backbone can be: their settings, and the names of their tensors
source            a model to import, to upcycle or to resize: a Hugging Face checkpoint, a run, or an export
upcycle           a dense model, or one whose layers have their own experts, as a model with one pool
resize            a model with more experts, by splitting the busiest, or with fewer, without those that add least
merge             a pool with fewer experts, by the redundancy probe
write             writes the export, and a recipe that trains on from it
commands          `import`, `upcycle` and `resize` on the command line
"""
