"""A model loaded from a run, a checkpoint or an export, ready for evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from trainer.common.errors import BrokenModel
from trainer.common.machine import limit_threads, pick_device
from trainer.export.exported_model import load_export
from trainer.export.folder import is_export
from trainer.export.saved_run import SavedRun, find_run, load_run


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model of transformers on its device, in evaluation mode, and its tokenizer.

    Attributes:
        path: The path that the user gave.
        run: The checkpoint that the model comes from; None for an export or a Hugging Face model.
        bf16_autocast: Whether to compute in bf16 with weights of another type, as in training.
    """

    path: Path
    model: Any
    tokenizer: Any
    run: SavedRun | None
    bf16_autocast: bool = False

    @property
    def name(self) -> str:
        """The name of the checkpoint, or "export"."""
        return self.run.folder.name if self.run else "export"

    @property
    def folder(self) -> Path:
        """The folder of the run or of the export, where results are kept."""
        return self.run.home if self.run else self.path

    @property
    def window(self) -> int:
        """The number of positions that the model was trained on."""
        return int(self.model.config.max_position_embeddings)

    @property
    def precision(self) -> str:
        """The precision of the computation: fp32, bf16 or fp16."""
        stored = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.model.dtype, "fp32")
        return "bf16" if self.bf16_autocast else stored

    def autocast(self) -> torch.autocast:
        """Return the context to call the model in."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16_autocast)


def load_model(
    path: Path, device: str | None = None, precision: str | None = None, as_trained: bool = False
) -> LoadedModel:
    """Load the newest checkpoint of a run, one of its checkpoints, or an export of format hf.

    Args:
        path: Its folder.
        device: "cpu" or "cuda"; by default cuda if it is available.
        precision: "fp32" or "bf16"; by default the precision of the weights, which is fp32 for a run.
        as_trained: Whether the default is the run's `train.precision` instead.

    Raises:
        UserError: `path` is none of these, or the device is not available.
    """
    chosen = pick_device(device)
    prepare_libraries()
    run = None if is_export(path) else find_run(path, ", or an export of format hf")
    model, tokenizer = load_run(run) if run else load_export(path)
    if precision is None and run and as_trained:
        precision = run.recipe.train.precision
    if precision == "fp32":
        model.float()
    bf16_autocast = precision == "bf16" and model.dtype != torch.bfloat16
    return LoadedModel(path, model.to(chosen).eval(), tokenizer, run, bf16_autocast)


def prepare_libraries() -> None:
    """Limit torch's threads to this process's cores, and silence the messages of transformers."""
    limit_threads()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


@contextmanager
def finite_outputs(model: Any, name: str) -> Iterator[None]:
    """Check every forward pass of a model inside the `with` for NaN and infinity; synchronise only at the end.

    Raises:
        BrokenModel: Hidden states or logits were not finite. It replaces an error that this caused.
    """
    nonfinite: list[torch.Tensor] = []

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        values = output if isinstance(output, torch.Tensor) else output[0]
        found = values.isfinite().all().logical_not()
        nonfinite[:] = [nonfinite[0] | found] if nonfinite else [found]

    handles = [module.register_forward_hook(watch) for module in (model.model, model.lm_head)]
    try:
        yield
    except Exception:  # for example of torch.multinomial or statistics.stdev
        if not any(nonfinite):
            raise
    finally:
        for handle in handles:
            handle.remove()
    if any(nonfinite):
        raise BrokenModel(
            f"{name}: the model computes values that are not finite (NaN or infinity), so its losses, scores and "
            "routing are meaningless; use an earlier checkpoint"
        )
