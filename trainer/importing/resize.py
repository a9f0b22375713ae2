"""A model with more experts, the busiest of which are split in two, or with fewer, without those that add least.

Growing keeps what the model computes, if no noise is asked for. Both halves of a split expert have its weights. What
the routers do about them depends on whether a token can choose one of the two without a change of anything else:

    equal halves    Both have the expert's row, so that a token that chose the expert finds two equal logits and takes
                    one of them. This is exact for top-1 with sigmoid scores, or if *all* experts are split: the norm
                    of a NormRouter is then sqrt(2) times as large, which sigma makes up for, and the probabilities of
                    a softmax are halved, for which W2 is doubled. With noise, a NormRouter takes equal halves also if
                    some experts are split, because then the start is not exact anyway: tokens choose as before, but
                    gate values change with the share that split experts have in a token's norm.
    waiting halves  Otherwise two equal rows would take two of a token's K places, or change other gate values. No
                    second row that tokens choose avoids that: the squares, or the exponentials, of the two logits must
                    have the sum that one logit had, for every token, so the rows are parallel, and the larger logit
                    must be the old one, which leaves nothing for the other. So the second half begins where no token
                    chooses it: its softmax logit lies `distance` lower, its sigmoid selection bias 1 below the
                    smallest, and a NormRouter has `WAITING` times the row. From there training moves it: the
                    selection bias by its rate, a NormRouter's row by the pool loss over normalised scores. A
                    NormRouter with raw scores and no bias gives it no gradient, unless noise is added.

Pruning removes the experts that add least to the residual stream of all layers, by the sum of the squares of their
outputs, and leaves the weights and rows of the others as they are. A token that chose a removed expert chooses the next
best. A softmax divides the removed probability among the others, in proportion to theirs. The norm of a NormRouter
loses the removed logits, which sigma makes up for on average.

Sigma follows from the rows W, as if a token's squared norm were in proportion to the sum of the squares of all entries,
which it is exactly where all experts are split or none is chosen: sigma' = sigma * c(M, K) / c(M', K) * |W'| / |W|
(Eq. M7 and M8 of docs/method.md).

Letters: M experts, G sub-pools (`model.groups`), E = M / G experts that a layer can choose from, e of them afterwards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router import norm_constant
from trainer.checkpoint.format import read_load
from trainer.common.errors import UserError
from trainer.export.folder import is_export
from trainer.export.saved_run import find_run
from trainer.importing.source import Source
from trainer.importing.upcycle import BELOW, How, noisy

WAITING = 1e-6
"""Factor of a waiting half's row in a NormRouter: positive where the expert's score is, and behind all other such."""
TOKENS = 16_384
"""Tokens of a text on which the load is counted."""


@dataclass(frozen=True)
class Usage:
    """How the experts are used, by all layers together.

    Attributes:
        load_M: The tokens that each got, int64.
        added_M: What each added to the residual stream: the sum of its outputs' squared norms, gate values included,
            float64. None if only the load is known.
    """

    load_M: NDArray[np.int64]
    added_M: NDArray[np.float64] | None = None


def recorded(source: Source) -> Usage:
    """Return the load of a run's last steps, as its checkpoint has it, averaged.

    Raises:
        UserError: It is no run, or the checkpoint is damaged.
    """
    if is_export(source.path):
        raise UserError(f"{source.path}: has no record of its experts' load; count it on a text with --text FILE")
    return Usage(read_load(find_run(source.path).folder).sum(0))


def measured(source: Source, text: Path | None) -> Usage:
    """Measure the usage on a text; None: on the held-out text of a run.

    Raises:
        UserError: The text cannot be read, or there is none.
    """
    from trainer.probe.adapters import Choice, MoELayer
    from trainer.probe.adapters import load as load_source
    from trainer.probe.text import read, read_text

    model = load_source(str(source.path), own_text=text is None)
    usage = Usage(np.zeros(model.experts, np.int64), added_M := np.zeros(model.experts))

    @torch.no_grad()
    def see(layer: MoELayer, choice: Choice) -> None:
        for expert in choice.topk_expert_ids_TK.unique().tolist():
            tokens, places = (choice.topk_expert_ids_TK == expert).nonzero(as_tuple=True)
            y_nD = layer.bank.run(expert - layer.bank.first, choice.x_TD[tokens]).float()
            gate_n1 = choice.topk_scores_TK[tokens, places].float().unsqueeze(1)
            usage.load_M[expert] += len(tokens)
            added_M[expert] += float((gate_n1 * y_nD).square().sum())

    read(model, read_text(model.loaded, text, TOKENS), see)
    return usage


def check_experts(source: Source, experts: int) -> bool:
    """Return whether a model with `experts` experts is larger.

    Raises:
        UserError: The model has no experts, or cannot have this number of them.
    """
    model, path = source.sections["model"], source.path
    if model["ffn"] == "dense":
        raise UserError(f"{path}: is dense; `unipool upcycle` makes it a model with a pool of experts")
    M, groups = source.sections["pool"]["experts"], model.get("groups", 1)
    least = groups * source.sections["router"].get("top_k", 1)
    if experts == M or experts % groups or not least <= experts <= 2 * M:
        each = f"a multiple of the {groups} sub-pools of {path}, " if groups > 1 else ""
        raise UserError(f"--experts {experts}: must be {each}from {least} to {2 * M}, and not the {M} that {path} has")
    return experts > int(M)


def resized(source: Source, experts: int, usage: Usage, how: How) -> tuple[Source, str]:
    """Return a model with another number of experts, in each sub-pool equally many, and what was done, in a line.

    New experts follow the others of their sub-pool, whose order stays.

    Args:
        source: A model whose layers have experts.
        experts: M', up to twice the number that the model has.
        usage: Those of the largest load are split; those that add least, which must be known then, are removed.
        how: Noise of the second halves, the distance of waiting ones in a softmax, and the seed.

    Raises:
        UserError: The model has no experts, cannot have this number of them, or computes values that are not finite.
    """
    grows = check_experts(source, experts)
    model, router = source.sections["model"], dict(source.sections["router"])
    M, groups, layers = source.sections["pool"]["experts"], model.get("groups", 1), model["layers"]
    E, e = M // groups, experts // groups
    kind, top_k = router.get("kind", "norm"), router.get("top_k", 1)
    has_norm, given = kind in ("norm", "norm_bias"), bool(router.get("logit_bias"))

    rank_M = usage.load_M if grows else usage.added_M
    assert rank_M is not None
    if broken := np.count_nonzero(~np.isfinite(rank_M)):
        raise UserError(f"{source.path}: the outputs of {broken} of its {M} experts are not finite on this text")
    order_GE = (-rank_M.reshape(groups, E)).argsort(axis=1, kind="stable")
    if grows:
        changed_Gn = np.sort(order_GE[:, : e - E])
        from_Ge = np.concatenate([np.tile(np.arange(E), (groups, 1)), changed_Gn], axis=1)
    else:
        changed_Gn, from_Ge = order_GE[:, e:], np.sort(order_GE[:, :e])
    equal = grows and top_k == 1 and (kind == "sigmoid_bias" or e == 2 * E or (has_norm and how.noise > 0))
    waiting = grows and not equal
    if waiting and kind == "softmax":
        router["logit_bias"] = True

    def rows(name: str, ids_e: NDArray[np.int64]) -> Tensor:
        rows_eD = source.read(name).float()[ids_e]
        if grows:
            factor = WAITING if waiting and has_norm else 1.0
            rows_eD[E:] = noisy(rows_eD[E:] * factor, rows_eD[E:], name, how)
        return rows_eD

    def routers(name: str, layer: int, part: str) -> Tensor:
        ids_e = from_Ge[layer * groups // layers]
        weight = f"model.layers.{layer}.router.weight"
        if part == "weight":
            return rows(name, ids_e)
        if part == "sigma":
            growth = rows(weight, ids_e).norm() / source.read(weight).float().norm()
            factor = float(growth) * norm_constant(E, top_k) / norm_constant(e, top_k)
            return factor * source.read(name)
        old_E = source.read(name) if part != "bias" or given else torch.zeros(E)
        new_e = old_E.float()[ids_e]
        if waiting and part == "bias":
            new_e[E:] -= how.distance
        elif waiting:
            new_e[E:] = old_E.min() - (0.0 if has_norm else BELOW)
        return new_e

    def read(name: str) -> Tensor:
        if found := re.fullmatch(r"model\.layers\.(\d+)\.router\.(\w+)", name):
            return routers(name, int(found[1]), found[2])
        if not (found := re.fullmatch(r"model\.experts\.(\d+)\.(\w+)", name.removesuffix("_proj.weight"))):
            return source.read(name)
        group, place = divmod(int(found[1]), e)
        weight = source.read(f"model.experts.{group * E + from_Ge[group, place]}.{found[2]}_proj.weight")
        if equal and kind == "softmax" and found[2] == "down":  # the probabilities are half as large
            weight = 2 * weight
        return noisy(weight, weight, name, how) if place >= E else weight

    changed = (changed_Gn + E * np.arange(groups)[:, None]).flatten()
    loads = f"{usage.load_M[changed].sum() / max(1, usage.load_M.sum()):.1%} of the load"
    if grows:
        said = f"the busiest {len(changed)} ({loads}) are split into {'equal' if equal else 'waiting'} halves"
    else:
        added = rank_M[changed].sum() / max(rank_M.sum(), np.finfo(np.float64).tiny)
        said = f"the {len(changed)} that add least ({added:.1%}, at {loads}) are gone"
    sections = source.sections | {"router": router, "pool": source.sections["pool"] | {"experts": experts}}
    return replace(source, sections=sections, read=read), f"{M} -> {experts} experts: {said}"
