"""Random experts in one layer during training, as in the paper's probe of deep layers (docs/method.md).

`trainer.probe.randomize` does the same to a trained model, with more protocols.
"""

from __future__ import annotations

import numpy as np
import torch

from router import Owned, Reach, Routing, select_experts
from trainer.model.micro_batch import Reroute


def random_routing(layer: int, experts: int, seed: int, sequences: range, reach: Reach | None = None) -> Reroute:
    """Replace the experts of each token of `layer` by K random ones, distinct and uniform; gate values stay.

    They are drawn from all experts that the layer sees, or from its own if it is locked.

    The experts of a sequence depend only on the seed, the layer and the sequence's number. They are the same in every
    layout, on every device and after every step, so two probes differ only by what was learned in between.

    Args:
        experts: Number of experts that the layer sees.
        sequences: Numbers of the micro-batch's sequences.
        reach: What the layer reaches, in a run with a lock.
    """
    own_E = reach.expert_ids_E.cpu() if isinstance(reach, Owned) else torch.arange(experts)

    def reroute(at: int, routing: Routing) -> Routing:
        if at != layer:
            return routing
        tokens, top_k = routing.topk_expert_ids_TK.shape
        length = tokens // len(sequences)
        drawn = [torch.rand(length, len(own_E), generator=seeded(seed, layer, number)) for number in sequences]
        ids_TK = own_E[select_experts(torch.cat(drawn), top_k)]
        tokens_per_expert_M = torch.bincount(ids_TK.flatten(), minlength=experts)
        device = routing.topk_expert_ids_TK.device
        return routing._replace(
            topk_expert_ids_TK=ids_TK.to(device), tokens_per_expert_M=tokens_per_expert_M.to(device)
        )

    return reroute


def seeded(*numbers: int) -> torch.Generator:
    """Return a generator seeded by all of `numbers`, on the CPU so that draws do not depend on the device."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
