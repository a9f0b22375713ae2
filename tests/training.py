"""A tiny training run on every rank, for tests that compare layouts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.distributed import join, run_ranks
from tests.double import float32_is_float64
from trainer.config.recipe import Recipe
from trainer.planning.schedule import make_schedule

TINY: dict[str, Any] = {
    "run": {"dir": "unused", "seed": 3},
    "model": {
        "layers": 3,
        "hidden": 24,
        "heads": 4,
        "kv_heads": 2,
        "ffn_hidden": 20,
        "vocab": 61,
        "seq_len": 9,
        "init_std": 0.2,
    },
    "router": {"kind": "norm", "top_k": 2},
    "pool": {"experts": 8},
    "balance": {"pool": 0.05, "scope": "global_batch"},
    "train": {
        "steps": 4,
        "global_batch": 8,
        "micro_batch": 2,
        "lr": 3e-3,
        "min_lr": 1e-3,
        "warmup_fraction": 0.0,
        # Adam divides by the gradient's size: with its usual eps the rounding of a tiny gradient is a whole step.
        "eps": 1e-3,
        "clip": 0.7,
        "precision": "fp32",
    },
    "data": {"source": "unused", "tokenizer": "unused"},
    "metrics": {"tensorboard": False},
}

OF_LOCK = ("entropy_loss", "lock_stage", "own_share", "foreign_assignments")
"""Scalars of a run with a lock."""

END = 0
"""Ends a document; about every eighth of `tokens`."""


def tiny(**sections: Any) -> Recipe:
    """The tiny recipe with some keys of some sections replaced."""
    tree = {name: {**TINY.get(name, {}), **sections.get(name, {})} for name in {*TINY, *sections}}
    return Recipe.model_validate(tree)


@dataclass(frozen=True)
class Outcome:
    """What a run comes to, whatever its layout.

    Attributes:
        scalars: per step: loss, balance_loss, grad_norm, lr, load_imbalance, distinct_experts, gates.
        gradients: per step, reduced and not yet clipped; experts by "expert/<id>/...". What is frozen has none.
        weights: after the last step.
        val_loss: of an evaluation at the end.
        load_LM: tokens per expert of the last step.
        held_out_LM: tokens per expert of that evaluation.
        random_loss: of the evaluation with random experts in layer 1.
        val_losses: of a run with a lock, of the evaluation after each step, and before the first of a resumed run.
        owners: the layer that owns each expert, in a run with a lock.
    """

    scalars: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    val_loss: float
    load_LM: Tensor
    held_out_LM: Tensor
    random_loss: float
    val_losses: list[float]
    owners: tuple[int, ...] | None


def run_training(
    recipe: Recipe,
    steps: int | None = None,
    save_to: Path | None = None,
    resume_from: Path | None = None,
    save_after: int | None = None,
    warm_up: bool = False,
    double: bool = False,
) -> Outcome:
    """Train on all ranks of the recipe's layout and bring the parts together.

    Args:
        steps: where to stop; default at the recipe's end.
        save_to: folder for a checkpoint.
        save_after: steps after which it is saved, while training continues, and the experts move if the recipe says so;
            default: at the end.
        resume_from: folder whose newest checkpoint to begin with.
        warm_up: whether to warm up before the first step, as on GPUs.
        double: whether to compute in float64 what is float32 otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": folder})})
        last = recipe.train.steps if steps is None else steps
        after = save_after or last
        how = (last, save_to, resume_from, after, warm_up)
        ranks = run_ranks(recipe.grid.world_size, _train_in, double, recipe, *how)
    gradients = [together(parts) for parts in zip(*(rank["gradients"] for rank in ranks), strict=True)]
    weights = together([rank["weights"] for rank in ranks])
    trunk = ranks[0]
    assert len({rank["owners"] for rank in ranks[: recipe.grid.trunk_ranks]}) == 1
    of_trunk = {
        name: trunk[name] for name in ("val_loss", "load_LM", "held_out_LM", "random_loss", "val_losses", "owners")
    }
    return Outcome(trunk["scalars"], gradients, weights, **of_trunk)


