"""Families of points: variants of one method from the results of sweeps, which differ in size only."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.common.errors import UserError
from trainer.sweep.result import JSON_FILE, SETTINGS, VariantResult, read_result

_COMPARABLE = ("tokens", "data.source", "data.tokenizer", "model.vocab", "model.seq_len")
"""Must be equal: losses on other text, or after another length of training, cannot be compared."""
_SCALED = ("balance.layer", "balance.pool", "train.lr")
"""May differ between sizes, as in the paper; the notes say so."""


@dataclass(frozen=True, kw_only=True)
class Point(VariantResult):
    """A variant with finished runs; `block` names the file of the result and the baseline in it."""

    block: str

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden * int(self.settings["model.ffn_hidden"])


@dataclass(frozen=True)
class Family:
    """Points of one method, named after its variants, their baselines by block, and what differs besides size."""

    name: str
    points: tuple[Point, ...]
    baselines: dict[str, Point]
    warnings: tuple[str, ...]


def result_file(source: Path) -> Path:
    """Return the result.json of a sweep's folder; a file is returned as it is."""
    return source / JSON_FILE if os.path.isdir(source) else source


def read_families(sources: Sequence[Path], variants: Sequence[str] = ()) -> list[Family]:
    """Read results of sweeps, or only of these variants, named with or without the values of the grid.

    Raises:
        UserError: A file is not a result, a variant does not exist, or points of a family cannot be compared.
    """
    points = [p for file in dict.fromkeys(result_file(source).resolve() for source in sources) for p in _read(file)]
    compared = {(p.block, p.compared_with) for p in points}
    baselines = {p.block: p for p in points if (p.block, p.name) in compared}
    known = {name for p in points for name in (p.name, p.variant)}
    for name in variants:
        if name not in known:
            raise UserError(f"--variant {name}: has no finished run; choose from: {', '.join(sorted(known))}")
    families: dict[tuple[Any, ...], list[Point]] = {}
    for p in points:
        if p.settings["model.ffn"] == "pool" and (not variants or {p.name, p.variant} & set(variants)):
            families.setdefault(_method(p), []).append(p)
    return [_family(members, baselines) for members in families.values()]


def _read(file: Path) -> Iterator[Point]:
    for v in read_result(file).variants:
        if missing := [key for key in SETTINGS if key not in v.settings]:
            raise UserError(
                f"{file}: it is of an older version, without the setting {missing[0]}; "
                f"make it with: unipool sweep {file.parent} --report"
            )
        if diverged := [seed for seed, loss in v.losses.items() if not math.isfinite(loss)]:
            raise UserError(f"{file}: the validation loss of {v.name} seed {diverged[0]} is not finite")
        if v.runs:
            yield Point(**vars(v), block=f"{file}: {v.compared_with or v.name}")


def _method(p: Point) -> tuple[Any, ...]:
    """Return what all points of a family share: how experts are shared, the router, the kinds of balance loss."""
    s, groups = p.settings, p.settings["model.groups"]
    sharing = "private" if groups == p.layers else groups
    kinds = ("router.kind", "router.constant_factor", "balance.scores", "balance.scope", "balance.delay")
    return (sharing, *(s[key] for key in kinds), *(s[key] > 0 for key in ("balance.layer", "balance.pool")))


def _family(points: Sequence[Point], all_baselines: dict[str, Point]) -> Family:
    baselines = {p.block: all_baselines[p.block] for p in points if p.block in all_baselines}
    name = ", ".join(dict.fromkeys(p.variant for p in points))
    for key in _COMPARABLE:
        values = dict.fromkeys((vars(p) | p.settings)[key] for p in (*points, *baselines.values()))
        if len(values) > 1:
            raise UserError(
                f"{name}: {key} differs ({', '.join(map(str, values))}); a law of size needs it to be equal: choose "
                "other results, or variants with --variant"
            )
    first: dict[tuple[Any, ...], Point] = {}
    for p in points:
        size = (p.block, p.experts, p.expert_parameters, p.layers, p.parameters["active"])
        if (other := first.setdefault(size, p)) is not p:
            differing = ", ".join(key for key in _SCALED if p.settings[key] != other.settings[key])
            raise UserError(
                f"{name}: {other.name} and {p.name} have the same size and differ in {differing or 'another setting'}; "
                "choose one with --variant"
            )
    warnings = []
    for key in _SCALED:
        values = dict.fromkeys(p.settings[key] for p in points)
        if len(values) > 1:
            warnings.append(f"{key} differs between sizes ({', '.join(f'{value:g}' for value in values)})")
    return Family(name, tuple(points), baselines, tuple(warnings))
