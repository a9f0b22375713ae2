"""From documents to the sequences of a step.

commands        the command `prepare`
prepare         the data of a recipe: all sources, each prepared once, with one tokenizer
settings        what determines the prepared data of a source, and their fingerprint
cache           folders that are made once and found again, with locks
source_builder  one source into its folder, from the beginning or from where it was interrupted
reading/        files, or data sets on the hub, into documents
tokenizer       loaded or trained, and which token ends a document
encoding        texts into token ids, many at once
splitting       which text is trained on and which is held out
packing         one split's tokens, packed into rows of an Arrow file
prepared_data   the prepared folders as a run reads them
streaming/      text that is read while the run trains
batches         a step's sequences: mixed by weight, shuffled by seed, divided among trunk ranks
"""
