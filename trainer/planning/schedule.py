"""The schedules of a run: the same on every rank, and on every start of the run."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from pool.schedule import PoolSchedule, generation_schedule
from pool.schedule_builder import Costs, build_evaluation_schedule, build_training_schedule
from trainer.common.errors import UserError
from trainer.common.safe_read import read_bytes
from trainer.common.strict_json import dumps
from trainer.config.recipe import Recipe
from trainer.planning.hardware import costs_in_seconds, find_hardware
from trainer.planning.lanes import choose_lanes, lanes_on
from trainer.planning.model_costs import count_flops
from trainer.telemetry.console import say

LAUNCH_SHARE = 0.4
"""Cost of a launch, which reads a shard's weights from memory, over one request's cost. Measured on a CPU with 32 rows
per expert (tests/benchmarks/results)."""
TRANSFER_SHARE = 0.1
"""Cost of sending a request over the wire, as a share of a trunk layer's cost."""
LANES_OF_UNKNOWN_MEMORY = 4
"""Most lanes to choose where the memory is not known; each lane keeps a micro-batch's activations."""


def nominal_costs(recipe: Recipe) -> Costs:
    """Estimate the costs of one micro-batch's pieces, in FLOPs per token of a rank of either role."""
    flops = count_flops(recipe)
    trunk_layer = flops.trunk_layer + flops.router
    pool_layer = recipe.router.top_k * flops.expert / recipe.grid.expert_parallel
    return Costs(
        trunk_layer=trunk_layer,
        head=flops.head,
        pool_layer=pool_layer,
        slot=LAUNCH_SHARE * pool_layer,
        transfer=TRANSFER_SHARE * trunk_layer if recipe.grid.dedicated or recipe.grid.expert_parallel > 1 else 0.0,
    )


Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Saved(BaseModel):
    """The content of `plan.json`."""

    shape: dict[str, Any]
    lanes: Annotated[int, Field(ge=1, le=1024)]
    costs: dict[str, Cost]

    @model_validator(mode="after")
    def _has_all_costs(self) -> Self:
        known = fields(Costs)
        required = {field.name for field in known if field.default is MISSING}
        if not required <= self.costs.keys() <= {field.name for field in known}:
            raise ValueError("its costs have other names")
        return self


@dataclass(frozen=True)
class ScheduleSpec:
    """What the schedules of a run are made from; it is kept in the run's folder, so that a resumed run has the same.

    Attributes:
        lanes: Micro-batches that a trunk rank has in flight at most.
        costs: Estimated times of a micro-batch's pieces.
    """

    recipe: Recipe
    lanes: int
    costs: Costs

    @cached_property
    def step(self) -> PoolSchedule:
        """The schedule of an optimizer step."""
        r = self.recipe
        stagger = r.parallel.stagger
        return build_training_schedule(r.grid, r.model.layers, r.micro_batches, self.lanes, stagger, self.costs)

    def evaluation(self, micro_batches: int) -> PoolSchedule:
        """The schedule of an evaluation on `micro_batches` per trunk rank."""
        r = self.recipe
        return build_evaluation_schedule(r.grid, r.model.layers, micro_batches, self.lanes, self.costs)

    def generation(self, tokens: int) -> PoolSchedule:
        """The schedule of a generation on every trunk rank, where each token waits for the one before."""
        grid = self.recipe.grid
        return generation_schedule(grid.trunk_ranks, tokens, self.recipe.model.layers, grid.every_rank)

    def to_json(self) -> str:
        """JSON text for the run's folder and for the other ranks."""
        return dumps({"shape": _shape(self.recipe), "lanes": self.lanes, "costs": asdict(self.costs)})

    @classmethod
    def from_json(cls, recipe: Recipe, text: str) -> ScheduleSpec | None:
        """Read what `to_json` wrote; None if that was for a model or layout of another shape.

        Raises:
            ValueError: The text is something else.
        """
        saved = _Saved.model_validate_json(text)
        if saved.shape != _shape(recipe) or recipe.parallel.lanes not in (None, saved.lanes):
            return None
        return cls(recipe, saved.lanes, Costs(**saved.costs))


def make_schedule(recipe: Recipe) -> ScheduleSpec:
    """Choose costs and lanes: from the recipe's hardware or, without one, from FLOPs.

    The recipe's own lanes are kept. Otherwise as few are chosen as are fast: on known hardware at most as many as fit
    into memory, on unknown hardware at most four.

    Raises:
        UserError: `parallel.hardware` is neither a known name nor a profile.
    """
    p = recipe.parallel
    if p.hardware:
        hardware = find_hardware(p.hardware, "parallel.hardware =")
        lanes = lanes_on(recipe, hardware)
        return ScheduleSpec(recipe, lanes, costs_in_seconds(recipe, hardware, lanes))
    costs = nominal_costs(recipe)
    return ScheduleSpec(recipe, p.lanes or choose_lanes(recipe, lambda _: costs, LANES_OF_UNKNOWN_MEMORY), costs)


def schedule_of(recipe: Recipe, file: Path, resume: bool) -> ScheduleSpec:
    """Return the run's saved schedule if it resumes with the same shape and layout, else a new one.

    A damaged file is renamed to damaged_plan.json with a warning: the recipe gives the same schedule again, unless the
    profile of `parallel.hardware` has changed meanwhile.

    Raises:
        UserError: The file cannot be read or renamed.
    """
    saved = None
    if resume and file.exists():
        try:
            saved = ScheduleSpec.from_json(recipe, read_bytes(file).decode())
        except ValueError:
            try:
                file.replace(file.with_name("damaged_plan.json"))
            except OSError as error:
                raise UserError(f"{file}: is damaged and cannot be renamed ({error.strerror}); delete it") from None
            say(f"WARNING: {file} is damaged and now damaged_plan.json; the recipe gives the schedule")
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    return saved or make_schedule(recipe)


_NEW = {"private_ffn": 0, "private_gate": False, "head_dim": None, "qk_norm": "none", "qkv_bias": False}
"""Keys of the section `model` that earlier versions did not write, with their defaults."""


def _shape(recipe: Recipe) -> dict[str, Any]:
    """What the costs depend on."""
    p, m = recipe.parallel, recipe.model
    shape = {
        "model": {
            key: value for key, value in m.model_dump(mode="json").items() if key not in _NEW or value != _NEW[key]
        },
        "experts": [recipe.pool.experts, recipe.router.top_k],
        "batch": [recipe.train.global_batch, recipe.train.micro_batch, recipe.train.precision],
        "ranks": [p.trunk_ranks, p.pool_ranks, recipe.grid.expert_parallel],
        "hardware": p.hardware,
    }
    # Files of earlier versions know the other two layouts by their ranks alone.
    return shape | {"layout": "every_rank"} if recipe.grid.every_rank else shape
