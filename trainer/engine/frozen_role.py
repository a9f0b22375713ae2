"""The engine of a role that is not trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.common.safe_read import read_tensors
from trainer.config.recipe import Recipe
from trainer.engine.ds_config import scheduled_rate
from trainer.engine.monitors import Monitors
from trainer.engine.parameter_state import CHECKPOINT_TAG, ParameterState


class FrozenRole:
    """A role whose weights are frozen: a `RoleEngine` without gradients or optimizer.

    Args:
        writes: Whether this rank writes the role's file of a checkpoint: one rank of the role's group does.

    Attributes:
        updates: See `RoleEngine.updates`.
    """

    def __init__(self, module: nn.Module, recipe: Recipe, monitors: Monitors, writes: bool):
        self.module = module.requires_grad_(False)
        self.monitors = monitors
        self.stage = 0
        self.updates = 0
        self._recipe, self._writes = recipe, writes

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Accumulate nothing."""
        yield

    def grad_norm(self) -> Tensor:
        """Return 0, because there are no gradients."""
        return torch.zeros((), device=next(self.module.parameters()).device)

    def step(self, total_norm: float) -> bool:
        """Count the step if the other role applies it."""
        applied = math.isfinite(total_norm)
        self.updates += applied
        return applied

    @property
    def learning_rate(self) -> float:
        """Learning rate of the other role's next step."""
        return scheduled_rate(self._recipe, self.updates)

    def save(self, folder: Path, write: Callable[[Path, Any], None]) -> None:
        """Write one file for the role, in the format that DeepSpeed uses without ZeRO."""
        if self._writes:
            state = {
                "module": {name: value.cpu().clone() for name, value in self.module.state_dict().items()},
                "buffer_names": [name for name, _ in self.module.named_buffers()],
                "optimizer": None,
                "lr_scheduler": {"last_batch_iteration": self.updates},
            }
            write(folder / CHECKPOINT_TAG / "mp_rank_00_model_states.pt", state)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote."""
        state = read_tensors(folder / CHECKPOINT_TAG / "mp_rank_00_model_states.pt")
        self.module.load_state_dict(state["module"])
        self.updates = state["lr_scheduler"]["last_batch_iteration"]

    @torch.no_grad()
    def load_resharded(
        self, read: Callable[[str], ParameterState], buffers: dict[str, Tensor], updates: int, fresh: bool = False
    ) -> None:
        """Load a state that was saved in another layout, without its moments; see `RoleEngine.load_resharded`."""
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])
        for name, parameter in self.module.named_parameters():
            parameter.copy_(read(name).weight)
        self.updates = updates
