"""How many different experts a token meets over the layers: METHOD.md, probe 2."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from router import distinct_experts_by_token
from trainer.probe.adapters import Choice, MoELayer, MoEModel, observed
from trainer.probe.output import INK, SERIES, quiet, table
from trainer.probe.text import Text, progress, read

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Reuse:
    """A `Result`.

    Attributes:
        layers: L, those that route; top_k: K.
        distinct: different experts a token meets, mean over the tokens; spread: standard deviation.
        of_layers: distinct / L, the paper's figure for K = 1; of_choices: distinct / (L K), at most 1.
        uniform: expected `distinct` where every choice is uniform and independent of the others.
        layer_private: no two layers share experts, so that no token can meet one twice.
        histogram: tokens by number of different experts, from 0.
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"distinct": number, "of_layers": number / self.layers, "tokens": tokens, "share": tokens / self.tokens}
            for number, tokens in enumerate(self.histogram)
        ]

    def tables(self) -> list[Table]:
        title = f"{self.model}: different experts a token meets, {self.text}"
        made = table(title, "experts", f"of {self._most}", "tokens", "share")
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
            f"L = {self.layers} layers with {self.top_k} of {self.experts} experts a token and layer.",
            f"Uniform, independent choices would meet {self.uniform:.3f} ({uniform:.1%}).",
        ]
        if self.layer_private:
            lines.append("Layers have experts of their own: no token can meet one twice.")
        return lines

    @property
    def _most(self) -> str:
        """What the mean is a share of: the paper's L, where K = 1."""
        return "L" if self.top_k == 1 else f"L x {self.top_k}"

    def draw(self) -> Figure:
        """Share of the tokens by the number of different experts, with the mean and what uniform choices would give."""
        figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
        axes = figure.subplots()
        rows = [row for row in self.rows() if row["distinct"]]
        axes.bar([row["distinct"] for row in rows], [row["share"] for row in rows], width=0.85, color=SERIES[0])
        mean = f"mean, {self.distinct:.2f} = {self.of_choices:.1%} of {self._most}"
        axes.axvline(self.distinct, color=SERIES[1], linewidth=2, label=mean)
        axes.axvline(self.uniform, color=INK, linestyle="--", linewidth=1.2, label=f"uniform, {self.uniform:.2f}")
        quiet(axes)
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(f"different experts over {self.layers} layers", color=INK)
        axes.set_ylabel("share of the tokens", color=INK)
        axes.legend(loc="upper left", frameon=False, fontsize=9, labelcolor=INK)
        axes.set_title(f"{self.model}: different experts that a token meets", loc="left", color=INK, fontsize=12)
        return figure


def reuse(model: MoEModel, text: Text) -> Reuse:
    """Count the different experts of each token that the model reads."""
    histogram = torch.zeros(len(model.layers) * model.top_k + 1, dtype=torch.int64)
    seen: list[Tensor] = []

    def see(_layer: MoELayer, choice: Choice) -> None:
        seen.append(choice.topk_expert_ids_TK.cpu())
        if len(seen) == len(model.layers):
            distinct_T = distinct_experts_by_token(torch.stack(seen))
            histogram.add_(torch.bincount(distinct_T, minlength=len(histogram)))
            seen.clear()

    with progress("reading", len(text.batches)) as done, observed(model, see):
        read(model, text, done)
    numbers = torch.arange(len(histogram)).double()
    shares = histogram / text.tokens
    mean = float((shares * numbers).sum())
    layers = len(model.layers)
    return Reuse(
        model.name,
        text.name,
        text.tokens,
        layers,
        model.top_k,
        model.banks[0].experts,
        mean,
        float((shares * (numbers - mean) ** 2).sum().sqrt()),
        mean / layers,
        mean / (layers * model.top_k),
        _uniform(model),
        model.layer_private,
        tuple(histogram.tolist()),
    )


def _uniform(model: MoEModel) -> float:
    """Each expert of a bank is missed by a layer with probability 1 - K / E."""
    expected = 0.0
    for bank in model.banks:
        layers = sum(layer.bank == bank for layer in model.layers)
        expected += bank.experts * (1 - (1 - model.top_k / bank.experts) ** layers)
    return expected
