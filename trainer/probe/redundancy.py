"""How alike the experts of a bank are, in their weights and in what they make of the same tokens.

METHOD.md names no measure; here it is the cosine. Of weights: of all three matrices as one vector, hidden units in
their order (two experts that differ by the order of their units alone look different, and by their outputs the same).
Of outputs: of e_i(x) and e_j(x), without gate values, averaged over tokens of every layer that chooses among them.
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
from trainer.probe.adapters import Bank, Choice, MoELayer, MoEModel, observed
from trainer.probe.output import INK, SERIES, quiet, table
from trainer.probe.text import Text, progress, read

if TYPE_CHECKING:
    from rich.table import Table

_NUMBERS = 1 << 26
"""Weights in memory at once as fp32."""
_PAIRS = 5
"""Most alike pairs that are named."""


@dataclass(frozen=True)
class Pair:
    """Two experts, by global ids, and the cosines of their weights and outputs."""

    first: int
    second: int
    weights: float
    outputs: float


@dataclass(frozen=True)
class Cosines:
    """Over all pairs of different experts of a bank."""

    mean: float
    p95: float
    largest: float


@dataclass(frozen=True)
class BankFound:
    """Of one bank.

    Attributes:
        layers: that choose among its experts.
        weights_EE, outputs_EE: cosines, float64.
    """

    layers: tuple[int, ...]
    first: int
    weights: Cosines
    outputs: Cosines
    alike: tuple[Pair, ...]
    weights_EE: NDArray[np.float64] = field(repr=False)
    outputs_EE: NDArray[np.float64] = field(repr=False)

    @property
    def title(self) -> str:
        """Its layers."""
        first, last = self.layers[0], self.layers[-1]
        return f"{first}" if first == last else f"{first} to {last}"


@dataclass(frozen=True)
class Redundancy:
    """A `Result`. `sampled`: tokens a layer on which outputs were compared."""

    model: str
    text: str
    sampled: int
    seed: int
    experts: int
    banks: tuple[BankFound, ...]

    def to_json(self) -> dict[str, Any]:
        tree = asdict(self)
        for bank in tree["banks"]:
            bank["weights_matrix"] = bank.pop("weights_EE").tolist()
            bank["outputs_matrix"] = bank.pop("outputs_EE").tolist()
        return tree

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(pair) for bank in self.banks for pair in _pairs(bank.first, bank.weights_EE, bank.outputs_EE)]

    def tables(self) -> list[Table]:
        heads = ("layers", "weights: mean", "95 % below", "largest", "outputs: mean", "95 % below", "largest")
        made = table(f"{self.model}: cosine of every two experts, {self.text}", *heads)
        for bank in self.banks:
            both = (bank.weights, bank.outputs)
            made.add_row(bank.title, *(f"{v:.3f}" for c in both for v in (c.mean, c.p95, c.largest)))
        alike = table("Most alike by outputs", "experts", "outputs", "weights")
        pairs = sorted((p for bank in self.banks for p in bank.alike), key=lambda p: -p.outputs)
        for pair in pairs[:_PAIRS]:
            alike.add_row(f"{pair.first}, {pair.second}", f"{pair.outputs:.3f}", f"{pair.weights:.3f}")
        return [made, alike]

    def notes(self) -> list[str]:
        return [
            f"{self.experts} experts; outputs on the same {self.sampled} tokens of each layer, without gate values.",
            "Weights are compared with hidden units in their order; independent ones have a cosine near 0.",
        ]

    def draw(self) -> Figure:
        """One bank: both matrices. Several: mean, 95th percentile and largest by bank."""
        figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2)
        if len(self.banks) == 1:
            _draw_matrix(figure, left, self.banks[0].weights_EE, "weights")
            _draw_matrix(figure, right, self.banks[0].outputs_EE, "outputs on the same tokens")
        else:
            _draw_banks(left, self.banks, [bank.weights for bank in self.banks], "weights")
            _draw_banks(right, self.banks, [bank.outputs for bank in self.banks], "outputs on the same tokens")
        figure.suptitle(f"{self.model}: cosine of every two experts", x=0.01, ha="left", color=INK, fontsize=12)
        return figure


def _draw_matrix(figure: Figure, axes: Axes, cosine_EE: NDArray[np.float64], of: str) -> None:
    """Without the diagonal, which is 1 and would hide the rest."""
    shown_EE = cosine_EE.copy()
    np.fill_diagonal(shown_EE, np.nan)
    top = max(float(np.nanmax(np.abs(shown_EE))), 1e-3)
    axes.set_facecolor("#dddddd")
    image = axes.imshow(shown_EE, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
    figure.colorbar(image, ax=axes, pad=0.02, aspect=24)
    axes.set_title(f"{of}, mean {np.nanmean(shown_EE):.3f}", color=INK, fontsize=10)
    axes.set_xlabel("expert", color=INK)
    axes.set_ylabel("expert", color=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))


def _draw_banks(axes: Axes, banks: Sequence[BankFound], cosines: Sequence[Cosines], of: str) -> None:
    at = [np.mean(bank.layers) for bank in banks]
    for name, colour in zip(("largest", "p95", "mean"), SERIES, strict=False):
        values = [getattr(c, name) for c in cosines]
        axes.plot(at, values, marker="o", ms=4, color=colour, label={"p95": "95 % below"}.get(name, name))
    quiet(axes)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.set_title(of, color=INK, fontsize=10)
    axes.set_xlabel("layer", color=INK)
    axes.set_ylabel("cosine", color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def redundancy(model: MoEModel, text: Text, sampled: int = 64, seed: int = 0) -> Redundancy:
    """Compare every two experts of each bank.

    Args:
        sampled: tokens a layer on which outputs are compared, drawn from the text by the seed.

    Raises:
        UserError: banks of one expert.
    """
    if model.banks[0].experts < 2:
        raise UserError(f"{model.name}: has one expert a layer; there is nothing to compare")
    inputs = _sample_inputs(model, text, sampled, seed)
    found = []
    for bank in tqdm(model.banks, "comparing", unit=" banks", disable=None, leave=False):
        layers = tuple(layer.number for layer in model.layers if layer.bank == bank)
        weights_EE = weight_cosine(bank)
        outputs_EE = output_cosine(bank, [inputs[number] for number in layers])
        pairs = sorted(_pairs(bank.first, weights_EE, outputs_EE), key=lambda pair: -pair.outputs)
        found.append(
            BankFound(
                layers,
                bank.first,
                _cosines([pair.weights for pair in pairs]),
                _cosines([pair.outputs for pair in pairs]),
                tuple(pairs[:_PAIRS]),
                weights_EE,
                outputs_EE,
            )
        )
    return Redundancy(model.name, text.name, len(inputs[model.layers[0].number]), seed, model.experts, tuple(found))


def _sample_inputs(model: MoEModel, text: Text, sampled: int, seed: int) -> dict[int, Tensor]:
    """What the experts of each layer read at some tokens, the same ones in all layers: (tokens, D) by layer."""
    generator = torch.Generator().manual_seed(seed)
    wanted_T = torch.randperm(text.tokens, generator=generator)[:sampled].sort().values
    kept: dict[int, list[Tensor]] = {layer.number: [] for layer in model.layers}
    read_tokens = dict.fromkeys(kept, 0)

    def see(layer: MoELayer, choice: Choice) -> None:
        own_T = wanted_T - read_tokens[layer.number]
        tokens = len(choice.x_TD)
        kept[layer.number].append(choice.x_TD[own_T[(own_T >= 0) & (own_T < tokens)].to(choice.x_TD.device)])
        read_tokens[layer.number] += tokens

    with progress("reading", len(text.batches)) as done, observed(model, see):
        read(model, text, done)
    return {number: torch.cat(parts) for number, parts in kept.items()}


@torch.no_grad()
def weight_cosine(bank: Bank) -> NDArray[np.float64]:
    """Of every two experts' weights, each as one vector: (E, E)."""
    gram_EE = torch.zeros(bank.experts, bank.experts, dtype=torch.float64)
    units = max(1, _NUMBERS // bank.weights(slice(0, 1)).numel())
    for start in range(0, bank.width, units):
        part_EN = bank.weights(slice(start, start + units))
        gram_EE += (part_EN @ part_EN.T).double().cpu()
    norm_E = gram_EE.diagonal().sqrt().clamp(min=1e-30)
    return (gram_EE / (norm_E[:, None] * norm_E)).numpy()


@torch.no_grad()
def output_cosine(bank: Bank, inputs: Sequence[Tensor]) -> NDArray[np.float64]:
    """Of every two experts' outputs for a token, the mean over all tokens of `inputs`, each (T, D): (E, E)."""
    total_EE = torch.zeros(bank.experts, bank.experts, dtype=torch.float64)
    for x_TD in inputs:
        y_ETD = torch.stack([bank.run(expert, x_TD).float() for expert in range(bank.experts)])
        unit_EN = F.normalize(y_ETD, dim=-1).flatten(1)
        total_EE += (unit_EN @ unit_EN.T).double().cpu()
    return (total_EE / sum(len(x_TD) for x_TD in inputs)).numpy()


def _pairs(first: int, weights_EE: NDArray[np.float64], outputs_EE: NDArray[np.float64]) -> list[Pair]:
    return [
        Pair(first + int(i), first + int(j), float(weights_EE[i, j]), float(outputs_EE[i, j]))
        for i, j in zip(*np.triu_indices(len(weights_EE), 1), strict=True)
    ]


def _cosines(values: Sequence[float]) -> Cosines:
    return Cosines(float(np.mean(values)), float(np.percentile(values, 95)), float(np.max(values)))
