"""A sweep's file: a base recipe, variants of it, axes that multiply, seeds; checked once at the door.

Keys of a recipe are written with dots, as behind `--set`. A variant's settings go over the sweep's own, which go over
its base; a variant that sets the key of an axis itself is not multiplied by that axis. Several keys with commas between
them are one axis, whose values are lists. Nothing here imports torch.

What is matched between two variants of one seed, because `trainer` draws it so:
- the sequences of every step and their order: from (seed, rows of the prepared data), so for equal `data`,
  `model.vocab`, `model.seq_len` and `train.global_batch`; and the held-out ones, with equal `eval.batches` too;
- every weight of the trunk: from (seed, name). A router has the same weights wherever it sees as many experts;
- every expert: from (seed, number in the pool), so that a smaller pool begins as the first part of a larger one, and
  vanilla's experts are those of a pool of the same M. `model.layers` and `model.init_std` scale what is drawn.
It cannot be with routers of another number of experts, nor with a dense model's FFNs, which are no experts.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.safe_read import Unreadable, read_text
from trainer.config.constraints import show
from trainer.config.key_errors import first_line
from trainer.config.recipe import Recipe, check_recipe, parse_mapping, parse_override, read_tree
from trainer.config.sections import Data, NonNegative, Section

SWEEP_FILE = "sweep.yaml"
SWEEPS_FOLDER = "runs/sweeps"

BASE = "base"
"""Key of a variant that is no recipe's key: a base of its own."""

_OURS = ("run.dir", "run.seed")
_CLASHING = ("metrics.targets_dir",)
_PAIRING = ("model.vocab", "model.seq_len", "train.global_batch", "eval.batches")
"""Keys besides `data` that decide which sequences a step and an evaluation have."""

Base = str | dict[str, Any]
Settings = dict[str, Any]


class Picture(Section):
    labels: dict[str, str] = Field({}, description="names that pictures give to variants and to keys of the grid")
    highlight: str | None = Field(None, description="variant to show beside the baseline; default: the best one")
    reference: dict[str, float] = Field(
        {}, description="known differences to the baseline, in nats per token, by variant: drawn beside the measured"
    )
    reference_name: str = Field("reference", description="what the legend calls the known differences")


class Sweep(Section):
    dir: str | None = Field(None, description=f"folder of the runs and the result; default: {SWEEPS_FOLDER}/NAME")
    base: Base = Field(description="a recipe: its name, its file, or its sections")
    set: Settings = Field({}, description="keys of every run, as behind --set")
    variants: Annotated[dict[str, Settings], Field(min_length=1)] = Field(
        description="name: {key: value}; `base` among the keys: another recipe to begin with"
    )
    baseline: str = Field(description="the variant that the others are compared with")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="key: [values], which multiply; or key, key: [[values], ...]"
    )
    seeds: Annotated[list[NonNegative], Field(min_length=1)] = Field([0, 1, 2], description="run.seed of the runs")
    picture: Picture = Field(default_factory=Picture, description="how pictures show the result")

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.baseline not in self.variants:
            raise ValueError(f"baseline = {show(self.baseline)}: must be a variant ({', '.join(self.variants)})")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds}: one is there twice")
        for name in self.variants:
            if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
                raise ValueError(f"variants.{name}: the name is a folder's: letters, digits, _ . + - only")
        for where, keys in {"set": list(self.set), "grid": self.axis_keys, **_by_variant(self.variants)}.items():
            _check_keys(where, keys)
        if len(set(self.axis_keys)) < len(self.axis_keys):
            raise ValueError(f"grid = {show(list(self.grid))}: one key is there twice")
        for axis, values in self.grid.items():
            keys = keys_of_axis(axis)
            if len(keys) > 1 and any(not isinstance(value, list) or len(value) != len(keys) for value in values):
                raise ValueError(f"grid.{axis} = {show(values)}: each must be a list of {len(keys)}, a value a key")
            if any(value in values[:place] for place, value in enumerate(values)):
                raise ValueError(f"grid.{axis} = {show(values)}: one value is there twice")
        return self

    @property
    def axis_keys(self) -> list[str]:
        """Keys of all axes."""
        return [key for axis in self.grid for key in keys_of_axis(axis)]

    def points(self, variant: str) -> Iterator[Settings]:
        """The points of the axes that multiply a variant: those with no key that it sets itself."""
        axes = []
        for axis, values in self.grid.items():
            keys = keys_of_axis(axis)
            if not set(keys) & self.variants[variant].keys():
                axes.append([dict(zip(keys, value if len(keys) > 1 else [value], strict=True)) for value in values])
        for settings in itertools.product(*axes):
            yield {key: value for part in settings for key, value in part.items()}


