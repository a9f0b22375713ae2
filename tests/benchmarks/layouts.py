"""When ranks of their own for the experts pay: the predicted steps of all three layouts, by model, ranks and wire.

python -m tests.benchmarks.layouts [--model NAME]... [--devices N]... [--interconnect GBIT/S]...

Nothing is measured: it is what `unipool plan --hardware h100 --devices N --interconnect GBIT/S` predicts for the best
layout of each kind, for unipool-182m with experts of three sizes. The batch grows with the ranks: a rank of the layouts
without dedicated ranks has six micro-batches a step. Three quarters of the ranks can then be trunk ranks, too.
"""

from __future__ import annotations

import itertools

import click

from trainer.config.recipe import Recipe, load_recipe
from trainer.planning.hardware import DATA_SHEETS, with_link
from trainer.planning.model_costs import count_flops
from trainer.planning.step_time import StepTime, best_layouts

MODELS = {
    "experts of a quarter of the width": ("model.ffn_hidden=768",),
    "182m": (),
    "top-2": ("router.top_k=2",),
}
NVLINK = 3600.0  # Gbit/s


def recipe_for(model: str, devices: int) -> Recipe:
    return load_recipe("unipool-182m", [*MODELS[model], f"train.global_batch={96 * devices}"])


def row(model: str, devices: int, gbit: float) -> dict[str, str]:
    """The fastest layout of each kind: times relative to the fastest of all."""
    recipe = recipe_for(model, devices)
    flops = count_flops(recipe)
    best: dict[str, StepTime] = {}
    for step in best_layouts(recipe, devices, with_link(DATA_SHEETS["h100"], gbit)):
        best.setdefault(step.layout, step)
    fastest = min(step.seconds for step in best.values())
    kinds = ("every_rank", "dedicated", "colocated")
    return {
        "model": model,
        "trunk:pool": f"{flops.trunk / flops.pool:.2f}",
        "ranks": str(devices),
        "Gbit/s": f"{gbit:,.0f}",
        **{kind: f"{best[kind].seconds / fastest:.2f}" if kind in best else "does not fit" for kind in kinds},
        "step": f"{1000 * fastest:.0f} ms",
        "every_rank's shards, lanes": _shape(best.get("every_rank")),
        "dedicated ranks, shards, lanes": _shape(best.get("dedicated")),
    }


def _shape(step: StepTime | None) -> str:
    if step is None:
        return ""
    split = f"{step.trunk_ranks} + {step.pool_ranks}, " if step.layout == "dedicated" else ""
    return f"{split}{step.expert_parallel}, {step.lanes}"


@click.command()
@click.option("--devices", type=int, multiple=True, default=(8, 16, 32, 64), show_default=True)
@click.option("--interconnect", type=float, multiple=True, default=(NVLINK, 400.0, 100.0), show_default=True)
@click.option("--model", type=click.Choice(list(MODELS)), multiple=True, default=tuple(MODELS))
def main(devices: tuple[int, ...], interconnect: tuple[float, ...], model: tuple[str, ...]) -> None:
    """Print a table in Markdown, row by row."""
    for place, (name, number, gbit) in enumerate(itertools.product(model, devices, interconnect)):
        cells = row(name, number, gbit)
        if not place:
            print("|", " | ".join(cells), "|")
            print("|---" * len(cells) + "|")
        print("|", " | ".join(cells.values()), "|", flush=True)


if __name__ == "__main__":
    main()
