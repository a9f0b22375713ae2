"""What the benchmark of a whole step compares: shapes, contenders, and the forms in which each may run on two cores."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.contenders import Contender
from trainer.config.recipe import Recipe, save_recipe

MICRO_BATCHES = 4
"""Micro-batches of a step, over all ranks, in the forms that are tried first."""

SEQ_LEN = 256
VOCAB = 2048
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Shape:
    """What all contenders have in common.

    Attributes:
        experts: Experts of one UniPool pool, or of all layers of another MoE together.
        sequences: Sequences of a step, SEQ_LEN tokens each.
    """

    layers: int
    hidden: int
    heads: int
    ffn_hidden: int
    experts: int
    sequences: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequences * SEQ_LEN

    @property
    def model(self) -> dict[str, int]:
        """The model, by the names of a recipe's keys."""
        own = {"layers": self.layers, "hidden": self.hidden, "heads": self.heads, "kv_heads": self.heads}
        return own | {"ffn_hidden": self.ffn_hidden, "vocab": VOCAB, "seq_len": SEQ_LEN}


SHAPES = {
    "small": Shape(layers=8, hidden=256, heads=4, ffn_hidden=512, experts=64, sequences=32),
    "182m": Shape(layers=12, hidden=768, heads=12, ffn_hidden=3072, experts=24, sequences=8),
}
"""`182m` has that recipe's proportions; experts and tokens are as many as fit into 24 GB."""

MODELS: dict[str, dict[str, Any]] = {
    "unipool": {"balance": {"pool": 1e-2, "scores": "normalized"}},
    "vanilla": {"router": {"kind": "softmax"}, "balance": {"layer": 1e-2}},
    "dense": {"model": {"ffn": "dense"}},
}
"""How our recipes differ, besides their experts."""


@dataclass(frozen=True)
class Form:
    """How a contender runs on the two cores.

    Attributes:
        ranks, threads: Processes, and threads of each.
        layout: Layout of UniPool, as in `parallel.layout`.
        compiled: Whether torch.compile compiles what it can: our trunk, or the whole model of a peer.
        micro_batches: Into how many micro-batches all ranks together divide a step.
    """

    ranks: int
    threads: int
    layout: str = "colocated"
    compiled: bool = False
    micro_batches: int = MICRO_BATCHES

    @property
    def pool_ranks(self) -> int:
        """Ranks that hold only experts."""
        return self.ranks // 2 if self.layout == "dedicated" else 0

    @property
    def trunk_ranks(self) -> int:
        """Data-parallel ranks."""
        return self.ranks - self.pool_ranks

    def larger(self) -> Form | None:
        """The same form with micro-batches twice as large, or None if then a rank would have none."""
        half = self.micro_batches // 2
        return replace(self, micro_batches=half) if half >= self.trunk_ranks else None

    def __str__(self) -> str:
        number = {1: "one", 2: "two", 4: "four"}[self.ranks]
        ranks = {
            "dedicated": f"{self.trunk_ranks} trunk + {self.pool_ranks} pool rank{'s' if self.pool_ranks > 1 else ''}",
            "every_rank": f"{number} ranks, each trunk and pool",
            "colocated": f"{number} ranks of one thread" if self.ranks > 1 else "one rank of two threads",
        }[self.layout]
        compiled = ", compiled" if self.compiled else ""
        return f"{ranks}{compiled}, {self.micro_batches} micro-batch{'es' if self.micro_batches > 1 else ''} a step"


def _forms(*layouts: Form) -> tuple[Form, ...]:
    return tuple(replace(form, compiled=compiled) for form in layouts for compiled in (False, True))


EITHER = _forms(Form(2, 1), Form(1, 2))
CONTENDERS = {
    "one_plus_one": _forms(Form(2, 1, "dedicated")),
    "colocated": EITHER,
    "every_rank": _forms(Form(2, 1, "every_rank")),
    "vanilla": EITHER,
    "dense": EITHER,
    "hugging_face": EITHER,
    "deepspeed_moe": EITHER,
}
"""Contenders, and the forms in which each is tried."""

