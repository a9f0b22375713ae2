"""Training text that is read, tokenised and packed while a run trains on it (`data.stream_window`).

streamed_data   the data of a run
parts           a source in parts, each made when it is first needed
stream          the sequences of a step, from these parts
"""
