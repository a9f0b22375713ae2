"""Checkpoints.

format   the files of a checkpoint: what they are called, what they say, and whether they are intact
save     writing a checkpoint while training continues
resume   which checkpoint a run resumes from, and loading it
reshard  loading a checkpoint of another layout
"""
