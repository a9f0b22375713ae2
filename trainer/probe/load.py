"""Which layer uses which expert, and how the layers differ (expert utilisation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from router import dead_experts, effective_experts, layer_divergence, load_imbalance
from trainer.common.figure_style import INK, SERIES, new_figure, panel_title
from trainer.common.tables import new_table
from trainer.probe.adapters import MoEModel
from trainer.probe.text import ExpertCounts, Text, read
from trainer.telemetry.expert_heatmap import draw_shares, draw_totals, over_all_experts

if TYPE_CHECKING:
    from rich.table import Table

TOPS = (1, 2, 4, 8, 16)
"""Numbers of most used experts per layer to report the coverage of."""
_WIDEST = 1024
"""Maximum experts side by side in a plot; if layers have more of their own, the layers are drawn above each other."""


@dataclass(frozen=True)
class Usage:
    """How evenly a layer, or the whole pool, uses its experts.

    Attributes:
        experts: The number of experts.
        effective: exp of the entropy of the experts' shares.
        imbalance: The maximum load over the mean load.
        unused: The number of experts without a token.
    """

    experts: int
    effective: float
    imbalance: float
    unused: int

    def cells(self) -> tuple[str, str, str, str]:
        return str(self.experts), f"{self.effective:.1f}", f"{self.imbalance:.2f}", str(self.unused)


@dataclass(frozen=True)
class Coverage:
    """The `top` most used experts of every layer.

    Attributes:
        top: The number of experts per layer.
        union: The number of distinct ones over all layers.
        of_pool: `union` as a share of all experts.
        share: The mean share of a layer's tokens that its `top` experts process.
    """

    top: int
    union: int
    of_pool: float
    share: float


@dataclass(frozen=True)
class LoadFound:
    """The result of the probe.

    Attributes:
        layers: The numbers of the layers with a router.
        groups: The number of banks; each is shared by equally many adjacent layers.
        counts: The assignments of each layer to the experts of its bank.
        usage: The usage of each layer.
        pool: The usage of all experts by all layers.
        coverage: The coverage by the most used experts.
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

    def rows(self) -> list[dict[str, Any]]:
        total = self.tokens * self.top_k
        first = [place * self.groups // len(self.layers) * len(self.counts[0]) for place in range(len(self.layers))]
        return [
            {"layer": layer, "expert": start + expert, "assignments": count, "share": count / total}
            for layer, start, counts in zip(self.layers, first, self.counts, strict=True)
            for expert, count in enumerate(counts)
        ]

    @property
    def _layer_private(self) -> bool:
        return self.groups == len(self.layers) > 1

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
        if self._layer_private:
            lines.append("No two layers share experts.")
        elif self.groups > 1 and self.shared_specialisation is not None:
            lines.append(f"The mean divergence within a sub-pool is {self.shared_specialisation:.3f}.")
        return lines

    def draw(self) -> Figure:
        """Plot a run's load.png, and beside it the effective experts and the layers' divergence.

        If there are many experts that no two layers share, the layers are drawn above each other, without totals.
        """
        counts_LE = np.array(self.counts)
        stacked = self._layer_private and counts_LE.size > _WIDEST
        tokens_LM = counts_LE.astype(float) if stacked else over_all_experts(counts_LE, self.groups)
        below = 0.0 if stacked else 2.1
        width = float(np.clip(3 + 0.09 * tokens_LM.shape[1], 6, 18))
        height = float(np.clip(2.6 + 0.24 * len(self.layers), 4.6, 12)) - 2.1
        figure = new_figure(width + 3.4, height + below)
        if stacked:
            shares_axes, effective_axes = figure.subplots(1, 2, sharey=True, width_ratios=(width, 3))
            shares_axes.set_xlabel("expert (each layer has its own)", color=INK)
        else:
            grid = figure.add_gridspec(2, 2, width_ratios=(width, 3), height_ratios=(height, below))
            shares_axes = figure.add_subplot(grid[0, 0])
            effective_axes = figure.add_subplot(grid[0, 1], sharey=shares_axes)
            draw_totals(figure.add_subplot(grid[1, 0], sharex=shares_axes), tokens_LM)
            self._draw_divergence(figure, figure.add_subplot(grid[1, 1]))
        draw_shares(figure, shares_axes, tokens_LM)
        shares_axes.tick_params(labelbottom=stacked, bottom=stacked)
        shares_axes.yaxis.set_major_formatter(lambda place, _: self._number(place))
        self._draw_effective(effective_axes)
        panel_title(shares_axes, f"{self.model}: use of experts, {self.text}")
        return figure

    def _number(self, place: float) -> str:
        """Return the number of the layer at a place; the two differ if some layers have one FFN."""
        return str(self.layers[int(place)]) if place in range(len(self.layers)) else ""

    def _draw_effective(self, axes: Axes) -> None:
        axes.barh(range(len(self.usage)), [u.effective for u in self.usage], height=0.8, color=SERIES[0])
        axes.axvline(self.usage[0].experts, color=INK, linestyle="--", linewidth=1.2)
        title = f"effective experts of {self.usage[0].experts}; all layers {self.pool.effective:.0f}"
        axes.set_title(title, fontsize=9, color=INK)
        axes.tick_params(labelleft=False, left=False)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.spines[["top", "right"]].set_visible(False)

    def _draw_divergence(self, figure: Figure, axes: Axes) -> None:
        image = axes.imshow(np.array(self.divergence), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        figure.colorbar(image, ax=axes, pad=0.02, aspect=12).ax.tick_params(labelsize=8)
        axes.set_title(f"divergence of layers, bits; mean {self.specialisation:.2f}", fontsize=9, color=INK)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4, integer=True))
            axis.set_major_formatter(lambda place, _: self._number(place))


def load(model: MoEModel, text: Text) -> LoadFound:
    """Count each layer's assignments on a text, and measure how even they are and how the layers differ."""
    counts = ExpertCounts(model)
    read(model, text, counts)
    counts_LE = torch.stack([counts.by_layer[layer.number] for layer in model.layers])
    groups = len(model.banks)
    everywhere_LM = torch.from_numpy(over_all_experts(counts_LE.numpy(), groups)).nan_to_num().long()
    divergence_LL = layer_divergence(everywhere_LM)
    return LoadFound(
        model.name,
        text.name,
        text.tokens,
        model.top_k,
        layers=tuple(layer.number for layer in model.layers),
        groups=groups,
        counts=tuple(tuple(row) for row in counts_LE.tolist()),
        usage=tuple(_usage(row) for row in counts_LE),
        pool=_usage(everywhere_LM.sum(0)),
        coverage=tuple(coverage(everywhere_LM, top) for top in TOPS if top <= counts_LE.shape[1]),
        divergence=tuple(tuple(row) for row in divergence_LL.tolist()),
        specialisation=_mean_over_pairs(divergence_LL, 1) or 0.0,
        shared_specialisation=_mean_over_pairs(divergence_LL, groups),
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
