"""Families of points: variants of one method from the results of sweeps, which differ in size only."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.common.errors import UserError
from trainer.sweep.result import JSON_FILE, SETTINGS, VariantResult, read_result

_COMPARABLE = ("tokens", "data.source", "data.tokenizer", "model.vocab", "model.seq_len")
"""Must be equal: losses on other text, or after another length of training, cannot be compared."""
_SCALED = ("balance.layer", "balance.pool", "train.lr")
"""May differ between sizes, as in the paper; the notes say so."""
_KINDS = ("router.kind", "router.constant_factor", "balance.scores", "balance.scope", "balance.delay")


@dataclass(frozen=True)
class Family:
    """Points of one method, named after its variants.

    Attributes:
        baselines: What each point is compared with; None where that is missing, or is a point of the family itself.
        warnings: What differs between the points besides their size.
    """

    name: str
    points: tuple[VariantResult, ...]
    baselines: tuple[VariantResult | None, ...]
    warnings: tuple[str, ...]


def result_file(source: Path) -> Path:
    """Return the result.json of a sweep's folder; a file is returned as it is."""
    return source / JSON_FILE if os.path.isdir(source) else source


def read_families(sources: Sequence[Path], variants: Sequence[str] = ()) -> list[Family]:
    """Read results of sweeps, or only of these variants, named with or without the values of the grid.

    Raises:
        UserError: A file is not a result, a variant does not exist, or points of a family cannot be compared.
    """
    pairs = [
        pair for file in dict.fromkeys(result_file(source).resolve() for source in sources) for pair in _read(file)
    ]
    known = {name for p, _ in pairs for name in (p.name, p.variant)}
    for name in variants:
        if name not in known:
            raise UserError(f"--variant {name}: has no finished run; choose from: {', '.join(sorted(known))}")
    families: dict[tuple[Any, ...], list[tuple[VariantResult, VariantResult | None]]] = {}
    for p, baseline in pairs:
        if p.settings["model.ffn"] == "pool" and (not variants or {p.name, p.variant} & set(variants)):
            families.setdefault(_method(p), []).append((p, baseline))
    return [_family(members) for members in families.values()]


def _read(file: Path) -> list[tuple[VariantResult, VariantResult | None]]:
    """Return the variants that have finished runs, each with its baseline."""
    result = read_result(file)
    for v in result.variants:
        if missing := [key for key in SETTINGS if key not in v.settings]:
            raise UserError(
                f"{file}: it is of an older version, without the setting {missing[0]}; "
                f"make it with: unipool sweep {file.parent} --report"
            )
        if diverged := [seed for seed, loss in v.losses.items() if not math.isfinite(loss)]:
            raise UserError(f"{file}: the validation loss of {v.name} seed {diverged[0]} is not finite")
    finished = [v for v in result.variants if v.runs]
    return [(v, b if (b := result.baseline_of(v)) and b.runs else None) for v in finished]


def _method(p: VariantResult) -> tuple[Any, ...]:
    """Return what all points of a family share: how experts are shared, the router, the kinds of balance loss."""
    s, groups = p.settings, p.settings["model.groups"]
    sharing = "private" if groups == p.layers else str(groups)  # older results may have a list
    return (sharing, *(s[key] for key in _KINDS), *(s[key] > 0 for key in ("balance.layer", "balance.pool")))


def _family(members: Sequence[tuple[VariantResult, VariantResult | None]]) -> Family:
    points = tuple(p for p, _ in members)
    name = ", ".join(dict.fromkeys(p.variant for p in points))
    for key in _COMPARABLE:
        compared = (p for pair in members for p in pair if p)
        values = dict.fromkeys((vars(p) | p.settings)[key] for p in compared)
        if len(values) > 1:
            raise UserError(
                f"{name}: {key} differs ({', '.join(map(str, values))}); a law of size needs it to be equal: choose "
                "other results, or variants with --variant"
            )
    first: dict[tuple[Any, ...], VariantResult] = {}
    for p, baseline in members:
        size = (id(baseline or p), p.experts, p.settings["model.ffn_hidden"], p.layers, p.parameters["active"])
        if (other := first.setdefault(size, p)) is not p:
            differing = ", ".join(key for key in _SCALED if p.settings[key] != other.settings[key])
            raise UserError(
                f"{name}: {other.name} and {p.name} have the same size and differ in {differing or 'another setting'}; "
                "choose one with --variant"
            )
    own = set(map(id, points))
    baselines = tuple(b if b and id(b) not in own else None for _, b in members)
    scaled = {key: dict.fromkeys(p.settings[key] for p in points) for key in _SCALED}
    warnings = tuple(
        f"{key} differs between sizes ({', '.join(f'{value:g}' for value in values)})"
        for key, values in scaled.items()
        if len(values) > 1
    )
    return Family(name, points, baselines, warnings)
