"""The summary of a run at its end."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.config.recipe import Recipe
from trainer.telemetry.run_folder import RunFolder


def write_summary(
    recipe: Recipe,
    folder: RunFolder,
    devices: str,
    checkpoint: Path,
    val_loss: float,
    unigram_entropy: float,
    prompt: str,
    sample: str | None,
    load_LM: NDArray[np.integer] | None,
    owners: Sequence[int] | None,
) -> None:
    """Draw the picture of the load, and print the summary to stdout.

    Args:
        devices: The devices of all ranks.
        val_loss: Mean cross-entropy on held-out text, nats per token.
        unigram_entropy: Entropy of the training tokens, nats: the loss that token frequencies alone give.
        prompt, sample: Held-out text and the model's continuation, None if its logits are not finite.
        load_LM: Assignments on held-out text by layer and the experts that it sees; None for a dense model.
        owners: The layer that owns each expert, in a run with a lock after the assignment.
    """
    loss = f"{val_loss:.4f} nats per token, perplexity {perplexity(val_loss):.1f}"
    if not math.isfinite(val_loss):
        loss = f"{val_loss}: not finite, because the model has diverged"
    lines = [
        f"validation loss   {loss}",
        f"unigram entropy   {unigram_entropy:.4f} nats per token (the loss that token frequencies alone give)",
        f"devices           {devices}",
        f"checkpoint        {checkpoint}",
        f"metrics           {folder.metrics_file}",
    ]
    if recipe.metrics.tensorboard:
        lines.append(f"TensorBoard       {folder.tensorboard}")
    if load_LM is not None:
        from trainer.telemetry.expert_heatmap import write_heat_map

        title = f"{folder.path.name}: experts chosen on held-out text"
        try:
            write_heat_map(load_LM, folder.load_picture, title, recipe.model.groups, owners)
            lines.append(f"load picture      {folder.load_picture}")
        except OSError as error:
            lines.append(f"load picture      could not be written ({error.strerror})")
    if sample is None:
        lines.append("sample            none, because the model's logits are not finite")
    else:
        lines += ["sample (after the bar)", textwrap.indent(f"{prompt} | {sample}", "    ")]
    print("\n".join(lines), flush=True)


def perplexity(nats: float) -> float:
    """Return the perplexity of a mean cross-entropy in nats; infinite if a float cannot hold it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
