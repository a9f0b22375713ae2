import numpy as np
import pytest
import torch

from trainer.data.batches import SequenceStream, evaluation_steps, mixed, permutation
from trainer.data.packing import SplitRows, SplitWriter

ROWS, SEQ_LEN = 23, 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> SplitRows:
    """Row r holds the tokens 4r ... 4r+4."""
    return counting(tmp_path_factory.mktemp("batches") / "split.arrow", ROWS, 0)


def counting(path, rows: int, first: int) -> SplitRows:
    writer = SplitWriter(path, SEQ_LEN, vocab=1000)
    writer.add(np.arange(first, first + rows * SEQ_LEN + 1), text_bytes=0)
    writer.close()
    return SplitRows(path, 1000)


def rows_of(batches) -> list[int]:
    """The row numbers of a step's micro-batches; checks that each row is whole."""
    tokens = torch.cat(list(batches))
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(SEQ_LEN + 1))
    return (tokens[:, 0] // SEQ_LEN).tolist()


@pytest.mark.parametrize("rows", [1, 2, 23, 1000])
def test_permutation(rows):
    orders = [permutation(rows, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(np.array_equal(np.sort(order), np.arange(rows)) for order in orders)
    if rows > 2:
        assert len({tuple(order) for order in orders}) == 4


def test_permutation_does_not_change_between_versions():
    assert permutation(8, seed=1, epoch=2).tolist() == [6, 0, 7, 5, 1, 4, 3, 2]


def test_each_epoch_has_every_row_once_in_another_order(dataset):
    stream = SequenceStream([dataset], seed=5)
    seen = [row for step in range(ROWS * 3) for row in rows_of(stream.micro_batches(step, 4, 0, 1, 2))]
    epochs = [seen[i : i + ROWS] for i in range(0, len(seen), ROWS)]
    assert len(epochs) == 12 and all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != list(range(ROWS))
    assert seen == [row for epoch in range(12) for row in permutation(ROWS, 5, epoch)]


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("global_batch", [12, 36])  # below and above the rows there are
def test_a_step_is_the_same_sequences_whatever_the_layout(dataset, global_batch, seed):
    stream = SequenceStream([dataset], seed)
    for step in range(5):  # over the end of epochs
        expected = list(stream.micro_batches(step, global_batch, 0, 1, global_batch))
        for trunk_ranks in (1, 2, 3, 4):
            share = global_batch // trunk_ranks
            for micro_batch in (m for m in (1, 2, 3) if share % m == 0):
                ranks = [
                    list(stream.micro_batches(step, global_batch, rank, trunk_ranks, micro_batch))
                    for rank in range(trunk_ranks)
                ]
                assert {len(batches) for batches in ranks} == {share // micro_batch}
                assert all(batch.shape == (micro_batch, SEQ_LEN + 1) for batches in ranks for batch in batches)
                assert torch.equal(torch.cat([batch for batches in ranks for batch in batches]), expected[0])


def test_position_is_the_step_number(dataset):
    stream = SequenceStream([dataset], seed=5)
    steps = [rows_of(stream.micro_batches(step, 6, 0, 1, 3)) for step in range(9)]
    resumed = SequenceStream([dataset], seed=5)
    assert rows_of(resumed.micro_batches(8, 6, 0, 1, 3)) == steps[8]
    assert rows_of(resumed.micro_batches(2, 6, 0, 1, 3)) == steps[2]
    assert rows_of(SequenceStream([dataset], seed=6).micro_batches(8, 6, 0, 1, 3)) != steps[8]


def test_tokens_are_int64(dataset):
    (batch,) = SequenceStream([dataset], seed=0).micro_batches(0, 2, 0, 1, 2)
    assert batch.dtype == torch.int64


def test_evaluation_is_in_stored_order_and_wraps_only_a_split_smaller_than_a_batch(dataset):
    stream = SequenceStream([dataset], seed=None)
    assert evaluation_steps(ROWS, wanted=10, global_batch=4) == 5
    assert evaluation_steps(ROWS, wanted=2, global_batch=4) == 2
    seen = [row for step in range(5) for row in rows_of(stream.micro_batches(step, 4, 0, 1, 4))]
    assert seen == list(range(20))
    assert evaluation_steps(ROWS, wanted=10, global_batch=30) == 1
    assert rows_of(stream.micro_batches(0, 30, 0, 1, 30)) == [*range(23), *range(7)]


def one_by_one(shares: list[float], count: int) -> list[tuple[int, int]]:
    """The mixture by its definition: always the element that is due first."""
    numbers, found = [0] * len(shares), []
    for _ in range(count):
        due = [(k + 0.5) / share for k, share in zip(numbers, shares, strict=True)]
        source = due.index(min(due))
        found.append((source, numbers[source]))
        numbers[source] += 1
    return found


@pytest.mark.parametrize("weights", [[1], [1, 1], [2, 1], [1, 1, 1], [0.7, 0.2, 0.1], [1e-3, 1, 3.3], [5, 5, 5, 1]])
def test_a_mixture_is_the_same_from_any_place_on(weights):
    shares = [weight / sum(weights) for weight in weights]
    expected = one_by_one(shares, 3000)
    for first, count in ((0, 3000), (0, 1), (1, 1), (7, 13), (1000, 500), (2987, 13)):
        sources, numbers = mixed(first, count, np.array(shares))
        assert list(zip(sources.tolist(), numbers.tolist(), strict=True)) == expected[first : first + count]
    for source, share in enumerate(shares):
        assert abs(sum(s == source for s, _ in expected[500:1500]) - 1000 * share) <= 1


def test_a_mixture_late_in_a_long_run():
    shares = np.array([0.9, 0.1 - 1e-7, 1e-7])
    sources, numbers = mixed(10**9, 1000, shares)
    again, _ = mixed(10**9 + 500, 500, shares)
    assert (sources[500:] == again).all() and abs((sources == 0).sum() - 900) <= 1
    assert abs(int(numbers[sources == 0][0]) - 9 * 10**8) <= 2


def test_a_stream_of_two_data_sets(dataset, tmp_path):
    """Each in its own order, epoch after epoch, whatever the layout; two thirds of the sequences are of the first."""
    other = counting(tmp_path / "other.arrow", 5, 200)
    stream = SequenceStream([dataset, other], 5, [2 / 3, 1 / 3])
    assert stream.rows == 15  # then the second has been read once
    whole = torch.cat([batch for step in range(10) for batch in stream.micro_batches(step, 12, 0, 1, 12)])
    by_ranks = [
        batch for step in range(10) for rank in range(3) for batch in stream.micro_batches(step, 12, rank, 3, 2)
    ]
    assert torch.equal(torch.cat(by_ranks), whole)
    first = whole[:, 0].tolist()
    of_other = [(token - 200) // SEQ_LEN for token in first if token >= 200]
    of_first = [token // SEQ_LEN for token in first if token < 200]
    assert len(of_first) == 80 and len(of_other) == 40
    assert of_first == [row for epoch in range(4) for row in permutation(ROWS, 5, epoch)][:80]
    assert of_other == [row for epoch in range(8) for row in permutation(5, 5, epoch, 1)]
    (places,) = stream.places(9, 12, 0, 1, 12)
    assert {stream.name(place) for place in places} >= {f"1:{of_other[-1]}", f"0:{of_first[-1]}"}
    (held_out,) = SequenceStream([dataset, other], None, [0.5, 0.5]).micro_batches(0, 4, 0, 1, 4)
    assert held_out[:, 0].tolist() == [0, 200, SEQ_LEN, 200 + SEQ_LEN]
