"""Recipes: what a run is, checked before anything starts.

A recipe is a YAML file with the sections of `sections` and `job_sections`. `load_recipe` reads it, applies `--set`
overrides, checks every key and the constraints between keys, and returns a frozen `Recipe`. Whatever is wrong is a
one-line `UserError` that names the key, its value and what is allowed. Nothing here imports torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError, model_validator

from pool.topology import Topology
from trainer.common.credentials import redacted
from trainer.common.errors import UserError, breaks_lines, known_names
from trainer.common.safe_read import NotYaml, Unreadable, parse_yaml, read_text, texts_of
from trainer.config.constraints import check_constraints
from trainer.config.job_sections import Checkpoint, Eval, Metrics, Parallel, Probe, Profile, Roles, Tasks
from trainer.config.key_errors import first_line
from trainer.config.sections import Balance, Data, Lock, Model, Pool, Router, Run, Section, Train

_LEAST_STASH = 2**30
_STASHED_ROWS = 2048  # of every expert
_REMOVED = {("train", "pool_lr_factor"): 1}  # keys that older runs have, with the value that changed nothing


class Recipe(Section):
    """All that defines a run."""

    run: Run
    model: Model
    router: Router = Router()
    pool: Pool = Pool()
    balance: Balance = Balance()
    lock: Lock | None = None
    train: Train
    data: Data
    parallel: Parallel = Parallel()
    topology: Roles = Roles()
    eval: Eval = Eval()
    tasks: Tasks | None = None
    probe: Probe = Probe()
    profile: Profile = Profile()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()

    @property
    def experts_per_layer(self) -> int:
        """Experts that the router of a layer chooses from: M / G."""
        return self.pool.experts // self.model.groups

    @property
    def grid(self) -> Topology:
        """The grid of the job's ranks."""
        p = self.parallel
        if p.layout == "every_rank":
            return Topology(p.trunk_ranks, p.trunk_ranks, p.expert_parallel or p.trunk_ranks, every_rank=True)
        return Topology(p.trunk_ranks, p.pool_ranks, p.expert_parallel or max(1, p.pool_ranks))

    @property
    def stash_limit(self) -> int:
        """Most bytes of deferred weight-gradient work on a rank.

        In bf16 a batch of it becomes one product per expert, which is added to the gradient in fp32. Beside 2048 rows
        of each expert the addition takes a GPU about a sixth of the products' time. In fp32 there is nothing to save.
        """
        if self.pool.stash_bytes is not None:
            return self.pool.stash_bytes
        if self.train.precision == "fp32":
            return _LEAST_STASH
        row_bytes = 2 * (2 * self.model.hidden + 3 * self.model.ffn_hidden)  # x, dy, dH, the activation
        return max(_LEAST_STASH, _STASHED_ROWS * self.pool.experts // self.grid.expert_parallel * row_bytes)

    @property
    def probed_layers(self) -> tuple[int, ...]:
        """Layers that get random experts in a probe: `probe.layers`, or the deep half."""
        layers = self.model.layers
        return self.probe.layers or tuple(range((layers + 1) // 2, layers))

    @property
    def micro_batches(self) -> int:
        """Micro-batches per trunk rank and optimizer step."""
        return self.train.global_batch // (self.train.micro_batch * self.parallel.trunk_ranks)

    def changed(self, section: str, **keys: object) -> Recipe:
        """Return the recipe with other values of keys of a section, which nothing checks."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=keys)})

    @model_validator(mode="after")
    def _constraints(self) -> Self:
        check_constraints(self)
        return self


def recipe_names() -> list[str]:
    """Names of the recipes that come with the trainer."""
    folder = resources.files("trainer.config") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def headline(name: str) -> str:
    """Return the first comment of a recipe that comes with the trainer."""
    text = (resources.files("trainer.config") / "recipes" / f"{name}.yaml").read_text()
    return text.partition("\n")[0].removeprefix("# ")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or from a file, apply `key.path=value` overrides, and check it.

    Raises:
        UserError: The recipe does not exist, is not YAML, contains a credential, or has a wrong key or value.
    """
    tree = read_tree(name_or_path)
    return check_recipe(tree, [parse_override(text) for text in overrides], f"recipe {name_or_path}")


def check_recipe(tree: dict[str, Any], settings: Sequence[tuple[str, Any]], what: str) -> Recipe:
    """Apply settings to a copy of a recipe's sections, and check the result.

    Args:
        tree: The sections, as read from YAML; left unchanged.
        settings: Pairs of a key such as "train.steps" and its value.
        what: Beginning of the error messages.

    Raises:
        UserError: As for `load_recipe`.
    """
    tree = copy.deepcopy(tree)
    for (section, key), neutral in _REMOVED.items():
        if isinstance(tree.get(section), dict) and tree[section].get(key) == neutral:
            del tree[section][key]
    for key, value in settings:
        _put(tree, key, value, what)
    for key, text in texts_of(tree):
        if any(map(breaks_lines, text)):
            raise UserError(f"{what}: {key}: contains a control character or half of a surrogate pair; remove it")
        if redacted(text) != text:  # before any line shows a value
            raise UserError(
                f"{what}: {key}: contains a credential, which recipe.yaml, checkpoints and logs would repeat; remove "
                "it and set HF_TOKEN in the environment, or log in on the machine, to read private data from the hub"
            )
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{what}: {first_line(error, Recipe)}") from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe to a file from which `load_recipe` reads an equal one."""
    path.write_text(recipe_text(recipe))


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def read_tree(name_or_path: str) -> dict[str, Any]:
    """Read the sections of a recipe without checking them.

    Raises:
        UserError: The recipe does not exist or is not YAML.
    """
    if name_or_path in recipe_names():
        text = (resources.files("trainer.config") / "recipes" / f"{name_or_path}.yaml").read_text()
    else:
        try:
            text = read_text(Path(name_or_path))
        except Unreadable as error:
            hint = known_names(name_or_path, recipe_names())
            raise UserError(
                f"recipe {name_or_path}: neither a readable file ({error}) nor a known name; {hint}"
            ) from None
    return parse_mapping(text, f"recipe {name_or_path}", f"sections ({', '.join(Recipe.model_fields)})")


def parse_mapping(text: str, what: str, parts: str) -> dict[str, Any]:
    """Parse YAML that must be a mapping.

    Args:
        text: The YAML.
        what: Beginning of the error messages.
        parts: What the mapping consists of, for the error message.

    Raises:
        UserError: It is not YAML or not a mapping.
    """
    try:
        tree = parse_yaml(text)
    except NotYaml as error:
        raise UserError(f"{what}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what}: must be a mapping of {parts}")
    return tree


def parse_override(text: str) -> tuple[str, Any]:
    """Parse the key and the value of `--set key.path=value`.

    Raises:
        UserError: The text does not have this form.
    """
    key, separator, value = text.partition("=")
    if not separator or not all(part.strip() for part in key.split(".")):
        raise UserError(f"--set {text}: must be key=value, as in --set train.steps=100")
    try:
        return key, parse_yaml(value)
    except NotYaml as error:
        raise UserError(f"--set {text}: the value is not YAML: {error}") from None


def _put(tree: dict[str, Any], key: str, value: Any, what: str) -> None:
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        if node.get(section) is None:  # missing, or a section that the recipe switches off
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise UserError(f"{what}: {key} cannot be set: {section} is a value, not a section")
    node[leaf] = value