def together(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of all ranks; what several have is the same to the bit."""
    everything: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name in everything:
                torch.testing.assert_close(value, everything[name], rtol=0, atol=0)
            everything[name] = value
    return everything


def optimizer_step(job: Any, role: Any, step: int) -> Any:
    """Run an optimizer step with all ranks; return a trunk rank's scalars."""
    from trainer.train.loop import update

    return update(job, role, step, role.accumulate(step)).scalars


def _train_in(double: bool, *arguments: Any) -> dict[str, Any]:
    with float32_is_float64(double):
        return _train(*arguments)


def _train(
    recipe: Recipe, steps: int, save_to: Path | None, resume_from: Path | None, save_after: int, warm_up: bool
) -> dict[str, Any]:
    from trainer.checkpoint import format as checkpoint
    from trainer.checkpoint.reshard import move_experts
    from trainer.checkpoint.resume import load_checkpoint
    from trainer.checkpoint.save import Saver
    from trainer.data.batches import SequenceStream
    from trainer.export.initial import load_initial
    from trainer.train.agreement import agreed_move, agreed_placement
    from trainer.train.lock import after_evaluation
    from trainer.train.pool_rank import PoolRank
    from trainer.train.trunk_rank import TrunkRank

    def evaluate(done: int) -> None:
        if recipe.lock:
            loss, load_LM = role.evaluate(1, done)
            after_evaluation(job, recipe, role, done, loss, load_LM)
            result["val_losses"].append(loss)

    job = join(recipe)
    data = tokens(recipe)
    role: TrunkRank | PoolRank
    start, saved = (checkpoint.newest(resume_from) if resume_from else None) or (0, None)
    placement = agreed_placement(job, recipe, saved, make_schedule(recipe).step)
    if job.is_trunk:
        document_end = END if recipe.data.document_mask else None
        training, validation = SequenceStream([data], 0), SequenceStream([data], None)
        role = TrunkRank(recipe, job, make_schedule(recipe), placement, training, validation, document_end)
    else:
        assert placement
        role = PoolRank(recipe, job, make_schedule(recipe), placement)
    result: dict[str, Any] = {"scalars": [], "gradients": [], "val_losses": [], "load_LM": None, "owners": None}
    if warm_up:
        role.warm_up(job.start_timeout)
    if saved:
        load_checkpoint(job, recipe, saved, role)
    elif recipe.train.init_from:
        load_initial(recipe, role)
    saver = Saver(job, recipe, save_to, role) if save_to else None
    if saver and start == save_after:
        saver.start(start)
    if start:
        evaluate(start)
    generator = torch.get_rng_state()
    for step in range(start, steps):
        before_update(role, lambda: result["gradients"].append(of_all(role, full_gradients)))
        scalars = optimizer_step(job, role, step)
        if scalars is not None:
            names = (
                "loss",
                "balance_loss",
                "z_loss",
                "grad_norm",
                "lr",
                "load_imbalance",
                "distinct_experts",
                "applied",
            )
            gates = {f"gate of layer {layer}": gate for layer, gate in enumerate(scalars.layer_gates)}
            lock = {name: float(getattr(scalars, name)) for name in OF_LOCK if getattr(scalars, name) is not None}
            result["scalars"].append({name: float(getattr(scalars, name)) for name in names} | gates | lock)
        if saver and step + 1 == save_after:
            saver.start(save_after)
            if save_after < steps:
                move_experts(job, saver, role, agreed_move(job, recipe, role, save_after), save_after)
                _assert_metrics_know_the_experts(role)
        evaluate(step + 1)
    assert saver is None or saver.finish()
    result["val_loss"], result["held_out_LM"] = role.evaluate(1, steps)
    result["random_loss"], _ = role.evaluate(1, steps, random_layer=1)
    if isinstance(role, TrunkRank):
        result["load_LM"] = role.load_LM
        result["owners"] = role.ownership.owners if role.ownership else None
    assert torch.equal(generator, torch.get_rng_state()), "no checkpoint holds its state"
    result["weights"] = of_all(role, full_parameters)
    job.close()
    return result


def _assert_metrics_know_the_experts(role: Any) -> None:
    """Those that a shard serves are those that it holds, also once they have moved."""
    load, experts = role.metrics.expert_load, role.placement.num_experts
    for name, engine in role.engines.items() if load else ():
        if name != "trunk":
            served = [int(expert) for (expert,), _ in load.families()["unipool_expert_tokens"]]
            assert served == (list(engine.module.expert_ids) if len(served) < experts else list(range(experts)))


def before_update(role: Any, act: Callable[[], None]) -> None:
    """`act()` in the role's next step, when its gradients are reduced and not yet clipped."""
    original = role.step

    def step(*arguments: Any) -> Any:
        act()
        role.step = original
        return original(*arguments)

    role.step = step


def full_gradients(engine: Any) -> dict[str, Tensor]:
    """All reduced gradients by name, whole on every rank, on the host; to be read before the step. A collective."""
    from deepspeed.utils import safe_get_full_grad

    learning = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    return {name: safe_get_full_grad(p).cpu().clone() for name, p in learning}


def full_parameters(engine: Any) -> dict[str, Tensor]:
    """All parameters by name, whole on every rank, on the host. A collective at ZeRO-3."""
    import deepspeed

    gathered = deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=engine.stage == 3)
    with gathered:
        return {name: p.detach().cpu().clone() for name, p in engine.module.named_parameters()}


