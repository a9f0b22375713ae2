import math
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import packing
from trainer.data.packing import SPLITS, SplitWriter, split_of

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), max_size=20)


def pack(documents, seq_len, vocab):
    with tempfile.TemporaryDirectory() as folder:
        writer = SplitWriter(Path(folder) / "split.arrow", seq_len, vocab)
        for ids in documents:
            writer.add(ids, text_bytes=3)
        facts = writer.close()
        return Dataset.from_file(str(Path(folder) / "split.arrow"), in_memory=True), facts


@given(documents=DOCUMENTS, seq_len=st.integers(1, 12), rows_per_write=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_rows_are_the_concatenation_and_predict_each_token_once(documents, seq_len, rows_per_write):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "ROWS_PER_WRITE", rows_per_write)
        dataset, facts = pack(documents, seq_len, vocab=10)
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


def test_split_has_the_proportions_asked_for():
    n = 100_000
    for parts in ((969, 30, 1), (1, 1, 0), (2, 0, 5)):
        counts = Counter(split_of(i, parts) for i in range(n))
        for split, part in zip(SPLITS, parts, strict=True):
            p = part / sum(parts)
            assert abs(counts[split] - n * p) <= 4 * math.sqrt(n * p * (1 - p))  # four standard deviations


def test_split_does_not_change_between_versions():
    assert [i for i in range(150) if split_of(i, (969, 30, 1)) != "train"] == [56, 84, 106, 113, 120]
