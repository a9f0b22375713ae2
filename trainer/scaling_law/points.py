"""What a law is fitted to: from the result.json of sweeps to families of points that differ in size only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.common.errors import UserError
from trainer.common.safe_read import Unreadable, read_text
from trainer.common.strict_json import loads
from trainer.sweep.result import JSON_FILE, SETTINGS

_COMPARABLE = ("tokens", "data.source", "data.tokenizer", "model.vocab", "model.seq_len")
"""Must be equal: a loss says nothing beside one of other text or another length of training."""
_SCALED = ("balance.layer", "balance.pool", "train.lr")
"""May be another at another size, as in the paper; said if so."""

LARGEST = 2**28
"""Bytes of a result at most: it has the curves of all runs."""


@dataclass(frozen=True)
class Point:
    """A variant's runs.

    Attributes:
        block: the result it is of, and its baseline there.
        experts: of the whole pool, M.
        expert_parameters: of one expert.
        layers: depth, L.
        active: parameters on a token's way.
        losses: validation loss by seed, nats a token.
        settings: what of its recipe is no size, by key.
    """

    name: str
    variant: str
    block: str
    experts: int
    expert_parameters: int
    layers: int
    active: int
    tokens: int
    losses: dict[int, float]
    settings: dict[str, Any]

    @property
    def mean(self) -> float:
        """Validation loss."""
        return sum(self.losses.values()) / len(self.losses)


@dataclass(frozen=True)
class Family:
    """Points of one method.

    Attributes:
        name: of its variants.
        baselines: by block, where it has one.
        warnings: what besides size is not equal.
    """

    name: str
    points: tuple[Point, ...]
    baselines: dict[str, Point]
    warnings: tuple[str, ...]


def result_file(source: Path) -> Path:
    """The result.json of a sweep's folder; a file is itself."""
    return source / JSON_FILE if os.path.isdir(source) else source


def read_families(sources: Sequence[Path], variants: Sequence[str] = ()) -> list[Family]:
    """Read results of sweeps; those of one method are a family.

    Args:
        sources: files or folders.
        variants: take only these, by the name of the variant or of the cell.
    Raises:
        UserError: a file is none, a variant is not there, or points of a family are not comparable.
    """
    blocks: dict[str, Point] = {}
    found: list[Point] = []
    for file in dict.fromkeys(result_file(source).resolve() for source in sources):
        points, baselines = _read(file)
        found += points
        blocks |= baselines
    chosen = [point for point in found if not variants or {point.name, point.variant} & set(variants)]
    known = {name for point in found for name in (point.name, point.variant)}
    for name in variants:
        if name not in known:
            raise UserError(f"--variant {name}: has no run that is done; there are: {', '.join(sorted(known))}")
    families: dict[tuple[Any, ...], list[Point]] = {}
    for point in chosen:
        if point.settings["model.ffn"] == "pool":
            families.setdefault(_method(point), []).append(point)
    return [_family(points, blocks) for points in families.values()]


def _read(file: Path) -> tuple[list[Point], dict[str, Point]]:
    """The points of a result, and its baselines by block."""
    again = f"make it with: unipool sweep {file.parent} --report"
    try:
        variants = loads(read_text(file, LARGEST))["variants"]
        points = {v["name"]: _point(v, f"{file}: {v['compared_with'] or v['name']}") for v in variants if v["runs"]}
    except Unreadable as error:
        raise UserError(f"{file}: cannot be read ({error}); {again}") from None
    except ValueError:
        raise UserError(f"{file}: not JSON; {again}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: not a sweep's result, or one of an older version; {again}") from None
    compared = {point.block: v["compared_with"] for v in variants if (point := points.get(v["name"]))}
    return list(points.values()), {block: points[name] for block, name in compared.items() if name in points}


def _point(variant: dict[str, Any], block: str) -> Point:
    settings = dict(variant["settings"])
    _ = [settings[key] for key in SETTINGS]  # a file that lacks one is told here
    if diverged := [run["seed"] for run in variant["runs"] if run["val_loss"] is None]:
        raise UserError(f"{block}: {variant['name']} seed {diverged[0]}: its validation loss is not finite")
    return Point(
        variant["name"],
        variant["variant"],
        block,
        experts=variant["experts"],
        expert_parameters=3 * variant["hidden"] * settings["model.ffn_hidden"],
        layers=variant["layers"],
        active=variant["parameters"]["active"],
        tokens=variant["tokens"],
        losses={run["seed"]: run["val_loss"] for run in variant["runs"]},
        settings=settings,
    )


def _method(point: Point) -> tuple[Any, ...]:
    """What two points of a family have in common: sharing, router and the kinds of balance loss."""
    s, groups = point.settings, point.settings["model.groups"]
    sharing = "a layer each" if groups == point.layers else groups
    losses = [s[key] > 0 for key in ("balance.layer", "balance.pool")]
    router = (s["router.kind"], s["router.constant_factor"])
    return (sharing, *router, s["balance.scores"], s["balance.scope"], s["balance.delay"], *losses)


def _family(points: Sequence[Point], blocks: dict[str, Point]) -> Family:
    baselines = {point.block: blocks[point.block] for point in points if point.block in blocks}
    name = ", ".join(dict.fromkeys(point.variant for point in points))
    for key in _COMPARABLE:
        values = list(dict.fromkeys(_of(point, key) for point in (*points, *baselines.values())))
        if len(values) > 1:
            what = "tokens trained" if key == "tokens" else key
            raise UserError(
                f"{name}: {what} differ ({', '.join(map(str, values))}): a law of sizes needs them equal; choose "
                "other results, or variants with --variant"
            )
    return Family(name, tuple(points), baselines, tuple(_warnings(name, points)))


def _warnings(name: str, points: Sequence[Point]) -> Iterator[str]:
    first: dict[tuple[Any, ...], Point] = {}
    for point in points:
        size = (point.block, point.experts, point.expert_parameters, point.layers, point.active)
        if (other := first.setdefault(size, point)) is not point:
            differing = [key for key in _SCALED if point.settings[key] != other.settings[key]]
            raise UserError(
                f"{name}: {other.name} and {point.name} have the same size ({', '.join(differing) or 'another setting'}"
                " differs): choose one with --variant"
            )
    for key in _SCALED:
        values = list(dict.fromkeys(point.settings[key] for point in points))
        if len(values) > 1:
            yield f"{key} is not the same at all sizes ({', '.join(f'{value:g}' for value in values)})"


def _of(point: Point, key: str) -> Any:
    return point.tokens if key == "tokens" else point.settings[key]
