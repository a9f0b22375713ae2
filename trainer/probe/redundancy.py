"""How similar the experts of a bank are, in their weights and in their outputs for the same tokens.

The paper names no measure; here it is the cosine. Weights are compared as one vector of all three matrices, with hidden
units in their order: two experts that differ only in the order of their units look different by weights, and the same
by outputs. Outputs e_i(x) and e_j(x) are compared without gate values, averaged over tokens of every layer that
chooses from the bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from trainer.common.errors import UserError
from trainer.common.figure_style import (
    FAINT,
    INK,
    SERIES,
    add_legend,
    figure_title,
    new_figure,
    panel_title,
    style_axes,
)
from trainer.common.tables import new_table
from trainer.probe.adapters import Bank, Choice, MoELayer, MoEModel
from trainer.probe.text import Text, read

if TYPE_CHECKING:
    from rich.table import Table

_NUMBERS = 1 << 26
"""Maximum weights in memory at once as fp32."""
_PAIRS = 5
"""Number of most similar pairs to report."""


@dataclass(frozen=True)
class Pair:
    """Two experts (global ids), and the cosines of their weights and outputs."""

    first: int
    second: int
    weights: float
    outputs: float


@dataclass(frozen=True)
class Cosines:
    """The mean, the 95th percentile and the maximum over all pairs of different experts of a bank."""

    mean: float
    p95: float
    largest: float


@dataclass(frozen=True)
class BankResult:
    """The result for a bank; matrices are (E, E).

    Attributes:
        layers: The layers that choose from the bank.
        first: The global id of the bank's first expert.
        alike: The most similar pairs by outputs.
    """

    layers: tuple[int, ...]
    first: int
    weights: Cosines
    outputs: Cosines
    alike: tuple[Pair, ...]
    weights_matrix: list[list[float]] = field(repr=False)
    outputs_matrix: list[list[float]] = field(repr=False)


@dataclass(frozen=True)
class RedundancyResult:
    """The result of the probe.

    Attributes:
        sampled: The number of tokens per layer on which outputs were compared.
        owners: The layer that owns each expert, if layers choose from their own experts only.
    """

    model: str
    text: str
    sampled: int
    seed: int
    experts: int
    banks: tuple[BankResult, ...]
    owners: tuple[int, ...] | None = None

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(pair) for b in self.banks for pair in _pairs(b.first, b.weights_matrix, b.outputs_matrix)]

    def tables(self) -> list[Table]:
        heads = ("layers", *(f"{of} {name}" for of in ("weights:", "outputs:") for name in ("mean", "p95", "max")))
        made = new_table(f"{self.model}: cosine of every two experts, {self.text}", *heads)
        for bank in self.banks:
            layers = " to ".join(str(number) for number in dict.fromkeys((bank.layers[0], bank.layers[-1])))
            made.add_row(layers, *(f"{v:z.3f}" for c in (bank.weights, bank.outputs) for v in asdict(c).values()))
        alike = new_table("Most similar experts by outputs", "experts", "outputs", "weights")
        pairs = sorted((p for bank in self.banks for p in bank.alike), key=lambda p: -p.outputs)
        for pair in pairs[:_PAIRS]:
            alike.add_row(f"{pair.first}, {pair.second}", f"{pair.outputs:z.3f}", f"{pair.weights:z.3f}")
        return [made, alike]

    def notes(self) -> list[str]:
        lines = [
            f"{self.experts} experts. Outputs are compared on the same {self.sampled} tokens of each layer, without "
            "gate values.",
            "Weights are compared with hidden units in their order; the cosine of independent experts is near 0.",
        ]
        if self.owners is not None:
            lines.append(self._by_owner(self.owners))
        return lines

    def _by_owner(self, owners: tuple[int, ...]) -> str:
        """Say how similar experts of one layer are, and those of different layers, on the tokens of all layers."""
        owner_E = np.array(owners)
        same_EE, pairs_EE = owner_E[:, None] == owner_E, ~np.eye(len(owner_E), dtype=bool)
        said = []
        for which, picked_EE in (("of one layer", same_EE & pairs_EE), ("of different layers", ~same_EE)):
            if picked_EE.any():
                outputs = np.array(self.banks[0].outputs_matrix)[picked_EE].mean()
                weights = np.array(self.banks[0].weights_matrix)[picked_EE].mean()
                said.append(f"{which} {outputs:z.3f} (outputs) and {weights:z.3f} (weights)")
        return f"Layers own their experts. Mean cosine of two experts {', '.join(said)}."

    def draw(self) -> Figure:
        """Plot both matrices of a single bank, or the summaries of several banks."""
        figure = new_figure(11, 5)
        for axes, of in zip(figure.subplots(1, 2), ("weights", "outputs"), strict=True):
            if len(self.banks) == 1:
                _draw_matrix(figure, axes, np.array(getattr(self.banks[0], f"{of}_matrix")), of)
            else:
                _draw_banks(axes, self.banks, [getattr(bank, of) for bank in self.banks], of)
        figure_title(figure, f"{self.model}: cosine of every two experts")
        return figure


def _draw_matrix(figure: Figure, axes: Axes, cosine_EE: NDArray[np.float64], of: str) -> None:
    np.fill_diagonal(cosine_EE, np.nan)  # the diagonal is 1, which would hide the rest
    top = max(float(np.nanmax(np.abs(cosine_EE))), 1e-3)
    axes.set_facecolor(FAINT)
    image = axes.imshow(cosine_EE, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
    figure.colorbar(image, ax=axes, pad=0.02, aspect=24)
    panel_title(axes, f"{of}, mean {np.nanmean(cosine_EE):.3f}", 10)
    axes.set(xlabel="expert", ylabel="expert")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))


def _draw_banks(axes: Axes, banks: Sequence[BankResult], cosines: Sequence[Cosines], of: str) -> None:
    at = [np.mean(bank.layers) for bank in banks]
    labels = {"largest": "maximum", "p95": "95th percentile", "mean": "mean"}
    for (name, label), colour in zip(labels.items(), SERIES, strict=False):
        axes.plot(at, [getattr(c, name) for c in cosines], marker="o", ms=4, color=colour, label=label)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.set(xlabel="layer", ylabel="cosine")
    style_axes(axes)
    panel_title(axes, of, 10)
    add_legend(axes)


def redundancy(model: MoEModel, text: Text, sampled: int = 64, seed: int = 0) -> RedundancyResult:
    """Compare every two experts of each bank, on `sampled` tokens per layer that the seed selects.

    Raises:
        UserError: The banks have only one expert.
    """
    if model.banks[0].experts < 2:
        raise UserError(f"{model.name}: has one expert per layer; there is nothing to compare")
    inputs = _sample_inputs(model, text, sampled, seed)
    found = []
    for bank in tqdm(model.banks, "comparing", unit=" banks", disable=None, leave=False):
        layers = tuple(layer.number for layer in model.layers if layer.bank == bank)
        weights_EE = weight_cosine(bank).tolist()
        outputs_EE = output_cosine(bank, [inputs[number] for number in layers]).tolist()
        pairs = sorted(_pairs(bank.first, weights_EE, outputs_EE), key=lambda pair: -pair.outputs)
        both = (_cosines([pair.weights for pair in pairs]), _cosines([pair.outputs for pair in pairs]))
        found.append(BankResult(layers, bank.first, *both, tuple(pairs[:_PAIRS]), weights_EE, outputs_EE))
    return RedundancyResult(
        model.name, text.name, len(inputs[model.layers[0].number]), seed, model.experts, tuple(found), model.owners
    )


def _sample_inputs(model: MoEModel, text: Text, sampled: int, seed: int) -> dict[int, Tensor]:
    """Return the inputs of each layer's experts at some tokens, the same in all layers: (tokens, D) by layer."""
    generator = torch.Generator().manual_seed(seed)
    wanted_T = torch.randperm(text.tokens, generator=generator)[:sampled].sort().values
    kept: dict[int, list[Tensor]] = {layer.number: [] for layer in model.layers}
    read_tokens = dict.fromkeys(kept, 0)

    def see(layer: MoELayer, choice: Choice) -> None:
        own_T = wanted_T - read_tokens[layer.number]
        tokens = len(choice.x_TD)
        kept[layer.number].append(choice.x_TD[own_T[(own_T >= 0) & (own_T < tokens)].to(choice.x_TD.device)])
        read_tokens[layer.number] += tokens

    read(model, text, see)
    return {number: torch.cat(parts) for number, parts in kept.items()}


