"""A pool with fewer experts: those whose outputs are most alike become one.

How alike two experts are, the redundancy probe says: the cosine of their outputs for the same tokens of every layer.
Clusters of experts grow by the mean cosine between them until there are as many as wanted. Of each cluster one expert
stays, the one that is most alike to the others; weights are not averaged, because hidden units of different experts
have different orders. A layer's router gives it the sum of what its members had at the logits' biases (Eq. M9 of
docs/method.md): their rows' mean, weighted by the exponentials of their biases, and the logarithm of the sum of these.

Letters: M experts before, m experts after, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.common.errors import UserError
from trainer.export.loaded_model import load_model
from trainer.importing.source import Source
from trainer.probe.adapters import adapt
from trainer.probe.redundancy import redundancy
from trainer.probe.text import read_text

TOKENS = 4096
"""Tokens of the text that the probe reads."""


def merged(source: Source, experts: int, text: Path, seed: int) -> Source:
    """Return a model with one pool as one with fewer experts.

    Args:
        source: A run or an export whose layers have experts.
        experts: m.
        text: The file on whose tokens outputs are compared.
        seed: Seed of the choice of tokens.

    Raises:
        UserError: Its layers share no pool, its router is no softmax, or `experts` is not below the number that it has.
    """
    model, router = source.sections["model"], dict(source.sections["router"])
    M = source.sections["pool"]["experts"]
    if model.get("groups", 1) > 1:
        raise UserError(f"--merge: {source.path}: its layers share no pool; `unipool upcycle` makes it one that does")
    if router.get("kind", "norm") != "softmax":
        raise UserError(f"--merge: {source.path}: router.kind = {router.get('kind', 'norm')}: merging needs softmax")
    if not max(2, router.get("top_k", 1)) <= experts < M:
        raise UserError(f"--merge: --experts {experts}: must be from {max(2, router.get('top_k', 1))} to {M - 1}")
    loaded = load_model(source.path)
    result = redundancy(adapt(loaded), read_text(loaded, text, TOKENS), seed=seed)
    clusters = clustered(np.array(result.banks[0].outputs_matrix), experts)
    kept = [members[stays] for members, stays in clusters]
    given = bool(router.get("logit_bias"))

    def read(name: str) -> Tensor:
        if found := re.fullmatch(r"model\.experts\.(\d+)\.(.+)", name):
            return source.read(f"model.experts.{kept[int(found[1])]}.{found[2]}")
        if not (found := re.fullmatch(r"(.+\.router\.)(weight|bias)", name)):
            return source.read(name)
        bias_M = source.read(f"{found[1]}bias").float() if given else torch.zeros(M)
        if found[2] == "bias":
            return torch.stack([bias_M[members].logsumexp(0) for members, _ in clusters])
        rows_MD = source.read(name).float()
        return torch.stack([bias_M[members].softmax(0) @ rows_MD[members] for members, _ in clusters])

    sections = source.sections | {"pool": {**source.sections["pool"], "experts": experts}}
    return replace(source, sections=sections | {"router": {**router, "logit_bias": True}}, read=read)


def clustered(cosine_MM: NDArray[np.float64], count: int) -> Sequence[tuple[list[int], int]]:
    """Return the members of each of `count` clusters, in the order of their first ones, and which of them stays."""
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    distance_MM = np.clip(1 - (cosine_MM + cosine_MM.T) / 2, 0, None)
    np.fill_diagonal(distance_MM, 0)
    numbers_M = cut_tree(linkage(squareform(distance_MM, checks=False), "average"), n_clusters=count).flatten()
    clusters = [np.flatnonzero(numbers_M == number).tolist() for number in dict.fromkeys(numbers_M.tolist())]
    return [(members, int(distance_MM[np.ix_(members, members)].sum(0).argmin())) for members in clusters]
