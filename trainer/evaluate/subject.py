"""What is evaluated: a run's checkpoint or an export, on one device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.common.machine import limit_threads, pick_device
from trainer.export.folder import is_export
from trainer.export.generate import load_model
from trainer.export.source import SavedRun, find_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from trainer.export.modeling_unipool import UniPoolForCausalLM


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        path: as given.
        model: one of ours; a probe's may be of another family.
        run: where it comes from; None for an export.
        precision: of its arithmetic, fp32 or bf16; fp16 if another family's weights are.
        mixed: bf16 by autocast, as in training; else the weights' type is that of the arithmetic.
    """

    path: Path
    model: UniPoolForCausalLM
    tokenizer: PreTrainedTokenizerFast
    run: SavedRun | None
    precision: str
    mixed: bool

    @property
    def name(self) -> str:
        """Of the checkpoint, or "export"."""
        return self.run.folder.name if self.run else "export"

    @property
    def folder(self) -> Path:
        """Where results are kept: of the run, or of the export."""
        return self.run.folder.resolve().parent.parent if self.run else self.path

    def autocast(self) -> torch.autocast:
        """The context in which forwards run."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.mixed)


def load_subject(path: Path, device: str | None, precision: str | None, as_trained: bool) -> Subject:
    """The newest checkpoint of a run, one checkpoint of it, or an export.

    Args:
        device: cpu or cuda; None: cuda where there is one.
        precision: fp32 or bf16; None: that of the weights, which are fp32 in a run.
        as_trained: None is the recipe's train.precision.

    Raises:
        UserError: `path` is none of these, or there is no such device.
    """
    limit_threads()
    chosen = pick_device(device)
    run = None if is_export(path) else find_run(path)
    model, tokenizer = load_model(run.folder if run else path)
    if precision is None and run and as_trained:
        precision = run.recipe.train.precision
    if precision == "fp32":
        model.float()
    stored = stored_precision(model)
    precision = precision or stored
    return Subject(path, model.to(chosen).eval(), tokenizer, run, precision, mixed=precision != stored)


def stored_precision(model: Any) -> str:
    """Of its weights."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.dtype, "fp32")
