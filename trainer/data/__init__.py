"""The way from documents to token sequences.

sources    documents of a file, folder, glob, the hub, or Python's own library
tokenizer  a byte-level BPE: loaded or trained
packing    one split's documents, packed into rows of an Arrow file
prepare    all of it once, atomically, into a folder that later runs find again
batches    a step's sequences: shuffled by seed, sliced over trunk ranks
"""
