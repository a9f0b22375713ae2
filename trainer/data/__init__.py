"""From documents to the sequences of a step.

reading/     files, or the hub, to documents
tokenizer    loaded or trained, and which token ends a document
encoding     texts to token ids, many at once
splitting    which text is trained on and which is held out
packing      one split's tokens, packed into rows of an Arrow file
settings     what decides the prepared data of a source
preparation  one source into a folder, from the beginning or from where it was interrupted
prepare      all sources once, atomically, into folders that later runs find again
prepared     these folders, as a run reads them
batches      a step's sequences: mixed by weight, shuffled by seed, sliced over trunk ranks
"""