@torch.no_grad()
def weight_cosine(bank: Bank) -> NDArray[np.float64]:
    """Return the cosine of every two experts' weights, each as one vector: (E, E)."""
    gram_EE = torch.zeros(bank.experts, bank.experts, dtype=torch.float64)
    units = max(1, _NUMBERS // bank.weights(slice(0, 1)).numel())
    for start in range(0, bank.width, units):
        part_EN = bank.weights(slice(start, start + units))
        gram_EE += (part_EN @ part_EN.T).double().cpu()
    norm_E = gram_EE.diagonal().sqrt().clamp(min=1e-30)
    return (gram_EE / (norm_E[:, None] * norm_E)).numpy()


@torch.no_grad()
def output_cosine(bank: Bank, inputs: Sequence[Tensor]) -> NDArray[np.float64]:
    """Return the cosine of every two experts' outputs, averaged over all tokens of `inputs`, (T, D) each: (E, E)."""
    total_EE = torch.zeros(bank.experts, bank.experts, dtype=torch.float64)
    for x_TD in inputs:
        y_ETD = torch.stack([bank.run(expert, x_TD).float() for expert in range(bank.experts)])
        unit_EN = F.normalize(y_ETD, dim=-1).flatten(1)
        total_EE += (unit_EN @ unit_EN.T).double().cpu()
    return (total_EE / sum(len(x_TD) for x_TD in inputs)).numpy()


def _pairs(first: int, weights_EE: list[list[float]], outputs_EE: list[list[float]]) -> list[Pair]:
    experts = range(len(weights_EE))
    return [Pair(first + i, first + j, weights_EE[i][j], outputs_EE[i][j]) for i in experts for j in experts[i + 1 :]]


def _cosines(values: Sequence[float]) -> Cosines:
    return Cosines(float(np.mean(values)), float(np.percentile(values, 95)), float(np.max(values)))
