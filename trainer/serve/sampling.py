"""The next tokens of a batch in which every request has its own temperature, top-k, top-p and seed.

transformers' continuous batching takes the largest score of each row. Sampling is therefore done by scores alone: by
its own processors for temperature, top-k and top-p, and then by Gumbel noise, with which the largest of the scores
z_i + g_i is i with probability softmax(z)_i. The noise follows from the seed and the position, so what a request gets
does not depend on the requests beside it.

Dimensions: R rows, one for each request with a new token; V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)

GREEDY = 0
"""The key of a row without noise."""

SMALLEST_TEMPERATURE = 1e-5
"""Below, scores over the temperature may be infinite."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is made.

    Attributes:
        tokens: Largest number of new tokens.
        temperature: 0 takes the most likely token.
        top_k: Sample from this many of the most likely tokens; 0 for all.
        top_p: Sample from the smallest set of tokens with this total probability.
        seed: The seed, at least 0.
    """

    tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int

    def arguments(self, vocabulary: int) -> dict[str, Any]:
        """Return a request's arguments for the processors; a temperature near 0 takes the most likely token."""
        if self.temperature < SMALLEST_TEMPERATURE:
            return {"temperature": 1.0, "top_k": vocabulary, "top_p": 1.0, "seed": -1}
        top_k = min(self.top_k or vocabulary, vocabulary)
        return {"temperature": self.temperature, "top_k": top_k, "top_p": self.top_p, "seed": self.seed}


def add_sampling(processors: Any) -> None:
    """Let requests give `temperature`, `top_k`, `top_p` and `seed`.

    Args:
        processors: The list of logits processors of a manager that has not been started and does not sample.
    """
    processors.logits_processor.extend(
        [
            ContinuousBatchingTemperatureLogitsWarper(TemperatureLogitsWarper(1.0)),
            ContinuousBatchingTopKLogitsWarper(TopKLogitsWarper(1)),
            ContinuousBatchingTopPLogitsWarper(TopPLogitsWarper(1.0)),
            SeededNoise(),
        ]
    )
    for processor in processors.logits_processor:
        processors.supported_keys |= processor.supported_kwargs
    processors.tensors_required = len(processors.logits_processor)
    processors.do_processing = True


class SeededNoise(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Adds Gumbel noise to the scores of each request with a seed of at least 0."""

    supported_kwargs = {"seed": int}  # noqa: RUF012  as in the base class
    ignored_kwargs = ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Fill the keys of rows without a request."""
        int32_tensor.fill_(GREEDY)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Return the key of each row."""
        states = [request.state for request in requests_with_new_token]
        keys = [key(state.logit_processor_kwargs["seed"], state.position_offset) for state in states]
        return torch.tensor(keys, dtype=torch.int32)

    def __call__(self, scores_RV: Tensor, keys: Tensor) -> Tensor:
        """Return the scores with noise."""
        keys_R = keys[: scores_RV.shape[0]]
        return torch.where((keys_R == GREEDY)[:, None], scores_RV, scores_RV + gumbel(keys_R, scores_RV.shape[1]))


def key(seed: int, position: int) -> int:
    """Return the key of a request's next token, from 1 to 2**31 - 1; `GREEDY` if the seed is negative."""
    if seed < 0:
        return GREEDY
    mixed = _mixed(_mixed(seed & _MASK) ^ position)
    return mixed % (2**31 - 1) + 1


def gumbel(keys_R: Tensor, vocabulary: int) -> Tensor:
    """Return standard Gumbel noise (R, V), fp32: a hash of the key and the token (the finaliser of splitmix64)."""
    columns_V = torch.arange(vocabulary, device=keys_R.device)
    mixed_RV = (keys_R.long()[:, None] << 32) + columns_V
    for shift, factor in _ROUNDS:
        mixed_RV = (mixed_RV ^ ((mixed_RV >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    mixed_RV = mixed_RV ^ ((mixed_RV >> 31) & (2**33 - 1))
    uniform_RV = (((mixed_RV >> 11) & (2**53 - 1)).double() + 0.5) * 2**-53
    return -(-uniform_RV.log()).log().float()


_MASK = 2**64 - 1
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    for shift, factor in _ROUNDS:
        value = ((value ^ (value >> shift)) * factor) & _MASK
    return value ^ (value >> 31)
