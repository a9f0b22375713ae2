"""Random experts in one layer while a run learns: METHOD.md, "What the paper measured", probe 1.

`trainer.probe.randomize` does it to a trained model, with more protocols.
"""

from __future__ import annotations

import numpy as np
import torch

from router import Routing, select_experts
from trainer.model.micro_batch import Reroute


def random_routing(layer: int, experts: int, seed: int, sequences: range) -> Reroute:
    """K different experts for each token of `layer`, uniform over those that the layer sees; gate values stay.

    A sequence's experts depend on nothing but the seed, the layer and its own number: they are the same in every
    layout, on every device, and after every step, so that two probes differ by what was learned between them.

    Args:
        experts: that the layer sees.
        sequences: numbers of the micro-batch's sequences.
    """

    def reroute(at: int, routing: Routing) -> Routing:
        if at != layer:
            return routing
        tokens, top_k = routing.topk_expert_ids_TK.shape
        length = tokens // len(sequences)
        drawn = [torch.rand(length, experts, generator=seeded(seed, layer, number)) for number in sequences]
        ids_TK = select_experts(torch.cat(drawn), top_k)
        tokens_per_expert_M = torch.bincount(ids_TK.flatten(), minlength=experts)
        device = routing.topk_expert_ids_TK.device
        return routing._replace(
            topk_expert_ids_TK=ids_TK.to(device), tokens_per_expert_M=tokens_per_expert_M.to(device)
        )

    return reroute


def seeded(*numbers: int) -> torch.Generator:
    """On the CPU, so that all devices draw the same; other numbers, other draws."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
