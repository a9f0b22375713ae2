"""A dense model, or one whose layers have their own experts, as a model with one pool that computes the same at first.

All experts that a layer had, or copies of its FFN, become experts of the pool, in the order of the layers. The layer's
router starts at these, its own experts; every layer can choose every expert, and training decides. How the start stays
exact depends on the router:

    softmax       logits have a bias (`router.logit_bias`), 0 for a layer's own experts and minus `distance` for foreign
                  ones; the rows of foreign experts are 0. A dense model's copies share gate values with a sum of 1.
    norm          rows of foreign experts are 0: their scores are 0, and they do not change the norm over all logits.
                  sigma takes up the other constant c. A dense model's two copies have rows w and -w, so that the larger
                  score is always sigma * c / sqrt(2) (Eq. M7 of docs/method.md), which begins as 1.
    sigmoid_bias  the expert bias of foreign experts lies 1 below the smallest of the layer's own.

Letters: L layers, M experts in the pool, E experts that were a layer's own, D hidden.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from router import norm_constant
from trainer.common.errors import UserError
from trainer.importing.families import Sections
from trainer.importing.source import Source

BELOW = 1.0
"""How far the selection bias of foreign experts begins below that of a layer's own: sigmoid scores are at most 1."""


@dataclass(frozen=True)
class How:
    """What to make of a model.

    Attributes:
        experts: M, for a dense model; None takes all experts that there are.
        top_k: Experts per token, for a dense model.
        router: "softmax" or "norm", for a dense model.
        noise: Standard deviation of what is added to the copies of an FFN, relative to that of the FFN's weights, and
            to the rows of foreign experts, relative to that of the layer's own rows. With 0 the start is exact.
        distance: How far below a layer's own experts its softmax router begins with foreign ones, in nats.
        seed: Seed of the noise, and of a dense model's routers.
    """

    experts: int | None = None
    top_k: int = 2
    router: str = "softmax"
    noise: float = 0.0
    distance: float = 30.0
    seed: int = 0


def upcycled(source: Source, how: How) -> Source:
    """Return a model with one pool of experts that computes what `source` does.

    Raises:
        UserError: The shapes do not allow it, or the layers of `source` share one pool already.
    """
    model = source.sections["model"]
    return _from_dense(source, how) if model["ffn"] == "dense" else _from_experts(source, how)


def _from_dense(source: Source, how: How) -> Source:
    model, path = source.sections["model"], source.path
    layers = model["layers"]
    M = 2 * layers if how.experts is None else how.experts
    copies = M // layers
    if M % layers or not M:
        raise UserError(f"--experts {M}: must be a multiple of the {layers} layers of {path}, for equally many copies")
    if how.router == "norm" and (copies, how.top_k) != (2, 1):
        raise UserError(
            f"--router norm: must have --top-k 1 and --experts {2 * layers}, two for each layer of {path}; only then "
            "do gate values not depend on the token"
        )
    if how.router == "softmax" and not 2 <= how.top_k <= copies:
        raise UserError(
            f"--top-k {how.top_k}: must be from 2 to the copies of a layer's FFN ({copies}): every chosen expert must "
            "be one, and routers learn nothing from a gate value of 1"
        )
    router = {"kind": how.router, "top_k": how.top_k}
    if how.router == "softmax":
        router |= {"renormalize": True, "logit_bias": True}
    sigma = math.sqrt(2) / norm_constant(M, 1) if how.router == "norm" else 1.0

    def own_rows(name: str) -> Tensor:
        rows_ED = model["init_std"] * _normal((copies, model["hidden"]), name, how.seed)
        return torch.stack((rows_ED[0], -rows_ED[0])) if how.router == "norm" else rows_ED

    def own_value(name: str) -> Tensor:
        if name.endswith(".sigma"):
            return torch.tensor([sigma])
        return own_rows(name) if name.endswith(".router.weight") else torch.zeros(copies)

    def read(name: str) -> Tensor:
        found = re.fullmatch(r"model\.experts\.(\d+)\.(\w+_proj\.weight)", name)
        if not found:
            return source.read(name)
        weight = source.read(f"model.layers.{int(found[1]) // copies}.mlp.{found[2]}")
        return noisy(weight, weight, name, how)

    sections = {"model": model | {"ffn": "pool", "groups": 1}, "router": router, "pool": {"experts": M}}
    return _routed(source, sections | {"balance": {"pool": 1e-2}}, read, own_value, copies, how)


def _from_experts(source: Source, how: How) -> Source:
    sections, path = source.sections, source.path
    model, router, M = sections["model"], dict(sections["router"]), sections["pool"]["experts"]
    groups = model.get("groups", 1)
    if groups == 1:
        raise UserError(f"{path}: its layers share one pool already; `unipool resize` changes its size")
    if how.experts not in (None, M):
        raise UserError(
            f"--experts {how.experts}: must be left out: the pool has all {M} experts of {path}; see `unipool resize`"
        )
    E, kind, balance = M // groups, router.get("kind", "norm"), sections.get("balance", {})
    if kind == "softmax":
        router["logit_bias"] = True
    if balance.get("layer"):
        balance = {**balance, "layer": 0.0, "pool": balance["layer"]}
    given = bool(sections["router"].get("logit_bias"))
    top_k = router.get("top_k", 1)
    sigma = norm_constant(E, top_k) / norm_constant(M, top_k) if kind.startswith("norm") else 1.0

    def own_value(name: str) -> Tensor:
        if name.endswith(".router.bias") and not given:
            return torch.zeros(E)
        return source.read(name) * sigma if name.endswith(".sigma") else source.read(name)

    new = {"model": model | {"groups": 1}, "router": router, "pool": sections["pool"]}
    if balance:
        new["balance"] = balance
    return _routed(source, new, source.read, own_value, E, how)


def _routed(
    source: Source,
    sections: Sections,
    read: Callable[[str], Tensor],
    own_value: Callable[[str], Tensor],
    E: int,
    how: How,
) -> Source:
    """Return a model whose routers start at their layers' own experts.

    Args:
        read: Reads every tensor that is not a router's.
        own_value: Returns a router's tensor for the E own experts of its layer, or its sigma.
    """
    M, layers = sections["pool"]["experts"], sections["model"]["layers"]
    kind = sections["router"].get("kind", "norm")

    def whole(name: str) -> Tensor:
        found = re.fullmatch(r"model\.layers\.(\d+)\.router\.(\w+)", name)
        if not found:
            return read(name)
        layer, part = int(found[1]), found[2]
        if part == "sigma":
            return own_value(name)
        first = layer * (M // E) // layers * E
        if part == "expert_bias" and kind == "norm_bias":  # all layers have that of all experts
            firsts = range(0, layers, layers * E // M)
            return torch.cat([own_value(f"model.layers.{other}.router.expert_bias") for other in firsts])
        own = own_value(name).float()
        if part == "weight":
            all_M = noisy(torch.zeros(M, own.shape[1]), own, name, how)
        else:
            all_M = torch.full((M,), -how.distance if part == "bias" else float(own.min()) - BELOW)
        all_M[first : first + E] = own
        return all_M

    return replace(source, sections=sections, read=whole)


def noisy(weight: Tensor, like: Tensor, name: str, how: How) -> Tensor:
    """Add noise to a tensor, of `how.noise` times the standard deviation of another."""
    if not how.noise:
        return weight
    return weight.float() + how.noise * like.float().std() * _normal(weight.shape, name, how.seed)


def _normal(shape: tuple[int, ...] | torch.Size, name: str, seed: int) -> Tensor:
    """Draw from N(0, 1) by (seed, name)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode(), seed)))
