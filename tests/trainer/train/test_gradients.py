"""The backward that is divided between trunk and pool, compared with autograd on the exported model and the losses.

Everything in float64. Letters: L layers, T tokens, M experts that a layer sees, K top-k, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from router import random_ownership
from tests.distributed import join, run_ranks
from tests.double import float32_is_float64
from tests.training import before_update, full_gradients, of_all, optimizer_step, set_weights, tiny, together, tokens
from trainer.config.recipe import Recipe
from trainer.data.batches import SequenceStream
from trainer.export.names import Parts, expert_names, trunk_names
from trainer.planning.schedule import make_schedule

Numbers = dict[str, Tensor]
STEPS = 2
"""With so small a learning rate that weights stay: the second step has a balance loss in every scope."""


def recipe_of(sections: dict[str, Any]) -> Recipe:
    sections = {name: dict(values) for name, values in sections.items()}
    sections["train"] = {"lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0, **sections.get("train", {})}
    sections["parallel"] = {"trunk_zero": 0, "pool_zero": 0, **sections.get("parallel", {})}
    return tiny(**sections)


def some_weights(recipe: Recipe) -> Numbers:
    """Of a size at which every part matters; norms, sigma and expert biases are not what they begin with."""
    from pool.shard import ExpertShard
    from trainer.model.trunk import Trunk

    m, device = recipe.model, torch.device("cpu")
    shard = ExpertShard(tuple(range(recipe.pool.experts)), m.hidden, m.ffn_hidden, torch.float64)
    shapes = {name: tensor.shape for name, tensor in Trunk(recipe, device).state_dict().items()}
    for name, stacked in shard.named_parameters():
        shapes |= {f"expert/{expert}/{name}": stacked.shape[1:] for expert in range(recipe.pool.experts)}
    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: 0.2 * w if w.ndim > 1 else 0.3 * w.tanh() + ("bias" not in name) for name, w in weights.items()}


def trained(recipe: Recipe, weights: Numbers) -> tuple[Numbers, list[dict[str, float]]]:
    """Gradients of the last step and scalars of all, of a job in the recipe's layout."""
    ranks = run_ranks(recipe.grid.world_size, _train, recipe, weights)
    return together(gradients for gradients, _ in ranks), ranks[0][1]


def _train(recipe: Recipe, weights: Numbers) -> tuple[Numbers, list[dict[str, float]]]:
    from trainer.train.agreement import agreed_placement
    from trainer.train.pool_rank import PoolRank
    from trainer.train.trunk_rank import TrunkRank

    with float32_is_float64():
        job = join(recipe)
        placement, schedule = agreed_placement(job, recipe, None), make_schedule(recipe)
        assert placement
        stream = SequenceStream([tokens(recipe)], 0)
        role: Any = (
            TrunkRank(recipe, job, schedule, placement, stream, stream)
            if job.is_trunk
            else PoolRank(recipe, job, schedule, placement)
        )
        set_weights(role, weights)
        gradients: Numbers = {}
        scalars = []
        for step in range(STEPS):
            before_update(role, lambda: gradients.update(of_all(role, full_gradients)))
            done = optimizer_step(job, role, step)
            if done:
                names = ("loss", "balance_loss", "z_loss", "distinct_experts", "grad_norm")
                gates = {f"gate {layer}": gate for layer, gate in enumerate(done.layer_gates)}
                entropies = {} if done.entropy_loss is None else {"entropy_loss": done.entropy_loss}
                scalars.append({name: getattr(done, name) for name in names} | gates | entropies)
        job.close()
    return gradients, scalars


