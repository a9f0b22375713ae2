"""A whole training step on two cores: UniPool, our own baselines, Hugging Face Qwen3-MoE and DeepSpeed's MoE.

All have the same active shape: 8 layers, hidden 256, 4 heads, one SwiGLU of width 512 per token and layer, vocabulary
2,048, and 4 micro-batches of 2,048 tokens, with AdamW and clipping. UniPool has one pool of 64 experts and the other
MoEs have 8 private experts per layer, so all of them have equally many parameters; dense has one FFN per layer. With
this width, trunk and pool take about equally long. On a cluster, the number of ranks of each role would be chosen for
that; two cores only allow 1 + 1.

Where two layouts are possible, two ranks of one thread or one rank of two threads, both are tried and the faster one is
kept.

python -m tests.benchmarks.step [--rounds 8] [--json]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from tests.benchmarks.contenders import Contender, end_in_order
from tests.benchmarks.peers import peers_python
from tests.benchmarks.report import print_report, ratios
from trainer.config.recipe import Recipe, save_recipe

CORES = 2
TRIALS = 2
"""Steps for which each of two layouts is tried, after one for warm-up."""

SHAPE = {"layers": 8, "hidden": 256, "heads": 4, "kv_heads": 4, "ffn_hidden": 512, "vocab": 2048, "seq_len": 256}
EXPERTS = 64
SEQUENCES = 8
MICRO_BATCHES = 4
TOKENS = SEQUENCES * MICRO_BATCHES * SHAPE["seq_len"]
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}

MODELS: dict[str, dict[str, Any]] = {
    "unipool": {
        "pool": {"experts": EXPERTS},
        "balance": {"pool": 1e-2, "scores": "normalized"},
    },
    "vanilla": {
        "model": {"groups": SHAPE["layers"]},
        "router": {"kind": "softmax"},
        "pool": {"experts": EXPERTS},
        "balance": {"layer": 1e-2},
    },
    "dense": {"model": {"ffn": "dense"}},
}
"""How our recipes differ."""


@dataclass(frozen=True)
class Layout:
    """Processes on the two cores, pool ranks included."""

    ranks: int
    threads: int
    pool_ranks: int = 0

    def __str__(self) -> str:
        if self.pool_ranks:
            return f"{self.ranks - self.pool_ranks} trunk + {self.pool_ranks} pool rank"
        return "two ranks of one thread" if self.ranks == 2 else "one rank of two threads"


EITHER = (Layout(2, 1), Layout(1, 2))
LAYOUTS = {
    "one_plus_one": (Layout(2, 1, pool_ranks=1),),
    "colocated": EITHER,
    "vanilla": EITHER,
    "dense": EITHER,
    "hugging_face": EITHER,
    "deepspeed_moe": (Layout(2, 1),),
}
"""Contenders, and the layouts in which each is tried."""

MODEL_OF = {"one_plus_one": "unipool", "colocated": "unipool", "vanilla": "vanilla", "dense": "dense"}


def recipe(model: str, layout: Layout, precision: str, folder: Path) -> Recipe:
    """Make the recipe of one of our models in a layout, with as many lanes as a rank has micro-batches."""
    trunk_ranks = layout.ranks - layout.pool_ranks
    sections: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "model": SHAPE,
        "train": {
            "steps": 100_000,
            "global_batch": SEQUENCES * MICRO_BATCHES,
            "micro_batch": SEQUENCES,
            "lr": 1e-4,
            "min_lr": 1e-5,
            "precision": precision,
        },
        "data": {"source": "unused", "tokenizer": "unused"},
        "parallel": {
            "trunk_ranks": trunk_ranks,
            "pool_ranks": layout.pool_ranks,
            "lanes": MICRO_BATCHES // trunk_ranks,
            "trunk_zero": 0,
            "pool_zero": 0,
            "timeout_seconds": 300.0,
        },
    }
    for name, keys in MODELS[model].items():
        sections[name] = {**sections.get(name, {}), **keys}
    return Recipe.model_validate(sections)


def contender(name: str, layout: Layout, precision: str, python: str, folder: Path) -> Contender:
    """Make a contender in a layout, without starting it."""
    label = f"{name} {precision} {layout}"
    if name in MODEL_OF:
        own = folder / label.replace(" ", "_")
        own.mkdir()
        save_recipe(recipe(MODEL_OF[name], layout, precision, own), own / "recipe.yaml")
        command = [sys.executable, "-m", "tests.benchmarks.our_rank", str(own / "recipe.yaml")]
    else:
        settings = SHAPE | {
            "kind": "step",
            "dtype": PRECISIONS[precision],
            "experts": EXPERTS // SHAPE["layers"],
            "sequences": SEQUENCES,
            "micro_batches": MICRO_BATCHES,
        }
        script = "peer_hf.py" if name == "hugging_face" else "peer_deepspeed.py"
        command = [python, str(Path(__file__).with_name(script)), json.dumps(settings)]
    return Contender(label, command, layout.ranks, layout.threads, folder)


def choose(
    forms: Sequence[tuple[Layout, Contender]], stack: ExitStack
) -> tuple[Layout, Contender, dict[Layout, float]]:
    """Start a contender in all its layouts, warm up, and keep the fastest alive on the stack.

    Returns:
        The layout, the contender, and the seconds of the best trial in each layout.
    """
    with ExitStack() as starting:
        alive = {layout: starting.enter_context(form) for layout, form in forms}
        trials: dict[Layout, list[float]] = {layout: [] for layout in alive}
        for form in alive.values():
            form.run(steps=1)
        for _ in range(TRIALS if len(alive) > 1 else 0):
            for layout, form in alive.items():
                trials[layout].append(form.run(steps=1))
        best = {layout: min(seconds) for layout, seconds in trials.items() if seconds}
        kept = min(best, key=lambda layout: best[layout]) if best else next(iter(alive))
        for layout, form in alive.items():
            if layout != kept:
                form.close()
        stack.push(starting.pop_all())
    return kept, alive[kept], best


def step_ratios(seconds: dict[str, list[float]], precision: str) -> dict[str, list[float]]:
    """Return the named ratios of one precision, from every contender's seconds per step, round by round."""
    best_peer = list(map(min, seconds["hugging_face"], seconds["deepspeed_moe"]))
    return {
        f"colocated_over_vanilla_{precision}": ratios(seconds["vanilla"], seconds["colocated"]),
        f"one_plus_one_over_best_peer_{precision}": ratios(best_peer, seconds["one_plus_one"]),
        f"one_plus_one_over_dense_{precision}": ratios(seconds["dense"], seconds["one_plus_one"]),
    }


