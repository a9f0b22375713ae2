"""From tokens to text, and sampling by noise."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trainer.data.tokenizer import train_tokenizer
from trainer.serve.sampling import GREEDY, gumbel, key
from trainer.serve.text import AnswerText

TEXT = "def größe(名): return '🙂' * 3\n"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that takes several tokens for a character that is not ASCII."""
    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(["def return size\n" * 9], 270))


def parts(stops: list[str], text: str = TEXT) -> list[str]:
    """The text, as it comes token by token, and the rest."""
    answer = AnswerText(tokenizer(), stops)
    found = []
    for token in tokenizer()(text)["input_ids"]:
        found.append(answer.add([token]))
        if answer.stopped:
            break
    return [*found, answer.end()]


def test_characters_come_whole() -> None:
    found = parts([])
    assert "".join(found) == TEXT and not any("�" in part for part in found)
    assert sum(map(bool, found)) > 10, "it comes in parts"
    cut = AnswerText(tokenizer(), [])
    assert cut.add(tokenizer()("a🙂")["input_ids"][:-1]) == "a" and cut.end() == "�"


@pytest.mark.parametrize("stops", [["return"], ["'🙂", "xyz"], ["n '", "turn"], ["\n"], ["def"]])
def test_text_ends_before_the_first_stop_sequence(stops: list[str]) -> None:
    expected = TEXT[: min(TEXT.find(stop) for stop in stops if stop in TEXT)]
    assert "".join(parts(stops)) == expected


def test_what_only_begins_like_a_stop_sequence_is_given() -> None:
    found = parts(["return 7", "3\n\n"])
    assert "".join(found) == TEXT
    assert found[-1] == "3\n", "it is held back until the end"


def test_noise_samples_from_the_softmax() -> None:
    """With noise, the largest score of 50,000 keys falls on each token as often as softmax says."""
    scores_V = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf])
    keys = torch.tensor([key(seed, position) for seed in range(500) for position in range(100)], dtype=torch.int32)
    noise_RV = gumbel(keys, 5)
    counts_V = (scores_V + noise_RV).argmax(-1).bincount(minlength=5)
    expected_V = scores_V.softmax(-1) * len(keys)
    assert counts_V[4] == 0
    assert (((counts_V - expected_V)[:4] ** 2) / expected_V[:4]).sum() < 16.3, "chi squared, p = 0.001"
    assert abs(noise_RV.mean() - 0.5772) < 0.02 and abs(noise_RV.var() - math.pi**2 / 6) < 0.05
    correlation_VV = torch.corrcoef(noise_RV.T) - torch.eye(5)
    assert correlation_VV.abs().max() < 0.02, "tokens are independent"
    lag = torch.corrcoef(torch.stack([noise_RV[:-1, 0], noise_RV[1:, 0]]))[0, 1]
    assert abs(lag) < 0.02, "positions are independent"


def test_keys() -> None:
    assert key(-1, 5) == GREEDY
    assert len({key(seed, position) for seed in (0, 1, 2**63 - 1) for position in range(1000)}) == 3000
    assert all(0 < key(seed, 0) < 2**31 for seed in range(1000))
