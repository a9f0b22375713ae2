"""How a step grows with the ranks and with the model, simulated with the costs of the GPU protocol.

python -m tests.benchmarks.scale [--figure FILE.svg] [--routing FILE.npy]

Nothing is measured. Steps are those that `unipool plan --hardware` predicts for nodes of 8 GPUs, at a recorded load.

**Weak scaling.** The batch grows with the ranks: each device has 64 sequences, as 8 devices have in the paper's batch.
With `every_rank` a replica of the pool fills a node; with dedicated ranks 8 trunk ranks on one node use 8 pool ranks on
another. The lanes are those that `plan` chooses for 16 ranks.

**Load.** FILE holds counts by micro-batch, layer and expert of a trained quickstart (`tests.benchmarks.record`), which
has 8 layers and 64 experts. Layer l of L takes those of its layer l * 8 // L, and expert e of M those of its expert
e * 64 // M. One half of the micro-batches places the experts. From the other half each replica draws its own, at
random, and the step waits for the slowest replica: the time is the mean of the largest of as many draws as there are
replicas. A recorded micro-batch has 2,048 tokens, fewer than one of the model, which exaggerates the differences
between replicas.

**Shards.** 1,024 ranks with both roles, at an even load, with replicas that reach over several nodes.

**Growth.** 182m on 64 ranks (H200) with both roles and more experts, layers or experts a token, with the number of
shards that is the fastest of those that fit, at an even load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from pool.placement import Placement, balanced, contiguous
from pool.schedule_builder import build_training_schedule, staggered_starts
from pool.schedule_timing import Floats, shard_loads, time_schedule
from tests.benchmarks.report import commit
from trainer.config.recipe import Recipe, load_recipe
from trainer.planning.fit import fits
from trainer.planning.hardware import DATA_SHEETS, Hardware, costs_in_seconds
from trainer.planning.lanes import accumulation_time, deferred_requests, lanes_on
from trainer.planning.network.step_end import step_end
from trainer.planning.step_time import StepTime, step_time

Counts = NDArray[np.int64]

MODELS = ("unipool-182m", "unipool-469m", "unipool-978m")
LAYOUTS = ("every_rank", "dedicated")
RANKS = (16, 32, 64, 128, 256, 512, 1024)
NODE = 8
SEQUENCES = 64  # of a device in a step
DRAWS = 32  # of a replica's micro-batches
ROUTING = Path(__file__).parent / "results" / "2026-11-29-routing.npy"

SHARDS = (8, 16, 32, 64)
GROWTH = {
    "pool.experts": (96, 384, 1024, 4096),
    "model.layers": (12, 24, 48),
    "router.top_k": (1, 2, 4, 8),
}
GROWTH_RANKS, GROWTH_HARDWARE = 64, DATA_SHEETS["h200"]  # whose memory is enough for 48 layers and two lanes


def on_ranks(model: str, layout: str, ranks: int, *overrides: str) -> Recipe:
    """A recipe on so many ranks, with `NODE` shards and `SEQUENCES` for each device."""
    trunk = ranks if layout == "every_rank" else ranks // 2
    keys = {"layout": layout, "trunk_ranks": trunk, "pool_ranks": ranks - trunk, "expert_parallel": NODE}
    grid = [f"parallel.{key}={value}" for key, value in keys.items()]
    return load_recipe(model, [*grid, f"train.global_batch={SEQUENCES * ranks}", *overrides])


def stretched(load_NLM: Counts, recipe: Recipe) -> Counts:
    """Counts for the recipe's layers and experts, from a recording of another model."""
    _, layers, experts = load_NLM.shape
    of_layer = np.arange(recipe.model.layers) * layers // recipe.model.layers
    of_expert = np.arange(recipe.pool.experts) * experts // recipe.pool.experts
    return load_NLM[:, of_layer][:, :, of_expert]


def draw_times(recipe: Recipe, hardware: Hardware, load_NLM: Counts, placed: bool) -> Floats:
    """Times of a step's micro-batches on one replica, up to the last gradient, drawn `DRAWS` times."""
    load_NLM = stretched(load_NLM, recipe)
    half, groups, shards = len(load_NLM) // 2, recipe.model.groups, recipe.grid.expert_parallel
    placement: Placement = contiguous(recipe.pool.experts, groups, shards)
    if placed:
        placement = balanced(torch.from_numpy(load_NLM[:half].sum(0)), shards, groups)
    costs, random = costs_in_seconds(recipe, hardware, lanes_of(recipe)), np.random.default_rng(0)
    grid, layers, micro_batches = recipe.grid, recipe.model.layers, recipe.micro_batches
    assert grid.replicas == 1
    schedule = build_training_schedule(grid, layers, micro_batches, lanes_of(recipe), recipe.parallel.stagger, costs)
    starts_T, most = staggered_starts(grid, layers, costs), deferred_requests(recipe)

    def time(load_LM: Counts) -> float:
        load_LS = shard_loads(load_LM, placement)
        return time_schedule(schedule, grid, layers, costs, load_LS, starts_T=starts_T, most_deferred=most).seconds

    others, served = load_NLM[half:], grid.trunk_ranks * micro_batches
    return np.sort([time(others[random.integers(len(others), size=served)].sum(0)) for _ in range(DRAWS)])