def of_all(role: Any, function: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
    """`function` of every engine of a role, experts apart."""
    return {k: v for engine in role.engines.values() for k, v in _by_expert(engine.module, function(engine)).items()}


def set_weights(role: Any, weights: dict[str, Tensor]) -> None:
    """Give a role its weights and buffers, named as in `Outcome.weights`, and moments of zeros."""
    from pool.shard import ExpertShard
    from trainer.engine.parameter_state import ParameterState

    for engine in role.engines.values():

        def read(name: str, module: Any = engine.module) -> ParameterState:
            if isinstance(module, ExpertShard):
                weight = torch.stack([weights[f"expert/{expert}/{name}"] for expert in module.expert_ids])
            else:
                weight = weights[name]
            weight = weight.to(torch.float32)
            return ParameterState(weight, torch.zeros_like(weight), torch.zeros_like(weight))

        buffers = {name: weights.get(name, buffer) for name, buffer in engine.module.named_buffers()}
        engine.load_resharded(read, buffers, 0, fresh=True)


def _by_expert(module: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    from pool.shard import ExpertShard

    if not isinstance(module, ExpertShard):
        return values
    return {
        f"expert/{expert}/{name}": stacked[place].clone()
        for name, stacked in values.items()
        for place, expert in enumerate(module.expert_ids)
    }


def tokens(recipe: Recipe) -> NDArray[np.int64]:
    """24 sequences of random tokens, with a skewed distribution."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, recipe.model.vocab, (24, recipe.model.seq_len + 1), generator=generator)
    return (ids * ids // recipe.model.vocab).numpy()


def assert_same(a: Outcome, b: Outcome, tolerance: float = 1e-5) -> None:
    """Both runs come to the same numbers, each tensor relative to its largest element."""
    for step, (mine, other) in enumerate(zip(a.scalars, b.scalars, strict=True)):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert abs(value - other[name]) <= tolerance * max(abs(value), 1e-3), (step, name, value, other[name])
    assert a.owners == b.owners
    pairs = [(a.val_loss, b.val_loss), (a.random_loss, b.random_loss), *zip(a.val_losses, b.val_losses, strict=True)]
    for mine, other in pairs:
        assert abs(mine - other) <= tolerance * abs(mine), (mine, other)
    _assert_tensors_same(a.weights, b.weights, tolerance)
    assert len(a.gradients) == len(b.gradients)
    # Later ones are of weights that differ by rounding, and where a gradient is a sum that cancels, it shows.
    _assert_tensors_same(a.gradients[0], b.gradients[0], tolerance)


def _assert_tensors_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a and a.keys() == b.keys()
    for name, value in a.items():
        scale = max(float(value.abs().max()), 1e-8)
        worst = float((value - b[name]).abs().max())
        assert worst <= tolerance * scale, f"{name}: differs by {worst:.3g}, largest element {scale:.3g}"
