"""The service plans of a run: the same on every rank, and on every start of the run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, TypeAdapter, model_validator

from pool.schedule import PoolSchedule, forward_only_plan
from pool.schedule_builder import Costs, evaluation_plan, training_plan
from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.config.recipe import Recipe
from trainer.planning.lanes import choose_lanes
from trainer.planning.model_costs import count_flops

LAUNCH_SHARE = 0.4
"""Cost of a slot however small, as a share of one request's: the weights' way through memory. Measured on a CPU with 32
rows an expert (tests/benchmarks/results)."""
TRANSFER_SHARE = 0.1
"""Cost of a request's way over the wire, as a share of a trunk layer's."""


def nominal_costs(recipe: Recipe) -> Costs:
    """Costs of one micro-batch's pieces, in FLOPs a token of a rank of either role."""
    flops = count_flops(recipe)
    trunk_layer = flops.trunk_layer + flops.router
    pool_layer = recipe.router.top_k * flops.expert / recipe.grid.expert_parallel
    return Costs(
        trunk_layer=trunk_layer,
        head=flops.head,
        pool_layer=pool_layer,
        slot=LAUNCH_SHARE * pool_layer,
        transfer=TRANSFER_SHARE * trunk_layer,
    )


Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Saved(BaseModel):
    """plan.json."""

    shape: dict[str, Any]
    lanes: Annotated[int, Field(ge=1, le=1024)]
    costs: dict[str, Cost]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if {field.name for field in fields(Costs)} != self.costs.keys():
            raise ValueError("its costs are others")
        return self


_SAVED = TypeAdapter(_Saved)

LANES_OF_UNKNOWN_MEMORY = 4
"""Chosen where the memory is not known: each lane keeps a micro-batch's activations."""


@dataclass(frozen=True)
class ScheduleSpec:
    """How a run goes through its micro-batches: lanes, and the costs that its plans are made from.

    Kept in the run's folder: a resumed run has the plans of its first start.
    """

    recipe: Recipe
    lanes: int
    costs: Costs

    @cached_property
    def step(self) -> PoolSchedule:
        """The plan of an optimizer step."""
        r = self.recipe
        stagger = r.parallel.stagger
        return training_plan(r.grid, r.model.layers, r.micro_batches, self.lanes, stagger, self.costs)

    def evaluation(self, micro_batches: int) -> PoolSchedule:
        """The plan of an evaluation on `micro_batches` of each trunk rank."""
        return evaluation_plan(self.recipe.grid, self.recipe.model.layers, micro_batches, self.lanes, self.costs)

    def generation(self, tokens: int) -> PoolSchedule:
        """The plan of a generation on every trunk rank: each token waits for the one before."""
        layers, ranks = self.recipe.model.layers, self.recipe.grid.trunk_ranks
        slots = tuple(forward_only_plan(range(ranks), tokens, layers))
        return PoolSchedule(slots, ((0,) * (layers + 1),) * ranks, 0.0, 0.0, 0.0)

    def to_json(self) -> str:
        """For the run's folder, and for the other ranks."""
        return dumps({"shape": _shape(self.recipe), "lanes": self.lanes, "costs": asdict(self.costs)})

    @classmethod
    def from_json(cls, recipe: Recipe, text: str) -> ScheduleSpec | None:
        """What `to_json` gave; None if that was of another shape or layout.

        Raises:
            ValueError: it is something else.
        """
        saved = _SAVED.validate_json(text)
        if saved.shape != _shape(recipe) or recipe.parallel.lanes not in (None, saved.lanes):
            return None
        return cls(recipe, saved.lanes, Costs(**saved.costs))


def make_schedule(recipe: Recipe) -> ScheduleSpec:
    """Costs from the recipe's hardware or, without one, from FLOPs; lanes from the recipe or the simulator.

    Of known hardware the lanes fill the memory at most, of unknown there are four at most.

    Raises:
        UserError: parallel.hardware is neither a known name nor a profile.
    """
    p = recipe.parallel
    if p.hardware:
        from trainer.planning.hardware import find_hardware, seconds
        from trainer.planning.step_time import fitting_lanes

        hardware = find_hardware(p.hardware, "parallel.hardware =")
        return ScheduleSpec(recipe, p.lanes or max(1, fitting_lanes(recipe, hardware)), seconds(recipe, hardware))
    costs = nominal_costs(recipe)
    return ScheduleSpec(recipe, p.lanes or choose_lanes(recipe, costs, LANES_OF_UNKNOWN_MEMORY), costs)


def schedule_of(recipe: Recipe, file: Path, resume: bool) -> ScheduleSpec:
    """The run's saved schedule if it resumes in the same shape and layout, else a new one.

    Raises:
        UserError: the file is damaged.
    """
    saved = None
    if resume and file.exists():
        try:
            saved = ScheduleSpec.from_json(recipe, file.read_text())
        except (OSError, ValueError):
            raise UserError(f"{file}: is damaged; remove it, and the run makes a new plan") from None
    return saved or make_schedule(recipe)


def _shape(recipe: Recipe) -> dict[str, Any]:
    """What costs depend on."""
    p, m = recipe.parallel, recipe.model
    return {
        "model": m.model_dump(mode="json"),
        "experts": [recipe.pool.experts, recipe.router.top_k],
        "batch": [recipe.train.global_batch, recipe.train.micro_batch, recipe.train.precision],
        "ranks": [p.trunk_ranks, p.pool_ranks, recipe.grid.expert_parallel],
        "hardware": p.hardware,
    }
