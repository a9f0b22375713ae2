"""Whether a model computes numbers at all: weights that a diverged run has left give NaN for any text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.common.errors import BrokenModel


@contextmanager
def sound(model: Any, name: str) -> Iterator[None]:
    """Watches every forward of a transformers model inside the `with`; nothing waits for the device before its end.

    Args:
        name: of the model, for the message.

    Raises:
        BrokenModel: at the end, where an output (hidden states or logits) had a number that is not finite; also in the
            place of an error to which that has led.
    """
    broken: list[torch.Tensor] = []

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        found = output[0].isfinite().all().logical_not()
        broken[:] = [broken[0] | found] if broken else [found]

    handles = [module.register_forward_hook(watch) for module in (model, model.model)]
    try:
        try:
            yield
        except Exception:  # as of torch.multinomial, or of statistics.stdev
            if not _any(broken):
                raise
    finally:
        for handle in handles:
            handle.remove()
    if _any(broken):
        raise BrokenModel(
            f"{name}: the model computes numbers that are not finite (NaN or infinity), and so its losses, scores and "
            "routing say nothing; take an earlier checkpoint"
        )


def _any(broken: list[torch.Tensor]) -> bool:
    return any(bool(found) for found in broken)
