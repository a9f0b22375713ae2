"""The summary of a run at its end."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.config.recipe import Recipe
from trainer.telemetry.run_folder import RunFolder


@dataclass(frozen=True)
class Summary:
    """The end of a run.

    Attributes:
        val_loss: mean cross-entropy on held-out text, nats per token.
        unigram_entropy: of the training tokens, nats: the loss that token frequencies alone give.
        prompt, sample: held-out text and the model's continuation, None if its logits are not finite.
        load_LM: assignments on held-out text by layer and the experts that it sees; None for a dense model.
    """

    recipe: Recipe
    folder: RunFolder
    checkpoint: Path
    val_loss: float
    unigram_entropy: float
    prompt: str
    sample: str | None
    load_LM: np.ndarray | None


def write_summary(s: Summary) -> None:
    """Draw the load picture and print the summary to stdout."""
    lines = [
        f"validation loss   {_loss(s.val_loss)}",
        f"unigram entropy   {s.unigram_entropy:.4f} nats per token (the loss that token frequencies alone give)",
        f"checkpoint        {s.checkpoint}",
        f"metrics           {s.folder.metrics_file}",
    ]
    if s.recipe.metrics.tensorboard:
        lines.append(f"TensorBoard       {s.folder.tensorboard}")
    if s.load_LM is not None:
        from trainer.telemetry.expert_heatmap import write_heat_map

        title = f"{s.folder.path.name}: experts chosen on held-out text"
        try:
            write_heat_map(s.load_LM, s.folder.load_picture, title, groups=s.recipe.model.groups)
            lines.append(f"load picture      {s.folder.load_picture}")
        except OSError as error:
            lines.append(f"load picture      could not be written ({error.strerror})")
    if s.sample is None:
        lines.append("sample            none, because the model's logits are not finite")
    else:
        lines += ["sample (after the bar)", textwrap.indent(f"{s.prompt} | {s.sample}", "    ")]
    print("\n".join(lines), flush=True)


def _loss(nats: float) -> str:
    if not math.isfinite(nats):
        return f"{nats}: not finite, because the model has diverged"
    return f"{nats:.4f} nats per token, perplexity {perplexity(nats):.1f}"


def perplexity(nats: float) -> float:
    """Return the perplexity of a mean cross-entropy in nats; infinite if a float cannot hold it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