FOUR_RANKS = {
    "two_plus_two": _forms(Form(4, 1, "dedicated", micro_batches=8)),
    "colocated_4": _forms(Form(4, 1, micro_batches=8)),
    "every_rank_4": _forms(Form(4, 1, "every_rank", micro_batches=8)),
}
"""UniPool on four ranks, two of which share a core: what the layouts compute and copy is compared, not their waits."""

MODEL_OF = {
    "one_plus_one": "unipool",
    "colocated": "unipool",
    "every_rank": "unipool",
    "vanilla": "vanilla",
    "dense": "dense",
    **dict.fromkeys(FOUR_RANKS, "unipool"),
}
PEERS = {"hugging_face": "peer_hf.py", "deepspeed_moe": "peer_deepspeed.py"}


def recipe(model: str, form: Form, shape: Shape, precision: str, folder: Path) -> Recipe:
    """Make the recipe of one of our models in a form, with as many lanes as a rank has micro-batches."""
    sections: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "model": shape.model,
        "train": {
            "steps": 100_000,
            "global_batch": shape.sequences,
            "micro_batch": shape.sequences // form.micro_batches,
            "lr": 1e-4,
            "min_lr": 1e-5,
            "precision": precision,
            "compile": form.compiled,
        },
        "data": {"source": "unused", "tokenizer": "unused"},
        "parallel": {
            "layout": form.layout,
            "trunk_ranks": form.trunk_ranks,
            "pool_ranks": form.pool_ranks,
            "lanes": form.micro_batches // form.trunk_ranks,
            "trunk_zero": 0,
            "pool_zero": 0,
            "timeout_seconds": 300.0,
        },
    }
    if model != "dense":
        sections["pool"] = {"experts": shape.experts}
    if model == "vanilla":
        sections["model"] |= {"groups": shape.layers}
    for name, keys in MODELS[model].items():
        sections[name] = {**sections.get(name, {}), **keys}
    return Recipe.model_validate(sections)


def contender(name: str, form: Form, shape: Shape, precision: str, python: str, folder: Path) -> Contender:
    """Make a contender in a form, without starting it.

    Args:
        python: The peers' interpreter.
        folder: For logs and recipes.
    """
    label = f"{name} {precision} {form}".replace(",", "")
    if name in MODEL_OF:
        own = folder / label.replace(" ", "_")
        own.mkdir()
        save_recipe(recipe(MODEL_OF[name], form, shape, precision, own), own / "recipe.yaml")
        command = [sys.executable, "-m", "tests.benchmarks.our_rank", str(own / "recipe.yaml")]
    else:
        settings = shape.model | {
            "kind": "step",
            "dtype": PRECISIONS[precision],
            "experts": shape.experts // shape.layers,
            "sequences": shape.sequences // form.micro_batches,
            "micro_batches": form.micro_batches,
            "compile": form.compiled,
        }
        command = [python, str(Path(__file__).with_name(PEERS[name])), json.dumps(settings)]
    return Contender(label, command, form.ranks, form.threads, folder)


class KnownForms:
    """The forms that were kept before, in a file, so that a later call need not try all of them again.

    Args:
        path: The file, which need not exist; None remembers nothing.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path and path.exists() else {}

    def to_try(self, name: str, shape: str, precision: str) -> tuple[Form, ...]:
        """Return the form that was kept before, or else all of a contender's forms."""
        known = self._known.get(f"{shape} {precision} {name}")
        return (Form(**known),) if known else (CONTENDERS | FOUR_RANKS)[name]

    def keep(self, name: str, shape: str, precision: str, form: Form) -> None:
        """Write down which form was kept."""
        self._known[f"{shape} {precision} {name}"] = asdict(form)
        if self._path:
            self._path.write_text(json.dumps(self._known, indent=1) + "\n")
