import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.fuzzing import fuzz
from trainer.data.reading.documents import Piece
from trainer.data.splitting import SPLITS, Splitter, choose_splitter, split_of


def test_split_has_the_proportions_asked_for():
    n = 100_000
    for parts in ((969, 30, 1), (1, 1, 0), (2, 0, 5)):
        counts = Counter(split_of(i, parts) for i in range(n))
        for split, part in zip(SPLITS, parts, strict=True):
            p = part / sum(parts)
            assert abs(counts[split] - n * p) <= 4 * math.sqrt(n * p * (1 - p))  # four standard deviations


def test_split_does_not_change_between_versions():
    assert [i for i in range(150) if split_of(i, (969, 30, 1)) != "train"] == [56, 84, 106, 113, 120]


def documents(texts) -> list[Piece]:
    """Each in pieces of at most 7 characters."""
    pieces = []
    for text in texts:
        parts = [text[i : i + 7] for i in range(0, len(text), 7)]
        pieces += [Piece(part, i == len(parts) - 1) for i, part in enumerate(parts)]
    return pieces


def test_whole_documents_go_to_one_split_by_their_index():
    pieces = documents(["abc" * 5, "d", "e" * 9] * 40)
    splitter = Splitter((2, 1, 1), None)
    index, seen = 0, Counter()
    for piece in pieces:
        (passage,) = splitter.assign(piece)
        assert passage == type(passage)(split_of(index, (2, 1, 1)), piece.text, piece.ends_document)
        index += piece.ends_document
        seen[passage.split] += piece.ends_document
    assert splitter.documents == 120 and seen.total() == 120 and len(seen) == 3


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
PARTS = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))


@fuzz(100)
@given(texts=st.lists(TEXT, min_size=1, max_size=8), parts=PARTS, stop=st.integers(0, 30))
def test_few_documents_are_split_by_size(texts, parts, stop):
    """The beginning of the text, the middle, the end: nothing lost, of the sizes asked for to within a character."""
    pieces = documents(texts)
    splitter = choose_splitter(iter(pieces), parts)
    size = sum(len(text.encode()) for text in texts)
    assert splitter.size == size
    passages = []
    for i, piece in enumerate(pieces):
        if i == stop:  # and goes on elsewhere
            splitter = Splitter(**splitter.state_dict())
        passages += splitter.assign(piece)
    assert "".join(p.text for p in passages) == "".join(texts)
    assert sorted((p.split for p in passages), key=SPLITS.index) == [p.split for p in passages]
    begun = 0
    for split in SPLITS:
        own = [p for p in passages if p.split == split]
        begun += sum(len(p.text.encode()) for p in own)
        limit = size * sum(parts[: SPLITS.index(split) + 1]) / sum(parts)
        assert limit - 1 < begun < limit + 4
        assert not own or own[-1].ends_document  # what was cut ends, and so never runs on into other text
    assert sum(p.ends_document for p in passages) <= len(texts) + 2


def test_documents_are_dealt_out_where_each_split_can_expect_ten():
    pieces = [Piece("a", True)] * 334
    assert choose_splitter(pieces[:333], (969, 30, 1)).size == 333
    assert choose_splitter(pieces, (969, 30, 1)).size is None
    assert choose_splitter(pieces[:20], (1, 1, 0)).size is None
    assert choose_splitter([], (1, 0, 0)).size is None  # nothing to divide
    endless = iter(lambda: Piece("a", True), None)
    assert choose_splitter(endless, (10**9, 1, 0)).size is None


@pytest.mark.parametrize("parts", [(0, 1, 0), (5, 0, 1)])
def test_one_split_alone_gets_whole_documents(parts):
    splitter = choose_splitter([Piece("abc", True)], parts)
    assert splitter.size is None
