"""How many distinct experts a token meets over the layers (cross-layer reuse)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from router import distinct_experts_by_token
from trainer.common.figure_style import INK, SERIES, add_legend, new_figure, panel_title, style_axes
from trainer.common.tables import new_table
from trainer.probe.adapters import Choice, MoELayer, MoEModel
from trainer.probe.text import Text, read

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ReuseResult:
    """The result of the probe.

    Attributes:
        layers: L, the number of layers with a router; each chooses `top_k` of its `experts`.
        distinct: The mean number of distinct experts of a token.
        spread: The standard deviation over the tokens.
        of_layers: distinct / L, which the paper reports for K = 1.
        of_choices: distinct / (L K), at most 1.
        uniform: The expected `distinct` if all choices were uniform and independent.
        layer_private: Whether no two layers share experts, so that no token can meet an expert twice.
        histogram: The number of tokens by number of distinct experts, from 0.
    """

    model: str
    text: str
    tokens: int
    layers: int
    top_k: int
    experts: int
    distinct: float
    spread: float
    of_layers: float
    of_choices: float
    uniform: float
    layer_private: bool
    histogram: tuple[int, ...]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"distinct": number, "of_layers": number / self.layers, "tokens": tokens, "share": tokens / self.tokens}
            for number, tokens in enumerate(self.histogram)
        ]

    def tables(self) -> list[Table]:
        title = f"{self.model}: distinct experts of a token, {self.text}"
        made = new_table(title, "experts", f"of {self._most}", "tokens", "share")
        for row in self.rows():
            if row["tokens"]:
                of_most = row["distinct"] / (self.layers * self.top_k)
                made.add_row(str(row["distinct"]), f"{of_most:.1%}", f"{row['tokens']:,}", f"{row['share']:.2%}")
        made.add_section()
        made.add_row(f"mean {self.distinct:.3f}", f"{self.of_choices:.1%}", f"{self.tokens:,}", "")
        return [made]

    def notes(self) -> list[str]:
        uniform = self.uniform / (self.layers * self.top_k)
        lines = [
            f"Each of L = {self.layers} layers uses {self.top_k} of {self.experts} experts per token.",
            f"Uniform and independent choices would give {self.uniform:.3f} distinct experts ({uniform:.1%}).",
        ]
        if self.layer_private:
            lines.append("No two layers share experts, so no token can meet an expert twice.")
        return lines

    @property
    def _most(self) -> str:
        """The maximum number of distinct experts: L in the paper, where K = 1."""
        return "L" if self.top_k == 1 else f"L x {self.top_k}"

    def draw(self) -> Figure:
        """Plot the share of tokens by number of distinct experts, with the mean and the uniform expectation."""
        figure = new_figure(7, 4)
        axes = figure.subplots()
        rows = [row for row in self.rows() if row["distinct"]]
        axes.bar([row["distinct"] for row in rows], [row["share"] for row in rows], width=0.85, color=SERIES[0])
        mean = f"mean, {self.distinct:.2f} = {self.of_choices:.1%} of {self._most}"
        axes.axvline(self.distinct, color=SERIES[1], linewidth=2, label=mean)
        axes.axvline(self.uniform, color=INK, linestyle="--", linewidth=1.2, label=f"uniform, {self.uniform:.2f}")
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(f"distinct experts over {self.layers} layers")
        axes.set_ylabel("share of tokens")
        style_axes(axes)
        add_legend(axes, loc="upper left")
        panel_title(axes, f"{self.model}: distinct experts of a token")
        return figure


def reuse(model: MoEModel, text: Text) -> ReuseResult:
    """Count the distinct experts of each token of a text."""
    layers, most = len(model.layers), len(model.layers) * model.top_k
    tokens_by_distinct = torch.zeros(most + 1, dtype=torch.int64)
    seen: list[Tensor] = []

    def see(_layer: MoELayer, choice: Choice) -> None:
        seen.append(choice.topk_expert_ids_TK.cpu())
        if len(seen) == layers:
            distinct_T = distinct_experts_by_token(torch.stack(seen))
            tokens_by_distinct.add_(torch.bincount(distinct_T, minlength=most + 1))
            seen.clear()

    read(model, text, see)
    numbers, shares = torch.arange(most + 1).double(), tokens_by_distinct / text.tokens
    mean = float((shares * numbers).sum())
    return ReuseResult(
        model.name,
        text.name,
        text.tokens,
        layers,
        model.top_k,
        len(model.layers[0].choices),
        mean,
        spread=float((shares * (numbers - mean) ** 2).sum().sqrt()),
        of_layers=mean / layers,
        of_choices=mean / most,
        uniform=_uniform(model),
        layer_private=model.layer_private,
        histogram=tuple(tokens_by_distinct.tolist()),
    )


def _uniform(model: MoEModel) -> float:
    """Return the expected number if each of a bank's E experts is missed by a layer with probability 1 - K / E.

    A layer that owns its experts meets K that no other layer can.
    """
    if model.owners is not None:
        return float(len(model.layers) * model.top_k)
    expected = 0.0
    for bank in model.banks:
        layers = sum(layer.bank == bank for layer in model.layers)
        expected += bank.experts * (1 - (1 - model.top_k / bank.experts) ** layers)
    return expected
