import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import packing
from trainer.data.packing import SplitWriter

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), max_size=20)


def pack(documents, seq_len, vocab, restart=None):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "split.arrow"
        writer = SplitWriter(path, seq_len, vocab)
        for i, ids in enumerate(documents):
            if i == restart:
                saved = writer.state_dict()
                writer.add(np.array([1, 2, 3]), text_bytes=7)  # what was written after it is lost
                writer.state_dict()
                writer.abandon()
                writer = SplitWriter(path, seq_len, vocab, saved)
            writer.add(np.array(ids), text_bytes=3)
        facts = writer.close()
        return Dataset.from_file(str(Path(folder) / "split.arrow"), in_memory=True), facts


@given(documents=DOCUMENTS, seq_len=st.integers(1, 12), rows_per_write=st.integers(1, 5), restart=st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_rows_are_the_concatenation_and_predict_each_token_once(documents, seq_len, rows_per_write, restart):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "ROWS_PER_WRITE", rows_per_write)
        dataset, facts = pack(documents, seq_len, 10, restart)
    stream = [token for ids in documents for token in ids]
    rows = dataset["tokens"][:]
    assert all(len(row) == seq_len + 1 for row in rows)
    targets = [token for row in rows for token in row[1:]]
    inputs = [token for row in rows for token in row[:-1]]
    assert targets == stream[1 : len(targets) + 1]
    assert inputs == stream[: len(inputs)]
    assert 0 <= len(stream) - 1 - len(targets) < seq_len or not stream  # at most one row is lost

    p = [n / len(stream) for n in Counter(stream).values()]
    assert facts.documents == len(documents) and facts.bytes == 3 * len(documents)
    assert facts.tokens == len(stream) and facts.sequences == len(rows)
    assert facts.unigram_entropy == pytest.approx(-sum(x * math.log(x) for x in p))


@pytest.mark.parametrize("vocab, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_ids_at_the_edge_of_their_type(vocab, dtype):
    dataset, _ = pack([[0, vocab - 1, 5]], 2, vocab)
    assert dataset.features["tokens"].feature.dtype == dtype
    assert dataset["tokens"][:] == [[0, vocab - 1, 5]]