class Reference:
    """The exported model with the losses written out, under autograd."""

    def __init__(self, recipe: Recipe, weights: Numbers):
        from trainer.export.exported_model import stored_tensors
        from trainer.export.model_files.modeling_unipool import UniPoolForCausalLM
        from trainer.export.saved_run import model_config

        owners, more = None, {}
        if recipe.lock and recipe.lock.allocation == "random":
            owners = list(random_ownership(recipe.model.layers, recipe.pool.experts, recipe.run.seed).owners)
            more = {"expert_owners": owners}
        self.owners_M = None if owners is None else torch.tensor(owners)
        config = model_config(recipe, **more)
        config._attn_implementation = "eager"
        self.recipe, self.config = recipe, config
        self.model = UniPoolForCausalLM(config)
        stored = stored_tensors(self.model)
        for name, parts in self._names():
            for part, value in zip(parts, weights[name].split([shape[0] for shape in parts.values()]), strict=True):
                stored[part].copy_(value)

    def _names(self) -> Iterator[tuple[str, Parts]]:
        yield from trunk_names(self.recipe).items()
        for expert in range(self.recipe.pool.experts):
            for name, parts in expert_names(self.recipe, expert).items():
                yield f"expert/{expert}/{name}", parts

    def forward(self, sequences_BS1: Tensor) -> tuple[Numbers, Tensor, Tensor]:
        """(scalars, mean scores P_LM, loads f_LM) of a micro-batch."""
        out = self.model(input_ids=sequences_BS1[:, :-1], output_router_logits=True)
        loss = F.cross_entropy(out.logits.flatten(0, 1), sequences_BS1[:, 1:].flatten())
        means, loads, z_losses = [], [], []
        chosen_experts: list[Tensor] = []  # by their ids in the whole pool
        scalars = {"loss": loss}
        layers_of_a_group = self.recipe.model.layers // self.recipe.model.groups
        for number, (layer, z_TM) in enumerate(zip(self.model.model.layers, out.router_logits, strict=True)):
            s_TM = self._scores(layer.router, z_TM)
            if self.owners_M is not None:
                foreign_M = self.owners_M != number
                s_TM, z_TM = s_TM * ~foreign_M, z_TM.masked_fill(foreign_M, -math.inf)
            preference_TM = s_TM + layer.router.expert_bias if layer.router.kind == "sigmoid_bias" else z_TM
            chosen_TK = preference_TM.topk(self.recipe.router.top_k).indices
            chosen_experts.append(chosen_TK + number // layers_of_a_group * z_TM.shape[1])
            gates_T = s_TM.gather(1, chosen_TK).sum(1)
            shares = layer.router.kind == "sigmoid_bias" and self.recipe.router.top_k > 1  # of a sum of 1
            shares = shares or self.recipe.router.renormalize
            scalars[f"gate {number}"] = (gates_T / gates_T if shares else gates_T).mean()
            if self.recipe.balance.scores == "normalized":
                s_TM = s_TM / s_TM.sum(1, keepdim=True).clamp(min=1e-300)
            means.append(s_TM.mean(0))
            loads.append(F.one_hot(chosen_TK, z_TM.shape[1]).double().mean((0, 1)))
            z_losses.append(out.router_logits[number].exp().sum(1).log().square().mean())
        scalars["z_loss"] = self.recipe.router.z_loss * torch.stack(z_losses).sum()
        met = [len(set(experts)) for experts in torch.cat(chosen_experts, dim=1).tolist()]
        scalars["distinct_experts"] = torch.tensor(met).double().mean()
        return scalars, torch.stack(means), torch.stack(loads)

    def _scores(self, router: Any, z_TM: Tensor) -> Tensor:
        if router.kind == "norm":  # eq. 7
            c = self.config.router_constant * self.config.router_constant_factor
            return router.sigma * c * z_TM.clamp(min=0) / (z_TM.square().sum(1, keepdim=True).sqrt() + 1e-8)
        if router.kind == "softmax":
            return z_TM.exp() / z_TM.exp().sum(1, keepdim=True)
        return 1 / (1 + (-z_TM).exp())

    def balance_loss(self, p_LM: Tensor, f_LM: Tensor) -> Tensor:
        """Layer losses M sum_i f_i P_i, and of each group of layers M sum_i fbar_i Pbar_i (eq. 4-6)."""
        experts, balance = p_LM.shape[1], self.recipe.balance
        total = balance.layer * experts * (f_LM * p_LM).sum()
        for f_gM, p_gM in zip(f_LM.chunk(self.recipe.model.groups), p_LM.chunk(self.recipe.model.groups), strict=True):
            total = total + balance.pool * experts * (f_gM.mean(0) * p_gM.mean(0)).sum()
        return total

    def entropy_loss(self, p_LM: Tensor, step: int) -> Tensor:
        """Mean over the layers of (H - ln of a layer's own experts)^2, in a full stage of 4 steps or locked."""
        lock, m = self.recipe.lock, self.recipe.model
        if lock is None:
            return torch.zeros(())
        total = torch.zeros(())
        for p_M in p_LM / (p_LM.sum(1, keepdim=True) + 1e-8):
            entropy = -(p_M * (p_M + 1e-8).log()).sum()
            total = total + (entropy - math.log(self.recipe.pool.experts / m.layers)) ** 2
        return lock.entropy * (step + 1) / 4 * total / m.layers

    def gradients(self, objective: Tensor) -> Numbers:
        """By the trainer's names."""
        from trainer.export.exported_model import stored_tensors

        objective.backward()
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.data = parameter.grad  # so that the stacks are taken apart as the weights are
        found = stored_tensors(self.model)
        learning = ((name, parts) for name, parts in self._names() if not name.endswith("expert_bias_M"))
        return {name: torch.cat([found[part] for part in parts]) for name, parts in learning}


def expected(recipe: Recipe, weights: Numbers) -> tuple[Numbers, list[dict[str, float]]]:
    """What `trained` must come to."""
    r, ranks = recipe, recipe.parallel.trunk_ranks
    stream = SequenceStream([tokens(recipe)], 0)
    loads: dict[tuple[int, int], Tensor] = {}  # by trunk rank and micro-batch
    scalars = []
    for step in range(STEPS):
        reference = Reference(recipe, weights)
        sums: Numbers = {}
        for rank in range(ranks):
            batches = stream.micro_batches(step, r.train.global_batch, rank, ranks, r.train.micro_batch)
            for number, sequences_BS1 in enumerate(batches, step * r.micro_batches):
                found, p_LM, loads[rank, number] = reference.forward(sequences_BS1)
                f_LM = _load(recipe, loads, rank, number, step)
                found["balance_loss"] = torch.zeros(()) if f_LM is None else reference.balance_loss(p_LM, f_LM)
                if recipe.lock:
                    found["entropy_loss"] = reference.entropy_loss(p_LM, step)
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value / (r.micro_batches * ranks)
        losses = [value for name, value in sums.items() if name.endswith("loss")]
        gradients = reference.gradients(torch.stack(losses).sum())
        norm = sum(g.square().sum() for g in gradients.values()) ** 0.5
        scalars.append({name: value.item() for name, value in (sums | {"grad_norm": norm}).items()})
    return gradients, scalars


def _load(recipe: Recipe, loads: dict[tuple[int, int], Tensor], rank: int, number: int, step: int) -> Tensor | None:
    """f_LM of a micro-batch; None if it has no balance loss."""
    b = recipe.balance
    if b.scope == "micro_batch":
        return loads.get((rank, number - b.delay))
    of_step = [load for (_, n), load in loads.items() if n // recipe.micro_batches == step - b.delay]
    return torch.stack(of_step).mean(0) if of_step else None


WHOLE = {"full_fraction": 1.0, "anneal_fraction": 0.0, "entropy": 0.4}
NORMALIZED = {"layer": 0.07, "pool": 0.3, "scope": "micro_batch", "delay": 1, "scores": "normalized"}


@pytest.mark.parametrize(
    "sections",
    [
        {
            "router": {"top_k": 2, "z_loss": 0.03, "constant_factor": 0.7},
            "balance": {"pool": 0.3, "scope": "micro_batch", "delay": 0},
        },
        {"router": {"top_k": 2, "z_loss": 0.03}, "balance": {"pool": 0.3}, "parallel": {"trunk_ranks": 2}},
        {
            "router": {"top_k": 1, "z_loss": 0.01},
            "balance": NORMALIZED,
            "pool": {"recompute": True, "stash_bytes": 1},
            "train": {"recompute": True},
            "parallel": {"pool_ranks": 2, "lanes": 2},
        },
        {
            "model": {"private_ffn": 11},
            "router": {"top_k": 2, "z_loss": 0.03},
            "balance": {"pool": 0.3},
            "train": {"recompute": True},
            "parallel": {"trunk_ranks": 2, "pool_ranks": 1, "trunk_zero": 1},
        },
        {
            "model": {"layers": 4, "groups": 2},
            "router": {"kind": "softmax", "top_k": 2, "z_loss": 0.03},
            "balance": {"layer": 0.2, "pool": 0.4, "scope": "micro_batch", "delay": 0},
            "parallel": {"trunk_ranks": 2, "pool_ranks": 1},
        },
        {
            "model": {"groups": 3},
            "pool": {"experts": 12},
            "router": {"kind": "sigmoid_bias", "top_k": 2, "z_loss": 0.03, "bias_rate": 0.0},
            "balance": NORMALIZED | {"scope": "global_batch"},
            "parallel": {"trunk_ranks": 2, "pool_ranks": 2, "expert_parallel": 1},
        },
        {
            "model": {"head_dim": 8, "qk_norm": "head", "qkv_bias": True, "private_ffn": 11, "private_gate": True},
            "router": {"kind": "softmax", "top_k": 2, "renormalize": True, "logit_bias": True},
            "balance": {"pool": 0.3},
            "train": {"recompute": True},
            "parallel": {"trunk_ranks": 2, "layout": "every_rank"},
        },
        {
            "pool": {"experts": 12},
            "router": {"top_k": 2},
            "balance": {"pool": 0.3},
            "lock": WHOLE,
            "parallel": {"pool_ranks": 1},
        },
        {
            "pool": {"experts": 12},
            "router": {"top_k": 2, "z_loss": 0.03},
            "balance": NORMALIZED,
            "lock": WHOLE | {"allocation": "random"},
            "train": {"recompute": True},
            "parallel": {"trunk_ranks": 2},
        },
    ],
    ids=[
        "colocated",
        "2 trunk ranks",
        "1+2, recompute",
        "private expert, 2+1",
        "groups, 2+1",
        "sigmoid, 2+2 replicas",
        "keys of imported models, every rank",
        "full",
        "locked",
    ],
)
def test_as_autograd_has_them(sections: dict[str, Any]) -> None:
    recipe = recipe_of(sections)
    with float32_is_float64():
        weights = some_weights(recipe)
        gradients, scalars = expected(recipe, weights)
    found, found_scalars = trained(recipe, weights)
    for mine, other in zip(found_scalars, scalars, strict=True):
        assert mine == pytest.approx(other, rel=1e-10, abs=0)
    assert scalars[-1]["balance_loss"] > 0.01
    assert found.keys() == gradients.keys()
    for name, value in gradients.items():
        worst, largest = (found[name] - value).abs().max().item(), value.abs().max().item()
        assert worst <= 1e-10 * largest, f"{name} differs by {worst:.3g}, its largest element is {largest:.3g}"
