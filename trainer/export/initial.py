"""Fine-tuning: initialising a run with the weights of an export (`train.init_from`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.common.errors import SharedUserError, UserError
from trainer.config.lock import OWNERSHIP_FILE
from trainer.config.recipe import Recipe, load_recipe
from trainer.export.folder import StoredTensors, is_export, read_object
from trainer.export.names import CONFIG_KEYS, OPTIONAL, Parts, config_fields, expert_names, exported_shapes, trunk_names

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.checkpoint.format import Role
    from trainer.engine.parameter_state import ParameterState
    from trainer.engine.role_engine import Engine

MAY_DIFFER = {"max_position_embeddings", "initializer_range"}
"""Fields of config.json that say nothing about the weights."""

_ONLY_OF_A_POOL = {
    "private_intermediate_size",
    "num_experts",
    "num_expert_groups",
    "num_experts_per_tok",
    "router",
    "router_constant_factor",
    "private_gate",
    "norm_topk_prob",
    "router_bias",
}


@contextmanager
def _shared_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise SharedUserError(f"train.init_from = {error}") from None


class ExportedWeights:
    """The weights that a recipe's run starts from: an export of any format.

    Raises:
        SharedUserError: `train.init_from` does not name an export.
    """

    def __init__(self, recipe: Recipe):
        self._recipe, self._folder = recipe, Path(str(recipe.train.init_from))
        with _shared_errors():
            self._tensors = StoredTensors(self._folder)

    @_shared_errors()
    def check(self) -> None:
        """Check that the export is of the recipe's model, without reading any tensor.

        A run with a lock goes through its own stages, whatever the layers of the export own.

        Raises:
            SharedUserError: A setting or a tensor of the export is not the recipe's, or its layers own their experts
                and the recipe has no lock.
        """
        required = config_fields(self._recipe)
        if is_export(self._folder):
            stored = read_object(self._folder / "config.json")
            owned = stored.get("expert_owners") is not None
        else:
            stored = config_fields(load_recipe(str(self._folder / "recipe.yaml")))
            owned = (self._folder / OWNERSHIP_FILE).is_file()
        if owned and self._recipe.lock is None:
            raise UserError(
                f"{self._folder}: the layers of this model own their experts, but without a section lock each would "
                "use all of them; add one (as in --set lock.allocation=learned), which assigns the experts again"
            )
        for field, key in CONFIG_KEYS.items():
            ignored = field in MAY_DIFFER or (self._recipe.model.ffn == "dense" and field in _ONLY_OF_A_POOL)
            found = stored.get(field, OPTIONAL.get(field, required[field]))
            if not ignored and found != required[field]:
                raise UserError(
                    f"{self._folder}: {key} is {found} in the export, but {required[field]} in the recipe; "
                    "they must be the same"
                )
        self._tensors.check(exported_shapes(self._recipe), "the recipe")

    def load_into(self, role: str, engine: Engine) -> None:
        """Load the weights of role "trunk" or "pool/shard_N", with moments of zero, into its engine."""
        import torch

        if role == "trunk":
            names = trunk_names(self._recipe)
            buffers = {name: self._read(names[name]) for name, _ in engine.module.named_buffers()}
            engine.load_resharded(lambda weight: _fresh(self._read(names[weight])), buffers, 0)
            return
        ids: Iterable[int] = engine.module.expert_ids  # type: ignore[assignment]

        def stacked(stack: str) -> ParameterState:
            return _fresh(torch.stack([self._read(expert_names(self._recipe, expert)[stack]) for expert in ids]))

        engine.load_resharded(stacked, {}, 0)

    def _read(self, parts: Parts) -> Tensor:
        """Return one of the trainer's tensors (fp32), put together from its exported parts."""
        import torch

        return torch.cat([self._tensors.read(name).float() for name in parts])


def _fresh(weight: Tensor) -> ParameterState:
    import torch

    from trainer.engine.parameter_state import ParameterState

    return ParameterState(weight, torch.zeros_like(weight), torch.zeros_like(weight))


def load_initial(recipe: Recipe, role: Role) -> None:
    """Initialise a role with the weights that the recipe names. Called by all ranks."""
    weights = ExportedWeights(recipe)
    weights.check()
    for name, engine in role.engines.items():
        weights.load_into(name, engine)
