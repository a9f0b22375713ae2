"""The file of a sweep: a base recipe, variants of it, axes that multiply, and seeds; all of it is checked before use.

Recipe keys are written with dots, as after `--set`. The settings of a variant override those of the sweep, which
override the base; a variant that sets the key of an axis itself is not multiplied by that axis. Several keys with
commas between them are one axis, whose values are lists. Nothing here imports torch.

What two variants with the same seed share follows from how the trainer draws: the sequences of a step by seed and
number of rows, trunk weights by seed and name, experts by seed and number in the pool.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError, known_names
from trainer.common.safe_read import Unreadable, read_text
from trainer.config.constraints import show
from trainer.config.key_errors import first_line
from trainer.config.recipe import Recipe, check_recipe, parse_mapping, parse_override, read_tree
from trainer.config.sections import Data, NonNegative, Section

SWEEP_FILE = "sweep.yaml"
SWEEPS_FOLDER = "runs/sweeps"

BASE = "base"
"""Key of a variant that is not a recipe key: a base of its own."""

_SHIPPED = resources.files("trainer.sweep") / "sweeps"
_OURS = ("run.dir", "run.seed")
_CLASHING = ("metrics.targets_dir",)
_SAME_FILES = "not allowed in a sweep, since its runs would write the same files"
_PAIRING = ("model.vocab", "model.seq_len", "train.global_batch", "eval.batches")
"""Keys besides `data` that determine the sequences of a step and of an evaluation."""

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
    dir: str | None = Field(None, description=f"folder for the runs and the result; default: {SWEEPS_FOLDER}/NAME")
    base: Base = Field(description="recipe: its name, its file, or its sections")
    set: Settings = Field({}, description="recipe keys of every run, as after --set")
    variants: Annotated[dict[str, Settings], Field(min_length=1)] = Field(
        description="name: {key: value}; the key `base` gives another recipe to start from"
    )
    baseline: str = Field(description="variant that the others are compared with")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="key: [values] to multiply the variants by; several keys: key, key: [[values], ...]"
    )
    seeds: Annotated[list[NonNegative], Field(min_length=1)] = Field(
        [0, 1, 2], description="values of run.seed, one run each"
    )
    picture: Picture = Field(default_factory=Picture, description="how pictures show the result")

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.baseline not in self.variants:
            raise ValueError(f"baseline = {show(self.baseline)}: must be a variant ({', '.join(self.variants)})")
        shown = {
            "highlight": [self.picture.highlight] if self.picture.highlight else [],
            "reference": self.picture.reference,
        }
        for key, names in shown.items():
            for name in names:
                if name not in self.variants:
                    raise ValueError(f"picture.{key} = {show(name)}: must be a variant ({', '.join(self.variants)})")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds}: must be different")
        for name in self.variants:
            if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
                raise ValueError(
                    f"variants.{name}: the name becomes a folder and may only have letters, digits and _ . + -"
                )
        gridded = axis_keys(self.grid)
        for where, keys in {"set": list(self.set), "grid": gridded, **_by_variant(self.variants)}.items():
            _check_keys(where, keys)
        if len(set(gridded)) < len(gridded):
            raise ValueError(f"grid = {show(list(self.grid))}: a key appears twice")
        for axis, values in self.grid.items():
            keys = axis_keys([axis])
            if len(keys) > 1 and any(not isinstance(value, list) or len(value) != len(keys) for value in values):
                raise ValueError(f"grid.{axis} = {show(values)}: each value must be a list of {len(keys)}, one per key")
            if any(value in values[:place] for place, value in enumerate(values)):
                raise ValueError(f"grid.{axis} = {show(values)}: a value appears twice")
        return self

    def points(self, variant: str) -> Iterator[Settings]:
        """Return the points of the axes that multiply a variant: those without a key that it sets itself."""
        axes = []
        for axis, values in self.grid.items():
            keys = axis_keys([axis])
            if not set(keys) & self.variants[variant].keys():
                axes.append([dict(zip(keys, value if len(keys) > 1 else [value], strict=True)) for value in values])
        for settings in itertools.product(*axes):
            yield {key: value for part in settings for key, value in part.items()}


def axis_keys(axes: Iterable[str]) -> list[str]:
    """Return the keys of all axes of a grid."""
    return [key.strip() for axis in axes for key in axis.split(",")]


def _by_variant(variants: Mapping[str, Settings]) -> dict[str, list[str]]:
    return {f"variants.{name}": [key for key in settings if key != BASE] for name, settings in variants.items()}


def _check_keys(where: str, keys: Iterable[str]) -> None:
    for key in keys:
        if key in _OURS:
            raise ValueError(f"{where}.{key}: the sweep sets it itself; use dir or seeds")
        if key in _CLASHING:
            raise ValueError(f"{where}.{key}: {_SAME_FILES}")
        if "." not in key:
            raise ValueError(f"{where}.{key}: must be a recipe key with its section, such as train.steps")


@dataclass(frozen=True)
class Run:
    """One training run, in the folder that its recipe names."""

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
        """File that `train` is started with."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class Cell:
    """A variant at one point of the grid.

    Attributes:
        name: Name of the variant with the values of the point.
        point: Values of the axes that multiply this variant.
        baseline: Name of the cell that it is compared with; None for the baseline, and if this point has none.
        runs: One for each seed.
    """

    name: str
    variant: str
    point: Settings
    baseline: str | None
    runs: tuple[Run, ...]

    @property
    def recipe(self) -> Recipe:
        """The recipe of the first seed."""
        return self.runs[0].recipe


