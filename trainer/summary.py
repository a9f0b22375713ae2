"""What a run says at its end."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.config import Recipe
from trainer.run_folder import RunFolder


@dataclass(frozen=True)
class Summary:
    """The end of a run.

    Attributes:
        val_loss: mean cross-entropy on held-out text, nats a token.
        unigram_entropy: of the training tokens, nats: the loss of knowing nothing but how frequent each token is.
        prompt, sample: held-out text, and how the model goes on.
        load_LM: assignments of each expert that a layer sees, on held-out text; None for a dense model.
    """

    recipe: Recipe
    folder: RunFolder
    checkpoint: Path
    val_loss: float
    unigram_entropy: float
    prompt: str
    sample: str
    load_LM: np.ndarray | None


def write_summary(s: Summary) -> None:
    """Draw the load picture and print the summary to stdout."""
    lines = [
        f"validation loss   {s.val_loss:.4f} nats a token, perplexity {math.exp(s.val_loss):.1f}",
        f"unigram entropy   {s.unigram_entropy:.4f} nats a token (what token frequencies alone give)",
        f"checkpoint        {s.checkpoint}",
        f"metrics           {s.folder.metrics_file}",
    ]
    if s.recipe.metrics.tensorboard:
        lines.append(f"TensorBoard       {s.folder.tensorboard}")
    if s.load_LM is not None:
        from trainer.heat_map import write_heat_map

        title = f"{s.folder.path.name}: experts chosen on held-out text"
        try:
            write_heat_map(s.load_LM, s.folder.load_picture, title, groups=s.recipe.model.groups)
            lines.append(f"load picture      {s.folder.load_picture}")
        except OSError as error:
            lines.append(f"load picture      could not be written ({error.strerror})")
    text = textwrap.indent(f"{s.prompt} | {s.sample}", "    ")
    print("\n".join(lines) + f"\nsample (after the bar)\n{text}", flush=True)
