"""Fine-tuning: a run that begins with the weights of an export (`train.init_from`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.errors import SharedUserError, UserError
from trainer.config.recipe import Recipe, load_recipe
from trainer.export.folder import StoredTensors, read_object
from trainer.export.names import Parts, expert_names, trunk_names

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.checkpoint.format import Role
    from trainer.engine.role_engine import Engine, ParameterState

_CONFIG = {
    "num_attention_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads",
    "rms_norm_eps": "model.norm_eps",
    "rope_theta": "model.rope_base",
    "num_expert_groups": "model.groups",
    "num_experts_per_tok": "router.top_k",
    "router": "router.kind",
    "router_constant_factor": "router.constant_factor",
}
"""Recipe's keys by their names in config.json."""
_OF_THE_POOL = {"model.groups", "router.top_k", "router.kind", "router.constant_factor"}


class ExportedWeights:
    """The tensors of an export, either format, in one file or several.

    Raises:
        SharedUserError: the folder is not an export.
    """

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._folder = folder = Path(str(recipe.train.init_from))
        self._where = f"train.init_from = {folder}"
        try:
            self._tensors = StoredTensors(folder)
        except UserError as error:
            raise SharedUserError(
                f"{self._where}: no export of this trainer ({error}); make one with `unipool export`"
            ) from None

    def check(self) -> None:
        """All tensors of the recipe's model are there, and none else, in its shapes. Reads no tensor.

        Raises:
            SharedUserError: naming the first that is not so.
        """
        experts = (expert_names(self._recipe, expert) for expert in range(self._recipe.pool.experts))
        wanted = {
            name: rows
            for names in (trunk_names(self._recipe), *experts)
            for parts in names.values()
            for name, rows in parts.items()
        }
        for name in sorted(wanted.keys() ^ self._tensors.keys()):
            has, lacks = ("the recipe", "the export") if name in wanted else ("the export", "the recipe")
            raise SharedUserError(f"{self._where}: {has} has a tensor {name}, {lacks} has not: another model")
        self._check_settings()
        for name, rows in wanted.items():
            shape = self._tensors.shapes[name]
            columns = self._recipe.model.ffn_hidden if "down_proj" in name else self._recipe.model.hidden
            if shape not in ((rows,), (rows, columns)):
                raise SharedUserError(
                    f"{self._where}: {name} has shape {list(shape)}, by the recipe it has {rows} rows: another model"
                )

    def _check_settings(self) -> None:
        """Settings that no shape tells, by config.json or recipe.yaml."""
        config = self._folder / "config.json"
        if config.is_file():
            try:
                said = read_object(config)
            except UserError as error:
                raise SharedUserError(f"{self._where}: {error}") from None
            saved = {key: said[name] for name, key in _CONFIG.items() if name in said}
        else:
            recipe = load_recipe(str(self._folder / "recipe.yaml"))
            saved = {key: _value(recipe, key) for key in _CONFIG.values()}
        for key, value in saved.items():
            own = _value(self._recipe, key)
            if own != value and (self._recipe.model.ffn == "pool" or key not in _OF_THE_POOL):
                raise SharedUserError(f"{self._where}: has {key} = {value}, the recipe {own}: another model")

    def read(self, parts: Parts) -> Tensor:
        """A tensor of the trainer's from its exported parts, fp32."""
        import torch

        found = [self._tensors[name].float() for name in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def take_over(self, name: str, engine: Engine) -> None:
        """Give role `name` ("trunk" or "pool/shard_N") the export's weights; moments are zeros."""
        import torch

        if name == "trunk":
            names = trunk_names(self._recipe)
            buffers = {n: self.read(names[n]) for n, _ in engine.module.named_buffers()}
            engine.load_resharded(lambda weight: _fresh(self.read(names[weight])), buffers, 0)
            return
        ids: Iterable[int] = engine.module.expert_ids  # type: ignore[assignment]

        def stacked(weight: str) -> ParameterState:
            return _fresh(torch.stack([self.read(expert_names(self._recipe, expert)[weight]) for expert in ids]))

        engine.load_resharded(stacked, {}, 0)


def _value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _fresh(weight: Tensor) -> ParameterState:
    import torch

    from trainer.engine.role_engine import ParameterState

    return ParameterState(weight, torch.zeros_like(weight), torch.zeros_like(weight))


def load_initial(recipe: Recipe, role: Role) -> None:
    """Begin with the weights that the recipe names. Called by all ranks."""
    weights = ExportedWeights(recipe)
    weights.check()
    for name, engine in role.engines.items():
        weights.take_over(name, engine)