@dataclass(frozen=True)
class Experiment:
    """A sweep whose recipes are all valid.

    Attributes:
        sweep: Contents of its file, with all bases as sections, so that no other file is needed.
        folder: Folder for the runs and the result.
    """

    sweep: Sweep
    name: str
    folder: Path
    cells: tuple[Cell, ...]

    @property
    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that an interrupted sweep has compared everything once."""
        return [run for runs in zip(*(cell.runs for cell in self.cells), strict=True) for run in runs]

    def save(self) -> None:
        """Write the sweep into its folder, so that `sweep FOLDER` resumes it."""
        text = yaml.safe_dump(self.sweep.model_dump(mode="json", exclude={"dir"}), sort_keys=False)
        atomic_write(self.folder / SWEEP_FILE, lambda path: path.write_text(text))

    def warnings(self) -> Iterator[str]:
        """Say which variants do not share their data with the baseline although the seed is the same."""
        cells = {cell.name: cell for cell in self.cells}
        for cell in self.cells:
            if cell.baseline is None:
                continue
            own, other = cell.recipe, cells[cell.baseline].recipe
            keys = [f"data.{key}" for key in Data.model_fields if key != "dir"]
            if differing := [key for key in (*keys, *_PAIRING) if attrgetter(key)(own) != attrgetter(key)(other)]:
                yield (
                    f"{cell.name}: {', '.join(differing)} differs from {cell.baseline}; the two see different "
                    "sequences, so they are not paired by seed"
                )


def sweep_names() -> list[str]:
    """Return the names of the sweeps that come with the trainer."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def headline(name: str) -> str:
    """Return the first comment of a sweep that comes with the trainer."""
    return (_SHIPPED / f"{name}.yaml").read_text().splitlines()[0].removeprefix("# ")


def load_sweep(source: str, overrides: Sequence[str] = (), folder: Path | None = None) -> Experiment:
    """Read a sweep and check all its recipes.

    Args:
        source: Name of the sweep, its file, or its folder.
        overrides: `key.path=value` for every run; overrides `set` in the file, but no key of an axis or a variant.
        folder: Folder to use instead of `dir` in the file.

    Raises:
        UserError: The sweep does not exist, or a key of it or of one of its recipes is wrong.
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
    for owner, keys in {"grid": axis_keys(sweep.grid), **_by_variant(sweep.variants)}.items():
        if hidden := [key for key in keys if key in given]:
            raise UserError(f"{what}: --set {hidden[0]}: {owner} sets this key; change it in a copy of the file")
    folder = folder or Path(sweep.dir or f"{SWEEPS_FOLDER}/{name}")
    closed = {
        name: settings | ({BASE: _sections(settings[BASE], what)} if BASE in settings else {})
        for name, settings in sweep.variants.items()
    }
    changes = {"set": sweep.set | given, "base": _sections(sweep.base, what), "variants": closed, "dir": None}
    sweep = sweep.model_copy(update=changes)
    return Experiment(sweep, name, folder, tuple(_cells(sweep, folder, what)))


def _read(source: str) -> tuple[str, str]:
    """Text and name."""
    path = Path(source)
    if source in sweep_names():
        return (_SHIPPED / f"{source}.yaml").read_text(), source
    file = path / SWEEP_FILE if os.path.isdir(path) else path
    try:
        return read_text(file), path.resolve().stem if file is path else path.resolve().name
    except Unreadable as error:
        hint = known_names(source, sweep_names())
        raise UserError(
            f"sweep {source}: neither a readable file ({error}), nor a folder with {SWEEP_FILE}, nor the name of a "
            f"sweep; {hint}"
        ) from None


def _sections(base: Any, what: str) -> dict[str, Any]:
    if isinstance(base, str):
        return read_tree(base)
    if not isinstance(base, dict):
        raise UserError(f"{what}: base = {show(base)}: must be the name of a recipe, its file, or its sections")
    return base


def _cells(sweep: Sweep, folder: Path, what: str) -> Iterator[Cell]:
    names: list[str] = []
    for variant, settings in sweep.variants.items():
        base = settings.get(BASE, sweep.base)
        own = {key: value for key, value in settings.items() if key != BASE}
        for point in sweep.points(variant):
            name = _cell_name(variant, point)
            if name in names:
                raise UserError(f"{what}: two variants have the name {name}; rename one of them")
            names.append(name)
            keys = sweep.set | own | point
            runs = []
            for seed in sweep.seeds:
                ours = {"run.dir": str(folder / name / f"seed_{seed}"), "run.seed": seed}
                recipe = check_recipe(base, list((keys | ours).items()), f"{what}, variant {name}")
                if recipe.metrics.targets_dir:
                    raise UserError(f"{what}, variant {name}: metrics.targets_dir: {_SAME_FILES}")
                runs.append(Run(name, seed, recipe))
            yield Cell(name, variant, point, _baseline_of(sweep, variant, own | point), tuple(runs))


def _baseline_of(sweep: Sweep, variant: str, keys: Settings) -> str | None:
    """Return the name of the baseline's cell at the same point of the axes that multiply it."""
    points = [] if variant == sweep.baseline else sweep.points(sweep.baseline)
    return next((_cell_name(sweep.baseline, p) for p in points if p.items() <= keys.items()), None)


def _cell_name(variant: str, point: Settings) -> str:
    """Make a name for people and for a folder, such as `unipool,pool.experts=64`."""
    return ",".join([variant, *(f"{key}={re.sub(r'[^A-Za-z0-9_.+-]+', '-', str(v))}" for key, v in point.items())])
