"""UniPool-lock from beginning to end, compared with a slow model under autograd in float64 that shares no code with it.

Letters: B batch, S sequence, D hidden, H heads, T tokens, K top-k, L layers, M experts in the pool.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.double import float32_is_float64
from tests.training import run_training, tiny, tokens
from trainer.config.recipe import Recipe
from trainer.data.batches import SequenceStream

Numbers = dict[str, Tensor]
FULL, ANNEAL, STEPS = 3, 2, 7


def initial_weights(recipe: Recipe) -> Numbers:
    """What the trainer begins with, in float64."""
    from pool.shard import ExpertShard
    from trainer.model.trunk import Trunk, init_stds

    shard = ExpertShard(tuple(range(recipe.pool.experts)), recipe.model.hidden, recipe.model.ffn_hidden, torch.float64)
    shard.reset_parameters(*init_stds(recipe), recipe.run.seed)
    weights = {name: value.detach().clone() for name, value in Trunk(recipe, torch.device("cpu")).named_parameters()}
    for name, stacked in shard.named_parameters():
        weights |= {f"expert/{e}/{name}": value.detach().clone() for e, value in enumerate(stacked)}
    return {name: value.requires_grad_() for name, value in weights.items()}


class Reference:
    """A run, written from the method's description: every layer computes all scores, every expert its own tokens."""

    def __init__(self, recipe: Recipe, weights: Numbers, constant: float):
        self.r, self.w, self.constant = recipe, weights, constant
        self.owners: list[int] | None = None
        self.held_out: list[Tensor] = []
        self.fbar_M: Tensor | None = None  # of the last step, for the scope global_batch

    def reach(self, layer: int, step: int) -> tuple[Tensor, Tensor]:
        """Factors of the scores, and which experts may be chosen."""
        experts = self.r.pool.experts
        everything = torch.ones(experts, dtype=torch.bool)
        if self.owners is None:
            return torch.ones(experts), everything
        own_M = torch.tensor([owner == layer for owner in self.owners])
        if self.r.lock and (self.r.lock.allocation == "random" or step >= FULL + ANNEAL):
            return own_M.double(), own_M
        alpha = (1 - math.cos(math.pi * (step - FULL) / ANNEAL)) / 2
        return torch.where(own_M, 1.0, 1 - alpha), everything

    def forward(self, sequences_BS1: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(cross-entropy, mean scores P_LM, assignments n_LM)."""
        r, w = self.r, self.w
        h_BSD = w["embedding.weight"][sequences_BS1[:, :-1]]
        means, loads = [], []
        for layer in range(r.model.layers):
            name = f"blocks.{layer}."
            h_BSD = h_BSD + self.attention(norm(h_BSD, w[name + "attention_norm.weight"]), name + "attention.")
            x_TD = norm(h_BSD, w[name + "ffn_norm.weight"]).flatten(0, 1)
            z_TM = x_TD @ w[name + "router.weight_MD"].T
            factor_M, allowed_M = self.reach(layer, step)
            length_T1 = (z_TM**2).sum(1, keepdim=True) ** 0.5
            s_TM = factor_M * w[name + "router.sigma"] * self.constant * (z_TM / (length_T1 + 1e-8)).clamp(min=0)
            # Where there are fewer positive scores than top-k, the largest other logits follow.
            order_TM = torch.where(s_TM > 0, s_TM, z_TM.clamp(max=0)).masked_fill(~allowed_M, -math.inf)
            y_TD = torch.zeros_like(x_TD)
            load_M = torch.zeros(r.pool.experts)
            for token, order_M in enumerate(order_TM.tolist()):
                for expert in sorted(range(len(order_M)), key=lambda e: -order_M[e])[: r.router.top_k]:
                    w1_FD, w3_FD = w[f"expert/{expert}/w13_e2FD"].chunk(2)
                    hidden_F = F.silu(w1_FD @ x_TD[token]) * (w3_FD @ x_TD[token])
                    e_D = w[f"expert/{expert}/w2_eDF"] @ hidden_F
                    y_TD = y_TD.index_add(0, torch.tensor([token]), (s_TM[token, expert] * e_D).unsqueeze(0))
                    load_M[expert] += 1
            h_BSD = h_BSD + y_TD.view_as(h_BSD)
            means.append(s_TM.mean(0))
            loads.append(load_M)
        logits_BSV = norm(h_BSD, w["head.norm.weight"]) @ w["head.out.weight"].T
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), sequences_BS1[:, 1:].flatten())
        return loss, torch.stack(means), torch.stack(loads)

    def attention(self, x_BSD: Tensor, name: str) -> Tensor:
        m = self.r.model
        size, length = m.hidden // m.heads, x_BSD.shape[1]
        heads = (x_BSD @ self.w[name + "qkv.weight"].T).unflatten(-1, (-1, size)).transpose(1, 2)
        q, k, v = heads.split([m.heads, m.kv_heads, m.kv_heads], 1)
        angles = torch.outer(torch.arange(length).double(), m.rope_base ** (-torch.arange(0, size, 2) / size))

        def turned(x: Tensor) -> Tensor:
            z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
            return torch.cat((z.real, z.imag), -1)

        k, v = (t.repeat_interleave(m.heads // m.kv_heads, 1) for t in (turned(k), v))
        weights = (turned(q) @ k.transpose(-1, -2)) / size**0.5
        later = torch.ones(length, length).triu(1).bool()
        y = weights.masked_fill(later, -math.inf).softmax(-1) @ v
        return y.transpose(1, 2).flatten(2) @ self.w[name + "out.weight"].T

    def losses(self, sequences_BS1: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(cross-entropy, pool loss, entropy loss, assignments) of a micro-batch."""
        r, lock = self.r, self.r.lock
        assert lock
        loss, p_LM, load_LM = self.forward(sequences_BS1, step)
        fbar_M = fbar(load_LM) if r.balance.scope == "micro_batch" else self.fbar_M
        pool_loss = torch.zeros(())
        if fbar_M is not None:
            pool_loss = r.balance.pool * r.pool.experts * (fbar_M * p_LM.mean(0)).sum()
        entropy_loss = torch.zeros(())
        for p_M in p_LM:
            q_M = p_M / (p_M.sum() + 1e-8)
            entropy = -(q_M * (q_M + 1e-8).log()).sum()
            entropy_loss = entropy_loss + (entropy - math.log(r.pool.experts / r.model.layers)) ** 2 / r.model.layers
        return loss, pool_loss, lock.entropy * min(1, (step + 1) / FULL) * entropy_loss, load_LM

    def train(self, batch_BS1: Tensor, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """An optimizer step; return its scalars."""
        optimizer.zero_grad()
        parts = batch_BS1.split(self.r.train.micro_batch)
        sums, load_LM = torch.zeros(3), torch.zeros(self.r.model.layers, self.r.pool.experts)
        for part in parts:
            *losses, load = self.losses(part, step)
            (sum(losses, torch.zeros(())) / len(parts)).backward()
            sums, load_LM = sums + torch.stack(losses).detach() / len(parts), load_LM + load
        self.fbar_M = fbar(load_LM)
        total = sum(float((w.grad**2).sum()) for w in self.w.values() if w.grad is not None) ** 0.5
        for weight in self.w.values():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad *= min(1, self.r.train.clip / (total + 1e-6))
        optimizer.step()
        return {**dict(zip(("loss", "balance_loss", "entropy_loss"), sums.tolist(), strict=True)), "grad_norm": total}

    @torch.no_grad()
    def evaluate(self, batch_BS1: Tensor, done: int) -> float:
        """The loss; after the last of the full phase the layers are given their experts."""
        loss, _, load_LM = self.forward(batch_BS1, done)
        self.held_out.append(load_LM)
        lock = self.r.lock
        if lock and lock.allocation == "learned" and done == FULL:
            newest = self.held_out[: -lock.evaluations - 1 : -1]
            weights = [0.5 * 0.5**age for age in range(len(newest))]
            mean_LM = sum((a * n_LM for a, n_LM in zip(weights, newest, strict=True)), torch.zeros(())) / sum(weights)
            share_LM = mean_LM / mean_LM.sum(1, keepdim=True)
            assert lock.coverage == 0.0, "so that every partition is allowed"
            best = max(partitions(*share_LM.shape), key=lambda sets: total_share(share_LM.tolist(), sets))
            self.owners = [next(layer for layer, own in enumerate(best) if e in own) for e in range(share_LM.shape[1])]
        return float(loss)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def fbar(load_LM: Tensor) -> Tensor:
    """Each expert's fraction of a layer's assignments, mean over the layers."""
    return (load_LM / load_LM.sum(1, keepdim=True)).mean(0)


def partitions(layers: int, experts: int) -> Iterator[list[tuple[int, ...]]]:
    """All ways to give every layer the same number of experts."""

    def rest(left: frozenset[int], layers_left: int) -> Iterator[list[tuple[int, ...]]]:
        if layers_left == 0:
            yield []
            return
        for own in combinations(sorted(left), len(left) // layers_left):
            for others in rest(left - set(own), layers_left - 1):
                yield [own, *others]

    return rest(frozenset(range(experts)), layers)


def total_share(share_LM: list[list[float]], sets: list[tuple[int, ...]]) -> float:
    return sum(share_LM[layer][e] for layer, own in enumerate(sets) for e in own)


LEARNED = {"allocation": "learned", "evaluations": 2}


@pytest.mark.parametrize(
    ("sections", "parallel"),
    [
        ({"lock": LEARNED}, {"trunk_ranks": 2, "pool_ranks": 1, "lanes": 2}),
        (
            {"lock": LEARNED, "router": {"top_k": 1}, "balance": {"scope": "micro_batch", "delay": 0}},
            {"trunk_zero": 0, "pool_zero": 0},
        ),
        ({"lock": {"allocation": "random"}}, {"trunk_zero": 0, "pool_zero": 0}),
    ],
    ids=["learned, 2+1", "learned top-1", "random"],
)
def test_whole_runs(sections: dict[str, Any], parallel: dict[str, Any]) -> None:
    """Losses, gradient norms, validation losses, owners, and the weights after two steps of the locked stage."""
    lock = {"full_fraction": 0.43, "anneal_fraction": 0.29, "entropy": 0.3, "coverage": 0.0, **sections.pop("lock")}
    recipe = tiny(
        pool={"experts": 9}, train={"steps": STEPS, "weight_decay": 0.3}, lock=lock, parallel=parallel, **sections
    )
    found = run_training(recipe, double=True)
    with float32_is_float64():
        from router import norm_constant

        weights = initial_weights(recipe)
        reference = Reference(recipe, weights, norm_constant(9, recipe.router.top_k))
        if recipe.lock and recipe.lock.allocation == "random":
            reference.owners = list(found.owners or ())
        matrices, vectors = ([w for w in weights.values() if (w.ndim > 1) == wanted] for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=recipe.train.betas, eps=recipe.train.eps)
        training, held_out = SequenceStream([tokens(recipe)], 0), SequenceStream([tokens(recipe)], None)
        (held_out_BS1,) = held_out.micro_batches(0, 8, 0, 1, 8)
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = found.scalars[step]["lr"]
            (batch_BS1,) = training.micro_batches(step, 8, 0, 1, 8)
            for name, value in reference.train(batch_BS1, step, optimizer).items():
                assert found.scalars[step][name] == pytest.approx(value, rel=1e-9, abs=1e-15), (step, name)
            assert found.val_losses[step] == pytest.approx(reference.evaluate(held_out_BS1, step + 1), rel=1e-10), step
    assert found.owners == tuple(reference.owners or ()) and found.owners != tuple(sorted(found.owners))
    assert found.scalars[-1]["entropy_loss"] > 1e-6 and found.scalars[-1]["balance_loss"] > 1e-3
    assert found.weights.keys() == weights.keys()
    for name, weight in ((name, weight.detach()) for name, weight in weights.items()):
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-9 * float(weight.abs().max()))
