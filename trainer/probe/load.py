"""Which layer uses which expert, and how differently the layers do: METHOD.md, probe 3 (utilisation)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from router import dead_experts, effective_experts, layer_divergence, load_imbalance
from trainer.probe.adapters import Choice, MoELayer, MoEModel, observed
from trainer.probe.output import INK, SERIES, table
from trainer.probe.text import Text, progress, read
from trainer.telemetry.expert_heatmap import draw_shares, draw_totals, over_all_experts

if TYPE_CHECKING:
    from rich.table import Table

TOPS = (1, 2, 4, 8, 16)
"""Most used experts of a layer whose union over the layers is looked at."""
_WIDEST = 1024
"""Experts side by side in a picture; layers with more of their own are drawn one above the other."""


@dataclass(frozen=True)
class Usage:
    """How evenly a layer, or the whole pool, uses its experts.

    Attributes:
        effective: exp of the entropy of their shares.
        imbalance: largest load over mean load.
        unused: experts without a token.
    """

    experts: int
    effective: float
    imbalance: float
    unused: int


@dataclass(frozen=True)
class Coverage:
    """The `top` most used experts of every layer.

    Attributes:
        union: different ones over all layers; of_pool: as a share of all experts.
        share: of a layer's tokens that they serve, mean over the layers.
    """

    top: int
    union: int
    of_pool: float
    share: float


@dataclass(frozen=True)
class LoadFound:
    """A `Result`.

    Attributes:
        layers: numbers of the layers that route.
        groups: banks that the layers share; the layers of each are adjacent and equally many.
        counts: assignments of each layer to the experts of its bank.
        usage: by layer.
        divergence: Jensen-Shannon divergence of every two layers' shares, in bits: 0 the same, 1 nothing in common.
        specialisation: its mean over all pairs of layers; 0 for one layer.
        shared_specialisation: over pairs that share a bank; None where there are none.
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        total = self.tokens * self.top_k
        return [
            {"layer": layer, "expert": self._first(place) + expert, "assignments": count, "share": count / total}
            for place, (layer, counts) in enumerate(zip(self.layers, self.counts, strict=True))
            for expert, count in enumerate(counts)
        ]

    def _first(self, place: int) -> int:
        return place * self.groups // len(self.layers) * len(self.counts[0])

    @property
    def _layer_private(self) -> bool:
        return self.groups == len(self.layers) > 1

    def tables(self) -> list[Table]:
        heads = ("layer", "experts", "effective", "max / mean", "unused", "others differ by")
        made = table(f"{self.model}: use of the experts, {self.text}", *heads)
        for place, (layer, usage) in enumerate(zip(self.layers, self.usage, strict=True)):
            others = np.delete(np.array(self.divergence[place]), place)
            made.add_row(str(layer), *_cells(usage), f"{others.mean():.3f}" if len(others) else "")
        made.add_section()
        made.add_row("all", *_cells(self.pool), f"{self.specialisation:.3f}" if len(self.layers) > 1 else "")
        tops = table("The most used experts of every layer", "a layer", "together", "of all", "share of the tokens")
        for c in self.coverage:
            tops.add_row(str(c.top), str(c.union), f"{c.of_pool:.1%}", f"{c.share:.1%}")
        return [made, tops]

    def notes(self) -> list[str]:
        lines = [
            f"{self.tokens:,} tokens, top-{self.top_k}. Effective: exp of the shares' entropy.",
            "Layers differ by the Jensen-Shannon divergence of their shares: 0 bits the same, 1 nothing in common.",
        ]
        if self._layer_private:
            lines.append("Layers have experts of their own: they have nothing in common.")
        elif self.groups > 1 and self.shared_specialisation is not None:
            lines.append(f"Layers of one sub-pool differ by {self.shared_specialisation:.3f} on average.")
        return lines

    def draw(self) -> Figure:
        """Heat map and totals as in a run's load.png; beside them effective experts, and how layers differ.

        Many experts that no two layers share are drawn one layer above the other, where totals mean nothing.
        """
        counts_LE = np.array(self.counts)
        layers, size = counts_LE.shape
        one_above_the_other = self._layer_private and layers * size > _WIDEST
        tokens_LM = counts_LE.astype(float) if one_above_the_other else over_all_experts(counts_LE, self.groups)
        width = float(np.clip(3 + 0.09 * tokens_LM.shape[1], 6, 18))
        below = 0.0 if one_above_the_other else 2.1
        height = float(np.clip(2.6 + 0.24 * layers, 4.6, 12)) - 2.1 + below
        figure = Figure(figsize=(width + 3.4, height), dpi=120, layout="constrained")
        if one_above_the_other:
            shares_axes, effective_axes = figure.subplots(1, 2, sharey=True, width_ratios=(width, 3))
            shares_axes.set_xlabel("expert (each layer has its own)", color=INK)
        else:
            grid = figure.add_gridspec(2, 2, width_ratios=(width, 3), height_ratios=(height - below, below))
            shares_axes = figure.add_subplot(grid[0, 0])
            effective_axes = figure.add_subplot(grid[0, 1], sharey=shares_axes)
            draw_totals(figure.add_subplot(grid[1, 0], sharex=shares_axes), tokens_LM)
            self._draw_divergence(figure, figure.add_subplot(grid[1, 1]))
        draw_shares(figure, shares_axes, tokens_LM)
        shares_axes.tick_params(labelbottom=one_above_the_other, bottom=one_above_the_other)
        shares_axes.yaxis.set_major_formatter(lambda place, _: self._number(place))
        self._draw_effective(effective_axes)
        title = f"{self.model}: experts chosen, {self.text}"
        shares_axes.set_title(title, loc="left", color=INK, fontsize=12)
        return figure

    def _number(self, place: float) -> str:
        """Of the layer at a place; where some layers have one FFN, the two differ."""
        return str(self.layers[int(place)]) if place in range(len(self.layers)) else ""

    def _draw_effective(self, axes: Axes) -> None:
        axes.barh(range(len(self.usage)), [u.effective for u in self.usage], height=0.8, color=SERIES[0])
        axes.axvline(self.usage[0].experts, color=INK, linestyle="--", linewidth=1.2)
        axes.set_title(f"effective of {self.usage[0].experts}; all {self.pool.effective:.0f}", fontsize=9, color=INK)
        axes.tick_params(labelleft=False, left=False)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.spines[["top", "right"]].set_visible(False)

    def _draw_divergence(self, figure: Figure, axes: Axes) -> None:
        image = axes.imshow(np.array(self.divergence), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        figure.colorbar(image, ax=axes, pad=0.02, aspect=12).ax.tick_params(labelsize=8)
        axes.set_title(f"layers differ, bits; mean {self.specialisation:.2f}", fontsize=9, color=INK)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4, integer=True))
            axis.set_major_formatter(lambda place, _: self._number(place))


