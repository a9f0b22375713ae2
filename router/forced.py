"""Balanced routing by force: tokens go to the experts in turn, whatever the router prefers.

For measuring throughput under an even load, as torchtitan's and Megatron's options of that kind are.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Balanced(NamedTuple):
    """What a layer reaches when its routing is forced: all of its experts, in turn.

    Attributes:
        place: The layer's place among the layers that share its experts, an int64 scalar.
    """

    place: Tensor


def experts_in_turn(reach: Balanced, tokens: int, top_k: int, num_experts: int) -> Tensor:
    """Return the experts of each token, (T, K) int64, distinct within a row if there are at least K.

    Each layer continues where the one before it stopped. So the loads of any two experts differ by at most 1, both in a
    layer and over the first n of the layers that share the experts.
    """
    assignments = tokens * top_k
    turns = torch.arange(assignments, device=reach.place.device) + reach.place * assignments
    return (turns % num_experts).view(tokens, top_k)
