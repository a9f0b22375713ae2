"""The weights of a checkpoint in modules without engines."""

from __future__ import annotations

import torch

from pool.shard import ExpertShard
from trainer.checkpoint.reshard import SavedCheckpoint
from trainer.model.trunk import Trunk


@torch.no_grad()
def load_weights(saved: SavedCheckpoint, trunk: Trunk, shard: ExpertShard | None) -> None:
    """Copy the weights of a checkpoint into a trunk and a shard."""
    for name, parameter in trunk.named_parameters():
        parameter.copy_(saved.trunk.read(name).weight)
    for name, buffer in trunk.named_buffers():
        buffer.copy_(saved.trunk.buffers[name])
    if shard is not None:
        for name, parameter in shard.named_parameters():
            parameter.copy_(saved.read_experts(name, shard.expert_ids).weight)
        shard.weights_changed()