def _cells(usage: Usage) -> tuple[str, str, str, str]:
    return str(usage.experts), f"{usage.effective:.1f}", f"{usage.imbalance:.2f}", str(usage.unused)


def load(model: MoEModel, text: Text) -> LoadFound:
    """Count each layer's assignments over the text, and say how even they are and how the layers differ."""
    counts = {layer.number: torch.zeros(layer.bank.experts, dtype=torch.int64) for layer in model.layers}

    def see(layer: MoELayer, choice: Choice) -> None:
        own = (choice.topk_expert_ids_TK - layer.bank.first).flatten().cpu()
        counts[layer.number] += torch.bincount(own, minlength=layer.bank.experts)

    with progress("reading", len(text.batches)) as done, observed(model, see):
        read(model, text, done)
    counts_LE = torch.stack([counts[layer.number] for layer in model.layers])
    groups = len(model.banks)
    everywhere_LM = torch.from_numpy(over_all_experts(counts_LE.numpy(), groups)).nan_to_num().long()
    divergence_LL = layer_divergence(everywhere_LM)
    return LoadFound(
        model.name,
        text.name,
        text.tokens,
        model.top_k,
        tuple(layer.number for layer in model.layers),
        groups,
        tuple(tuple(row) for row in counts_LE.tolist()),
        tuple(_usage(row) for row in counts_LE),
        _usage(everywhere_LM.sum(0)),
        tuple(coverage(everywhere_LM, top) for top in TOPS if top <= counts_LE.shape[1]),
        tuple(tuple(row) for row in divergence_LL.tolist()),
        _mean_over_pairs(divergence_LL, range(1)) or 0.0,
        _mean_over_pairs(divergence_LL, range(groups)),
    )


def _usage(counts_M: Tensor) -> Usage:
    return Usage(
        len(counts_M),
        float(effective_experts(counts_M)),
        float(load_imbalance(counts_M)),
        int(dead_experts(counts_M)),
    )


def coverage(counts_LM: Tensor, top: int) -> Coverage:
    """Of the `top` most used experts of each layer; one without a token is none of them."""
    used = counts_LM.sort(dim=-1, descending=True, stable=True)
    chosen_LM = torch.zeros_like(counts_LM, dtype=torch.bool).scatter(1, used.indices[:, :top], True) & (counts_LM > 0)
    union = int(chosen_LM.any(0).sum())
    share_L = used.values[:, :top].sum(1) / counts_LM.sum(1).clamp(min=1)
    return Coverage(top, union, union / counts_LM.shape[1], float(share_L.double().mean()))


def _mean_over_pairs(divergence_LL: Tensor, groups: range) -> float | None:
    """Over pairs of layers in the same one of equal groups of adjacent layers; None without a pair."""
    layers = len(divergence_LL)
    group_L: NDArray[np.int64] = np.arange(layers) * len(groups) // layers
    same_LL = torch.from_numpy(group_L[:, None] == group_L).fill_diagonal_(False)
    return float(divergence_LL[same_LL].mean()) if same_LL.any() else None
