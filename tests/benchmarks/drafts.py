"""Speculative decoding of an export with a small dense draft, by transformers' assisted generation.

python -m tests.benchmarks.drafts [--runs runs/exports] [--json]

The draft is a dense model of two layers with the same tokenizer, trained on the same text. It proposes tokens, which
the model checks in one pass. Prompts are held-out text, and decoding is greedy. Beside it, prompt lookup proposes what
followed the same tokens earlier in the text, without any model.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from tests.benchmarks.exported import exported, run_of
from tests.benchmarks.report import print_report, ratios
from trainer.export.exported_model import load_export
from trainer.export.loaded_model import prepare_libraries
from trainer.export.saved_run import data_of, find_run

PROMPTS, PROMPT, NEW_TOKENS = 16, 32, 64
PROPOSED = (2, 4, 8)
"""Tokens that are proposed at once."""


class Calls:
    """Counts the forward passes of a model."""

    def __init__(self, model: Any):
        self.count = 0
        model.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1

    def taken(self) -> int:
        """Return the number since the last call."""
        count, self.count = self.count, 0
        return count


@torch.no_grad()
def generate(model: Any, prompt: Tensor, **settings: Any) -> tuple[Tensor, float]:
    """Return the new tokens and the seconds."""
    started = time.perf_counter()
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False, **settings
    )
    return made[0, prompt.shape[1] :], time.perf_counter() - started


@click.command(help=__doc__)
@click.option("--runs", "folder", type=click.Path(path_type=Path), default="runs/exports", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object.")
def main(folder: Path, as_json: bool) -> None:
    folder = folder.resolve()
    prepare_libraries()
    (model, _), (draft, _) = (load_export(exported(folder, name)) for name in ("unipool", "draft"))
    model.eval(), draft.eval()
    stream = data_of(find_run(run_of(folder, "unipool"))).stream("validation", None)
    prompts = torch.cat(list(stream.micro_batches(0, PROMPTS, 0, 1, 1)))[:, :PROMPT].split(1)
    ways: dict[str, dict[str, Any]] = {f"draft_{n}": {"assistant_model": draft} for n in PROPOSED}
    ways |= {f"lookup_{n}": {"prompt_lookup_num_tokens": n} for n in PROPOSED}
    checks, proposals = Calls(model), Calls(draft)
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *ways)}
    passes = dict.fromkeys(ways, 0)
    proposed = dict.fromkeys(ways, 0)
    differing = dict.fromkeys(ways, 0)
    total = 0
    generate(model, prompts[0])  # warm up
    for prompt in tqdm(prompts, desc="prompts", disable=None):
        plain, taken = generate(model, prompt)
        seconds["plain"].append(taken)
        total += len(plain)
        checks.taken(), proposals.taken()
        for name, settings in ways.items():
            draft.generation_config.update(
                num_assistant_tokens=int(name.split("_")[1]),
                num_assistant_tokens_schedule="constant",
                assistant_confidence_threshold=0.0,
            )
            tokens, taken = generate(model, prompt, **settings)
            seconds[name].append(taken)
            passes[name] += checks.taken()
            proposed[name] += proposals.taken()
            differing[name] += not torch.equal(tokens, plain)
    results = {f"{name}_over_plain": ratios(seconds["plain"], seconds[name]) for name in ways}
    notes = [
        f"{PROMPTS} prompts of {PROMPT} tokens, {NEW_TOKENS} new tokens each, greedy, one at a time; ratios of "
        "seconds, prompt by prompt",
        f"the model takes {sum(seconds['plain']) / total * 1e3:.1f} ms for a token alone",
    ]
    for name in ways:
        # Every pass of the model gives one token of its own, and the proposed tokens that it accepts.
        accepted = total - passes[name]
        rate = f"{accepted / proposed[name]:.0%} of the proposed tokens accepted, " if proposed[name] else ""
        notes.append(
            f"{name}: {rate}{total / passes[name]:.2f} tokens a pass of the model; "
            f"{differing[name]} of {PROMPTS} continuations differ from plain greedy decoding"
        )
    print_report("Speculative decoding", "python -m tests.benchmarks.drafts", results, notes, as_json)


if __name__ == "__main__":
    main()