def keys_of_axis(axis: str) -> list[str]:
    return [key.strip() for key in axis.split(",")]


def _by_variant(variants: Mapping[str, Settings]) -> dict[str, list[str]]:
    return {f"variants.{name}": [key for key in settings if key != BASE] for name, settings in variants.items()}


def _check_keys(where: str, keys: Iterable[str]) -> None:
    for key in keys:
        if key in _OURS:
            raise ValueError(f"{where}.{key}: the sweep sets it itself (dir, seeds)")
        if key in _CLASHING:
            raise ValueError(f"{where}.{key}: not in a sweep: its runs would write the same files")
        if "." not in key:
            raise ValueError(f"{where}.{key}: must be a recipe's key with its section, as train.steps")


@dataclass(frozen=True)
class Run:
    """One training run; its folder is the recipe's."""

    variant: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.variant} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run.dir)

    @property
    def recipe_file(self) -> Path:
        """What `train` is started with."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class Cell:
    """A variant at one point of the grid.

    Attributes:
        name: the variant's, with the point's values.
        variant: the variant's.
        point: values of the axes that multiply this variant.
        baseline: name of the cell it is compared with; None for the baseline, and where there is none at this point.
        runs: one a seed.
    """

    name: str
    variant: str
    point: Settings
    baseline: str | None
    runs: tuple[Run, ...]

    @property
    def recipe(self) -> Recipe:
        """Of the first seed."""
        return self.runs[0].recipe


@dataclass(frozen=True)
class Experiment:
    """A checked sweep: every recipe of it is valid.

    Attributes:
        sweep: with its bases as sections, so that it needs no other file.
        name: of its file.
        folder: where runs and result are.
    """

    sweep: Sweep
    name: str
    folder: Path
    cells: tuple[Cell, ...]

    @property
    def runs(self) -> list[Run]:
        """Seed by seed, so that a sweep that is stopped has compared everything once."""
        return [run for runs in zip(*(cell.runs for cell in self.cells), strict=True) for run in runs]

    def save(self) -> None:
        """Write the sweep into its folder, from where it goes on as `sweep FOLDER`."""
        text = yaml.safe_dump(self.sweep.model_dump(mode="json", exclude={"dir"}), sort_keys=False)
        atomic_write(self.folder / SWEEP_FILE, lambda path: path.write_text(text))

    def warnings(self) -> Iterator[str]:
        """What of a variant and its baseline cannot be matched though the seed is the same."""
        cells = {cell.name: cell for cell in self.cells}
        for cell in self.cells:
            if cell.baseline is None:
                continue
            own, other = cell.recipe, cells[cell.baseline].recipe
            keys = [f"data.{key}" for key in Data.model_fields if key != "dir"]
            if differing := [key for key in (*keys, *_PAIRING) if _value(own, key) != _value(other, key)]:
                yield (
                    f"{cell.name}: {', '.join(differing)} not as {cell.baseline}'s: other sequences in a step or an "
                    "evaluation, so that a seed does not pair the two"
                )


def sweep_names() -> list[str]:
    """Names of the sweeps that come with the trainer."""
    folder = resources.files("trainer.sweep") / "sweeps"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def headline(name: str) -> str:
    """The first comment of a sweep that comes with the trainer."""
    text = (resources.files("trainer.sweep") / "sweeps" / f"{name}.yaml").read_text()
    return text.splitlines()[0].removeprefix("# ")


def load_sweep(source: str, overrides: Sequence[str] = (), folder: Path | None = None) -> Experiment:
    """Read a sweep by name, from a file, or from the folder it has run in, and check every recipe of it.

    Args:
        overrides: `key.path=value` for every run, over the file's own `set`; no key of an axis or of a variant.
        folder: instead of the file's own `dir`.
    Raises:
        UserError: the sweep is not there, a key of it or one of its recipes is wrong.
    """
    text, name = _read(source)
    if os.path.isdir(source):
        folder = folder or Path(source)
    what = f"sweep {source}"
    try:
        sweep = Sweep.model_validate(parse_mapping(text, what, f"keys ({', '.join(Sweep.model_fields)})"))
        given = dict(parse_override(text) for text in overrides)
        _check_keys("--set", given)
    except ValidationError as error:
        raise UserError(f"{what}: {first_line(error, Sweep)}") from None
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None
    for owner, keys in {"grid": sweep.axis_keys, **_by_variant(sweep.variants)}.items():
        if hidden := [key for key in keys if key in given]:
            raise UserError(f"{what}: --set {hidden[0]}: {owner} sets it; change that in a copy of the file")
    changed = sweep.set | given
    folder = folder or Path(sweep.dir or f"{SWEEPS_FOLDER}/{name}")
    sweep = sweep.model_copy(update={"set": changed, "base": _sections(sweep.base, what), "dir": None})
    sweep = sweep.model_copy(update={"variants": {key: _closed(v, what) for key, v in sweep.variants.items()}})
    return Experiment(sweep, name, folder, tuple(_cells(sweep, folder, what)))


def _read(source: str) -> tuple[str, str]:
    """Text and name."""
    path = Path(source)
    if source in sweep_names():
        return (resources.files("trainer.sweep") / "sweeps" / f"{source}.yaml").read_text(), source
    file = path / SWEEP_FILE if os.path.isdir(path) else path
    try:
        return read_text(file), path.resolve().stem if file is path else path.resolve().name
    except Unreadable as error:
        known = sweep_names()
        close = difflib.get_close_matches(source, known, n=3) or known
        raise UserError(
            f"sweep {source}: neither a readable file ({error}), nor a sweep's folder (with {SWEEP_FILE}), nor a known "
            f"name; did you mean: {', '.join(close)}"
        ) from None


def _sections(base: Any, what: str) -> dict[str, Any]:
    if isinstance(base, str):
        return read_tree(base)
    if not isinstance(base, dict):
        raise UserError(f"{what}: base = {show(base)}: must be a recipe's name, its file, or its sections")
    return base


def _closed(settings: Settings, what: str) -> Settings:
    """A variant that needs no other file."""
    return settings | ({BASE: _sections(settings[BASE], what)} if BASE in settings else {})


def _cells(sweep: Sweep, folder: Path, what: str) -> Iterator[Cell]:
    points = {name: list(sweep.points(name)) for name in sweep.variants}
    names: list[str] = []
    for variant, settings in sweep.variants.items():
        base = settings.get(BASE, sweep.base)
        own = {key: value for key, value in settings.items() if key != BASE}
        for point in points[variant]:
            name = _cell_name(variant, point)
            if name in names:
                raise UserError(f"{what}: two variants have the name {name}; rename one")
            names.append(name)
            keys = list({**sweep.set, **own, **point}.items())
            runs = []
            for seed in sweep.seeds:
                ours = [("run.dir", str(folder / name / f"seed_{seed}")), ("run.seed", seed)]
                recipe = check_recipe(base, [*keys, *ours], f"{what}, variant {name}")
                if recipe.metrics.targets_dir:
                    raise UserError(f"{what}, variant {name}: metrics.targets_dir: its runs would write the same files")
                runs.append(Run(name, seed, recipe))
            yield Cell(name, variant, point, _baseline_of(sweep, points, variant, own | point), tuple(runs))


def _baseline_of(sweep: Sweep, points: Mapping[str, list[Settings]], variant: str, keys: Settings) -> str | None:
    """The baseline's cell at the same point of the axes that multiply it."""
    if variant == sweep.baseline:
        return None
    for point in points[sweep.baseline]:
        if all(key in keys and keys[key] == value for key, value in point.items()):
            return _cell_name(sweep.baseline, point)
    return None


def _cell_name(variant: str, point: Settings) -> str:
    """A name for people and for a folder: `unipool,pool.experts=64`."""
    values = [f"{key}={re.sub(r'[^A-Za-z0-9_.+-]+', '-', str(value))}" for key, value in point.items()]
    return ",".join([variant, *values])


def _value(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)
