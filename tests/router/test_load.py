"""Load statistics against hand-made numbers and a loop."""

import math

import pytest
import torch

from router import dead_experts, distinct_experts, effective_experts, load_imbalance, specialisation

COUNTS = torch.tensor([[3, 3, 3, 3, 3], [15, 0, 0, 0, 0], [0, 6, 0, 6, 0], [1, 2, 0, 4, 8], [0, 0, 0, 0, 0]])


def test_load_imbalance() -> None:
    assert load_imbalance(COUNTS).tolist() == pytest.approx([1.0, 5.0, 2.5, 8 / 3, 1.0])


def test_dead_experts() -> None:
    assert dead_experts(COUNTS).tolist() == [0, 4, 3, 1, 5]


def test_effective_experts() -> None:
    shares = [1 / 15, 2 / 15, 4 / 15, 8 / 15]
    skewed = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_experts(COUNTS).tolist() == pytest.approx([5.0, 1.0, 2.0, skewed, 1.0])


def test_distinct_experts() -> None:
    """Three layers, two tokens, top-2: the first token meets 1, 2, 5 and 7, the second 0 and 3."""
    ids_LTK = torch.tensor([[[1, 2], [3, 0]], [[2, 5], [0, 3]], [[7, 1], [0, 3]]])
    assert distinct_experts(ids_LTK) == 3.0
    assert distinct_experts(ids_LTK[:1]) == 2.0


def test_specialisation() -> None:
    """The same shares, nothing in common, and between: of 1 and 1/2 H = 0, 1 bit, of their mean the entropy of 1/4."""
    apart = [[3, 3, 0, 0], [0, 0, 5, 5]]
    assert specialisation(torch.tensor([[1, 2, 3, 0], [2, 4, 6, 0]])) == pytest.approx(0, abs=1e-12)
    assert specialisation(torch.tensor(apart)) == pytest.approx(1)
    half = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert specialisation(torch.tensor([[8, 0], [1, 1]])) == pytest.approx(half)
    assert specialisation(torch.tensor([*apart, [0, 0, 1, 1]])) == pytest.approx(2 / 3), "two of three pairs"
    assert specialisation(torch.tensor([[1, 2, 3, 0]])) == 0


def test_one_row_gives_a_scalar() -> None:
    assert load_imbalance(COUNTS[3]).shape == dead_experts(COUNTS[3]).shape == effective_experts(COUNTS[3]).shape == ()