def measure(
    precision: str, rounds: int, python: str, advance: Callable[[str], None]
) -> tuple[dict[str, list[float]], list[str]]:
    """Return every contender's seconds per step, round by round, and a note on each."""
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    layouts: dict[str, Layout] = {}
    trials: dict[str, dict[Layout, float]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        alive: dict[str, Contender] = {}
        for name in LAYOUTS:
            advance(f"{precision} {name}")
            forms = [(x, contender(name, x, precision, python, Path(folder))) for x in LAYOUTS[name]]
            layouts[name], alive[name], trials[name] = choose(forms, stack)
        for _ in range(rounds):
            advance(f"{precision} rounds")
            for name, form in alive.items():
                seconds[name].append(form.run(steps=1))
    return seconds, list(_notes(precision, seconds, layouts, trials))


def _notes(
    precision: str,
    seconds: dict[str, list[float]],
    layouts: dict[str, Layout],
    trials: dict[str, dict[Layout, float]],
) -> Iterator[str]:
    for name, taken in seconds.items():
        note = f"{precision} {name}: {TOKENS / statistics.median(taken):,.0f} tokens/s, {layouts[name]}"
        for layout, best in trials[name].items():
            if layout != layouts[name]:
                note += f" (tried: {layout}, {trials[name][layouts[name]] / best:.2f} times as fast)"
        yield note


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="Also print one JSON object at the end.")
def main(rounds: int, as_json: bool) -> None:
    """Measure whole training steps on two cores, in fp32 and bf16.

    The peers are first installed into an environment of their own.

    \b
    Example:
      python -m tests.benchmarks.step --rounds 3 --json
    """
    python = peers_python()
    end_in_order()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:CORES]))  # processes that are started here inherit it
    results: dict[str, list[float]] = {}
    notes: list[str] = []
    with tqdm(total=len(PRECISIONS) * (len(LAYOUTS) + rounds), dynamic_ncols=True) as bar:

        def advance(what: str) -> None:
            bar.set_description(what)
            bar.update()

        for precision in PRECISIONS:
            seconds, more = measure(precision, rounds, python, advance)
            results |= step_ratios(seconds, precision)
            notes += more
    title = "A training step on two cores: ratios of tokens per second"
    print_report(title, "python -m tests.benchmarks.step", results, notes, as_json)


if __name__ == "__main__":
    main()