def lanes_of(recipe: Recipe) -> int:
    assert recipe.parallel.lanes
    return recipe.parallel.lanes


def largest_of(times: Floats, draws: int) -> float:
    """Mean of the largest of so many draws from sorted times."""
    below = (np.arange(len(times) + 1) / len(times)) ** draws
    return float(times @ np.diff(below))


@dataclass(frozen=True)
class Scaling:
    """Weak scaling of a model in a layout on some hardware.

    Attributes:
        steps: Steps at an even load, by ranks.
        seconds: Seconds of a step at the recorded load, by ranks; with contiguous and with placed experts.
    """

    model: str
    layout: str
    hardware: Hardware
    steps: dict[int, StepTime]
    seconds: dict[int, tuple[float, float]]

    def efficiency(self, ranks: int, placed: bool) -> float:
        """Tokens/s of a rank over those with the fewest ranks."""
        return self.seconds[RANKS[0]][placed] / self.seconds[ranks][placed]


def weak_scaling(model: str, layout: str, hardware: Hardware, load_NLM: Counts) -> Scaling:
    """Simulate a model on all numbers of ranks."""
    first = on_ranks(model, layout, RANKS[0])
    lanes = f"parallel.lanes={lanes_on(first, hardware)}"
    recipes = {ranks: on_ranks(model, layout, ranks, lanes) for ranks in RANKS}
    steps = {ranks: step_time(recipe, hardware) for ranks, recipe in recipes.items()}
    one = on_ranks(model, layout, NODE if layout == "every_rank" else 2 * NODE, lanes)
    alone = accumulation_time(one, lanes_of(one), costs_in_seconds(one, hardware, lanes_of(one)))[0]
    times = [draw_times(one, hardware, load_NLM, placed) for placed in (False, True)]
    seconds = {}
    for ranks, step in steps.items():
        even, replicas = step.seconds - step.step_end, recipes[ranks].grid.replicas
        # An uneven load makes the micro-batches longer; what else depends on the ranks is known from the even load.
        longer = [largest_of(drawn, replicas) - alone for drawn in times]
        seconds[ranks] = (even + longer[0] + step.step_end, even + longer[1] + step.step_end)
    return Scaling(model, layout, hardware, steps, seconds)


