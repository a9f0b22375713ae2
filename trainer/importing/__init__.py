"""Models from elsewhere: checkpoints of Hugging Face models as exports to train on from, and upcycling into a pool.

families          which Hugging Face models the backbone can be: their settings, and the names of their tensors
source            a model to import or to upcycle: a Hugging Face checkpoint, a run, or an export
upcycle           a dense model, or one whose layers have their own experts, as a model with one pool
merge             a pool with fewer experts, by the redundancy probe
write             writes the export, and a recipe that trains on from it
commands          `import` and `upcycle` on the command line
"""
