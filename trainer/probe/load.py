"""Which layer uses which expert, and how the layers differ (expert utilisation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from router import dead_experts, effective_experts, layer_divergence, load_imbalance
from trainer.common.tables import new_table
from trainer.probe.adapters import MoEModel
from trainer.probe.text import ExpertCounts, Text, read
from trainer.telemetry.expert_heatmap import draw_heat_map, over_all_experts

if TYPE_CHECKING:
    from rich.table import Table

TOPS = (1, 2, 4, 8, 16)
"""Numbers of most used experts per layer to report the coverage of."""


@dataclass(frozen=True)
class Usage:
    """How evenly a layer, or the whole pool, uses its experts.

    Attributes:
        effective: exp of the entropy of the experts' shares.
        imbalance: The maximum load over the mean load.
        unused: The number of experts without a token.
    """

    experts: int
    effective: float
    imbalance: float
    unused: int

    def cells(self) -> tuple[str, ...]:
        return str(self.experts), f"{self.effective:.1f}", f"{self.imbalance:.2f}", str(self.unused)


@dataclass(frozen=True)
class Coverage:
    """The `top` most used experts of every layer.

    Attributes:
        union: The number of distinct ones over all layers; `of_pool` is its share of all experts.
        share: The mean share of a layer's tokens that they process.
    """

    top: int
    union: int
    of_pool: float
    share: float


@dataclass(frozen=True)
class LoadResult:
    """The result of the probe.

    Attributes:
        layers: The numbers of the layers with a router.
        groups: The number of banks; each is shared by equally many adjacent layers.
        counts: The assignments of each layer to the experts of its bank.
        owners: The layer that owns each expert, if layers choose from their own experts only.
        usage: The usage by each layer of the experts that it can choose; `pool` is that of all experts by all layers.
        divergence: The Jensen-Shannon divergence of the shares of every two layers in bits: 0 if they are the same, 1
            if they have nothing in common.
        specialisation: The mean divergence over all pairs of layers; 0 for one layer.
        shared_specialisation: The mean over pairs of layers that share a bank; None if there are none.
    """

    model: str
    text: str
    tokens: int
    top_k: int
    layers: tuple[int, ...]
    groups: int
    counts: tuple[tuple[int, ...], ...]
    usage: tuple[Usage, ...]
    pool: Usage
    coverage: tuple[Coverage, ...]
    divergence: tuple[tuple[float, ...], ...]
    specialisation: float
    shared_specialisation: float | None
    owners: tuple[int, ...] | None = None

    def rows(self) -> list[dict[str, Any]]:
        total = self.tokens * self.top_k
        first = [place * self.groups // len(self.layers) * len(self.counts[0]) for place in range(len(self.layers))]
        return [
            {"layer": layer, "expert": start + expert, "assignments": count, "share": count / total}
            for layer, start, counts in zip(self.layers, first, self.counts, strict=True)
            for expert, count in enumerate(counts)
        ]

    def tables(self) -> list[Table]:
        heads = ("layer", "experts", "effective", "max / mean", "unused", "divergence (bits)")
        made = new_table(f"{self.model}: use of experts, {self.text}", *heads)
        for place, (layer, usage) in enumerate(zip(self.layers, self.usage, strict=True)):
            others = np.delete(np.array(self.divergence[place]), place)
            made.add_row(str(layer), *usage.cells(), f"{others.mean():.3f}" if len(others) else "")
        made.add_section()
        made.add_row("all", *self.pool.cells(), f"{self.specialisation:.3f}" if len(self.layers) > 1 else "")
        tops = new_table(
            "Most used experts of each layer", "per layer", "distinct", "of all experts", "share of tokens"
        )
        for c in self.coverage:
            tops.add_row(str(c.top), str(c.union), f"{c.of_pool:.1%}", f"{c.share:.1%}")
        return [made, tops]

    def notes(self) -> list[str]:
        lines = [
            f"{self.tokens:,} tokens, top-{self.top_k}. The effective number of experts is exp of the shares' entropy.",
            "The divergence is the mean Jensen-Shannon divergence from the other layers: 0 if they use experts alike, "
            "1 if they have none in common.",
        ]
        if self.owners is not None:
            lines.append("Each layer chooses from the experts that it owns; no two layers share experts.")
        if self.groups > 1:
            shared = self.shared_specialisation
            within = "No two layers share experts" if shared is None else f"It is {shared:.3f} within a sub-pool"
            lines.append(f"{within}.")
        return lines

    def draw(self) -> Figure:
        """Draw the heat map and the totals of a run's load.png."""
        title = f"{self.model}: use of experts, {self.text}"
        figure = draw_heat_map(np.array(self.counts), title, self.groups, self.owners)
        # The numbers of layers are not their places if some layers have one FFN.
        numbers = dict(enumerate(self.layers))
        figure.axes[0].yaxis.set_major_formatter(lambda place, _: str(numbers.get(int(place), "")))
        return figure


def load(model: MoEModel, text: Text) -> LoadResult:
    """Count each layer's assignments on a text, and measure how even they are and how the layers differ."""
    counts = ExpertCounts(model)
    read(model, text, counts)
    counts_LE = torch.stack([counts.by_layer[layer.number] for layer in model.layers])
    groups = len(model.banks)
    everywhere_LM = torch.from_numpy(over_all_experts(counts_LE.numpy(), groups)).nan_to_num().long()
    divergence_LL = layer_divergence(everywhere_LM)
    return LoadResult(
        model.name,
        text.name,
        text.tokens,
        model.top_k,
        layers=tuple(layer.number for layer in model.layers),
        groups=groups,
        counts=tuple(tuple(row) for row in counts_LE.tolist()),
        usage=tuple(
            _usage(row[torch.tensor(layer.choices) - layer.bank.first])
            for layer, row in zip(model.layers, counts_LE, strict=True)
        ),
        pool=_usage(everywhere_LM.sum(0)),
        coverage=tuple(coverage(everywhere_LM, top) for top in TOPS if top <= counts_LE.shape[1]),
        divergence=tuple(tuple(row) for row in divergence_LL.tolist()),
        specialisation=_mean_over_pairs(divergence_LL, 1) or 0.0,
        shared_specialisation=_mean_over_pairs(divergence_LL, groups),
        owners=model.owners,
    )


def _usage(counts_M: Tensor) -> Usage:
    effective, imbalance = float(effective_experts(counts_M)), float(load_imbalance(counts_M))
    return Usage(len(counts_M), effective, imbalance, int(dead_experts(counts_M)))


def coverage(counts_LM: Tensor, top: int) -> Coverage:
    """Return the coverage by the `top` most used experts of each layer; experts without a token do not count."""
    used = counts_LM.sort(dim=-1, descending=True, stable=True)
    chosen_LM = torch.zeros_like(counts_LM, dtype=torch.bool).scatter(1, used.indices[:, :top], True) & (counts_LM > 0)
    union = int(chosen_LM.any(0).sum())
    share_L = used.values[:, :top].sum(1) / counts_LM.sum(1).clamp(min=1)
    return Coverage(top, union, union / counts_LM.shape[1], float(share_L.double().mean()))


def _mean_over_pairs(divergence_LL: Tensor, groups: int) -> float | None:
    """Return the mean over pairs of layers in the same of `groups` equal groups; None if there are no pairs."""
    layers = len(divergence_LL)
    group_L: NDArray[np.int64] = np.arange(layers) * groups // layers
    same_LL = torch.from_numpy(group_L[:, None] == group_L).fill_diagonal_(False)
    return float(divergence_LL[same_LL].mean()) if same_LL.any() else None