def slowest_network(scaling: Scaling) -> float | None:
    """Bytes/s of a rank to other nodes with which 1,024 ranks reach 0.90 of 16 on the hardware; None if none do."""
    least, hardware = scaling.steps[RANKS[0]].seconds / 0.9, scaling.hardware
    lanes = f"parallel.lanes={scaling.steps[RANKS[0]].lanes}"
    last = on_ranks(scaling.model, scaling.layout, RANKS[-1], lanes)

    def fast_enough(speed: float) -> bool:
        return step_time(last, replace(hardware, network_bandwidth=speed)).seconds <= least

    low, high = 1e8, 1e13
    if not fast_enough(high):
        return None
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fast_enough(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Parts:
    """What a rank with both roles does in a step, in seconds.

    Attributes:
        attention: Attention, norms and head.
        waiting: The rest: waiting for the wire, and for other layers.
        end: What comes after the last gradient.
    """

    shards: int
    attention: float
    router: float
    permutation: float
    experts: float
    waiting: float
    end: float

    @property
    def seconds(self) -> float:
        return sum(self.shares)

    @property
    def shares(self) -> tuple[float, ...]:
        return self.attention, self.router, self.permutation, self.experts, self.waiting, self.end


@cache
def parts_of(key: str, value: int) -> Parts:
    """Divide the step of 182m with one key changed."""
    hardware = GROWTH_HARDWARE
    recipe, step = _fastest(key, value)
    costs = costs_in_seconds(recipe, hardware, step.lanes)
    layers, micro_batches = recipe.model.layers, recipe.micro_batches

    def in_a_step(trunk_layer: float) -> float:
        return 3 * micro_batches * layers * trunk_layer

    def slope(key: str, value: int) -> float:
        """What one of the experts, or of the experts of a token, adds to a layer of the trunk."""
        other = load_recipe_like(recipe, **{key: 2 * value})
        return (costs_in_seconds(other, hardware, step.lanes).trunk_layer - costs.trunk_layer) / value

    router = in_a_step(recipe.pool.experts * slope("experts", recipe.pool.experts))
    permutation = in_a_step(recipe.router.top_k * slope("top_k", recipe.router.top_k))
    trunk = in_a_step(costs.trunk_layer) + 3 * micro_batches * costs.head
    experts = step.pool_busy * step.seconds
    waiting = step.seconds - step.step_end - trunk - experts
    shards = recipe.grid.expert_parallel
    return Parts(shards, trunk - router - permutation, router, permutation, experts, waiting, step.step_end)


def load_recipe_like(recipe: Recipe, experts: int | None = None, top_k: int | None = None) -> Recipe:
    """The recipe with more experts, or more experts a token; it need not fit."""
    pool = recipe.pool.model_copy(update={"experts": experts or recipe.pool.experts})
    router = recipe.router.model_copy(update={"top_k": top_k or recipe.router.top_k})
    return recipe.model_copy(update={"pool": pool, "router": router})


def _fastest(key: str, value: int) -> tuple[Recipe, StepTime]:
    """182m with one key changed, and with the number of shards that is fastest."""
    found = []
    experts = value if key == "pool.experts" else load_recipe(MODELS[0]).pool.experts
    for shards in (shards for shards in SHARDS if experts % shards == 0):
        recipe = on_ranks(MODELS[0], "every_rank", GROWTH_RANKS, f"{key}={value}", f"parallel.expert_parallel={shards}")
        if fits(recipe, 1, GROWTH_HARDWARE.memory):
            found.append((recipe, step_time(recipe, GROWTH_HARDWARE)))
    return min(found, key=lambda case: case[1].seconds)


def scaling_rows(results: Iterable[Scaling]) -> Iterator[list[str]]:
    yield ["model", "layout", "GPU", "lanes", "step, 16", *map(str, RANKS[1:]), "contiguous", "reduction", "GB/s"]
    for result in results:
        first, last = result.steps[RANKS[0]], result.steps[RANKS[-1]]
        network = slowest_network(result)
        end = step_end(_last(result), result.hardware)
        yield [
            result.model.removeprefix("unipool-"),
            result.layout,
            result.hardware.name,
            str(first.lanes),
            f"{1000 * result.seconds[RANKS[0]][True]:.0f} ms",
            *(f"{result.efficiency(ranks, True):.3f}" for ranks in RANKS[1:]),
            f"{result.efficiency(RANKS[-1], False):.3f}",
            f"{end.reductions / last.seconds:.1%}",
            "none" if network is None else f"{network / 1e9:.1f}",
        ]


def _last(result: Scaling) -> Recipe:
    return on_ranks(result.model, result.layout, RANKS[-1])


def shards_rows(hardware: Hardware) -> Iterator[list[str]]:
    yield ["model", "shards", "lanes", "step", "over 8", "link must carry", "carries", "waits", "host busy", "end"]
    for model in MODELS:
        first = 0.0
        for shards in SHARDS:
            if load_recipe(model).pool.experts % shards:
                continue
            recipe = on_ranks(model, "every_rank", RANKS[-1], f"parallel.expert_parallel={shards}")
            step = step_time(recipe, hardware)
            first, wire = first or step.seconds, step.wire
            assert wire
            yield [
                model.removeprefix("unipool-"),
                str(shards),
                str(step.lanes),
                f"{1000 * step.seconds:,.0f} ms",
                f"{step.seconds / first:.2f}",
                f"{wire.needed / 1e9:.1f} GB/s",
                f"{wire.available / 1e9:.0f} GB/s",
                f"{wire.slowdown - 1:.1%}",
                f"{step.host_busy:.0%}",
                f"{step.step_end / step.seconds:.1%}",
            ]


def growth_rows() -> Iterator[list[str]]:
    yield ["", "", "shards", "step", "attention, head", "router", "permutation", "experts", "waiting", "end"]
    for key, values in GROWTH.items():
        for value in values:
            parts = parts_of(key, value)
            shares = [f"{abs(share) / parts.seconds:.1%}" for share in parts.shares]  # what never waits may be below 0
            yield [key, f"{value:,}", str(parts.shards), f"{1000 * parts.seconds:,.0f} ms", *shares]


def _kept(results: list[Scaling], found: Iterable[Scaling]) -> Iterator[Scaling]:
    """Pass results on, and keep them."""
    for result in found:
        results.append(result)
        yield result


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Print rows in Markdown."""
    for place, row in enumerate(rows):
        print("|", " | ".join(row), "|", flush=True)
        if not place:
            print("|---" * len(row) + "|")


@click.command()
@click.option(
    "--figure", type=click.Path(dir_okay=False, path_type=Path), help="Also draw the picture of the document."
)
@click.option("--routing", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=ROUTING)
@click.option("--hardware", type=click.Choice(list(DATA_SHEETS)), multiple=True, default=("h100", "h200"))
def main(figure: Path | None, routing: Path, hardware: tuple[str, ...]) -> None:
    """Print tables of weak scaling and of growth."""
    load_NLM = np.load(routing).astype(np.int64)
    print(f"commit {commit()}; {len(load_NLM)} recorded micro-batches\n")
    cases = [(model, layout, DATA_SHEETS[name]) for name in hardware for layout in LAYOUTS for model in MODELS]
    results: list[Scaling] = []
    print_table(scaling_rows(_kept(results, (weak_scaling(*case, load_NLM) for case in cases))))
    print()
    print_table(shards_rows(DATA_SHEETS[hardware[0]]))
    print()
    print_table(growth_rows())
    if figure:
        from tests.benchmarks.scale_figure import draw

        draw(results, figure)


if __name__ == "__main__":
    main()
