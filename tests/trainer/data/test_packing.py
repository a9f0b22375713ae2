import gc
import math
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.fuzzing import fuzz
from trainer.common.errors import UserError
from trainer.data import packing
from trainer.data.packing import SplitRows, SplitWriter

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
        dataset, rows = Dataset.from_file(str(path), in_memory=True), SplitRows(path, vocab)
        if len(rows):
            assert rows[range(len(rows))].tolist() == dataset["tokens"][:]
        assert len(rows) == len(dataset)
        return dataset, facts


@given(documents=DOCUMENTS, seq_len=st.integers(1, 12), rows_per_write=st.integers(1, 5), restart=st.integers(0, 20))
@fuzz(50)
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


def test_rows_stay_on_disk(tmp_path):
    writer = SplitWriter(tmp_path / "split.arrow", 4, 1000)
    for first in range(0, 30_000, 10_000):
        writer.add(np.arange(first, first + 10_000) % 1000, text_bytes=0)
    writer.close()
    gc.collect()  # of what other tests have left
    before = pa.total_allocated_bytes()
    rows = SplitRows(tmp_path / "split.arrow", 1000)
    assert len(rows) == (30_000 - 1) // 4 and pa.total_allocated_bytes() == before
    chosen = [7498, 0, 5000, 2500]
    assert rows[chosen].tolist() == [[(4 * row + i) % 1000 for i in range(5)] for row in chosen]


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    writer = SplitWriter(tmp_path / "split.arrow", 2, 9)
    writer.add(np.arange(9), text_bytes=9)
    writer.close()
    rows = SplitRows(tmp_path / "split.arrow", 8)
    assert rows[[0]].tolist() == [[0, 1, 2]]
    with pytest.raises(UserError, match=r"split.arrow: is damaged \(token 8 in a vocabulary of 8\); delete "):
        rows[[0, 3]]


@pytest.mark.parametrize("type_", [pa.string(), pa.null(), pa.timestamp("s"), pa.list_(pa.string(), 1)], ids=str)
def test_a_file_with_another_header_is_no_file_of_rows(type_, tmp_path):
    """As a flipped bit makes it: pyarrow and numpy raise errors of several kinds, all of them become one."""
    batch = pa.record_batch([pa.nulls(2, type_)], names=["tokens"])
    with pa.OSFile(str(tmp_path / "split.arrow"), "wb") as file, pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)
    with pytest.raises(ValueError, match="not rows of tokens"):
        SplitRows(tmp_path / "split.arrow", 9)


def test_a_flipped_bit_of_the_schema_is_an_error_of_the_file(tmp_path):
    """If it is found at all; pyarrow does not implement some of what the schema then describes."""
    path = tmp_path / "split.arrow"
    writer = SplitWriter(path, 4, 300)
    writer.add(np.arange(200), 9)
    writer.close()
    content = path.read_bytes()
    for place in range(8 + int.from_bytes(content[4:8], "little")):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with suppress(OSError, ValueError, LookupError):
            SplitRows(path, 300)
