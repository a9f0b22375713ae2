"""The value of the learned choice of experts: the loss with random experts in one layer (routing randomisation)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from trainer.common.errors import UserError
from trainer.common.figure_style import add_legend, new_figure, panel_title
from trainer.model.random_routing import seeded
from trainer.probe.accuracy import NO_ACCURACY, Accuracies, Accuracy, accuracies, accuracy
from trainer.probe.adapters import MoELayer, MoEModel, observed, rerouted
from trainer.probe.effects import (
    OVER_LABELS,
    OVERS,
    Effects,
    Over,
    effect_table,
    mean_and_spread,
    over_layers,
    plot_effects,
)
from trainer.probe.text import ExpertCounts, Text, mean_loss

if TYPE_CHECKING:
    from rich.table import Table

    from trainer.evaluate.scores import Scores


@dataclass(frozen=True)
class LayerIncrease:
    """The loss with random experts in one layer.

    Attributes:
        over: The protocol: which experts were drawn from; `experts` is their number.
        losses: The loss of each draw in nats per token.
        increase: The mean increase over the loss of the learned routing.
        spread: The standard deviation over the draws; None for one draw.
    """

    layer: int
    over: Over
    experts: int
    losses: tuple[float, ...]
    increase: float
    spread: float | None


@dataclass(frozen=True)
class MeanIncrease:
    """The mean increase over the layers, and its standard deviation over the draws."""

    over: Over
    increase: float
    spread: float | None


@dataclass(frozen=True)
class RandomizeResult:
    """The result of the probe. `loss` is that of the learned routing; `accuracy` is None without tasks."""

    model: str
    text: str
    tokens: int
    seed: int
    draws: int
    loss: float
    layers: tuple[LayerIncrease, ...]
    means: tuple[MeanIncrease, ...]
    accuracy: Accuracy | None

    def rows(self) -> list[dict[str, Any]]:
        losses = [
            {"layer": r.layer, "over": r.over, "experts": r.experts, "draw": draw, "loss": loss}
            | {"baseline": self.loss, "increase": loss - self.loss}
            for r in self.layers
            for draw, loss in enumerate(r.losses)
        ]
        if not self.accuracy:
            return losses
        return [loss | own for loss, own in zip(losses, self.accuracy.rows(), strict=True)]

    def effects(self) -> Effects:
        by_layer = {(r.layer, r.over): (r.increase, r.spread) for r in self.layers}
        return by_layer | {(None, m.over): (m.increase, m.spread) for m in self.means}

    def tables(self) -> list[Table]:
        title = f"{self.model}: loss increase in nats per token with random experts in one layer, {self.text}"
        losses = effect_table(title, self.effects(), "z.4f")
        return [losses, *self.accuracy.tables(self.model)] if self.accuracy else [losses]

    def notes(self) -> list[str]:
        experts = {over: sorted({r.experts for r in self.layers if r.over == over}) for over in OVERS}
        drawn = "; ".join(f"{', '.join(map(str, n))} from {OVER_LABELS[over]}" for over, n in experts.items() if n)
        spread = f"± is the standard deviation over {self.draws} draws. " if self.draws > 1 else ""
        return [
            f"The loss of the learned routing is {self.loss:.4f} nats per token over {self.tokens:,} tokens.",
            f"{spread}Number of experts to draw from: {drawn}.",
            "Only the experts are random, K distinct ones per token; gate values are the learned ones.",
            *(self.accuracy.notes() if self.accuracy else []),
        ]

    def draw(self) -> Figure:
        """Plot the loss increase by layer, and below it the accuracy drop if it was measured."""
        panels = 2 if self.accuracy else 1
        figure = new_figure(7, 1.4 + 3.2 * panels)
        axes, *below = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
        labels = {mean.over: f"random over {OVER_LABELS[mean.over]}, mean {mean.increase:+z.4f}" for mean in self.means}
        if self.accuracy:
            for drop in self.accuracy.means:
                labels[drop.over] += f" nats, {drop.drop:z.2f} points"
            plot_effects(below[0], self.accuracy.effects(), {})
            below[0].set_ylabel(f"accuracy drop, points (from {100 * self.accuracy.learned.mean['acc']:.1f} %)")
        plot_effects(axes, self.effects(), labels)
        axes.set_ylabel(f"loss increase, nats (from {self.loss:.3f})")
        (below or [axes])[-1].set_xlabel("randomised layer")
        add_legend(figure, loc="outside lower center")
        panel_title(axes, f"{self.model}: random experts in one layer")
        return figure


@contextmanager
def randomised(layer: MoELayer, candidates_C: Tensor, generator: torch.Generator) -> Iterator[None]:
    """Use K distinct random experts per token in one layer, in every forward pass inside the `with`.

    The paper does not say which gate values random experts have. Here the k-th gets the learned gate value of the k-th,
    so that the FFN keeps its magnitude and only the choice is lost.

    Args:
        layer: The layer.
        candidates_C: At least K global ids to draw from uniformly, on the CPU.
        generator: On the CPU, so that draws are the same on all devices.
    """

    def draw(ids_TK: Tensor) -> Tensor:
        tokens, top_k = ids_TK.shape
        places_TK = torch.rand(tokens, len(candidates_C), generator=generator).topk(top_k, dim=-1).indices
        return candidates_C[places_TK].to(ids_TK.device)

    with rerouted(layer, draw):
        yield


def candidates(model: MoEModel, layer: MoELayer, over: Over, matched: int, counts_E: Tensor) -> Tensor:
    """Return the global ids that a protocol draws from.

    "layer" draws from the experts that the layer can choose (its own if it owns some), "pool" from all experts, and
    "matched" from the `matched` experts that the layer uses most; `counts_E` are its assignments to those of its bank.
    """
    if over == "pool":
        return torch.arange(model.experts)
    if over == "layer":
        return torch.tensor(layer.choices)
    return layer.bank.first + counts_E.sort(descending=True, stable=True).indices[:matched]


def usual_overs(model: MoEModel, matched: int) -> tuple[Over, ...]:
    """Return the protocols that differ from each other for this model.

    A locked model has "layer" and "pool": random experts among its own are what a vanilla layer has, and random ones of
    the pool what it had before the lock.
    """
    locked = model.owners is not None
    shared = model.any_expert and not model.layer_private
    usual = {
        "layer": len(model.banks) > 1 or not shared,
        "pool": shared or locked,
        "matched": model.top_k < matched < len(model.layers[0].choices),
    }
    return tuple(over for over in OVERS if usual[over])


def pick_layers(model: MoEModel, wanted: str) -> tuple[MoELayer, ...]:
    """Return the layers that --layers names: "deep" for the deep half, "all", or numbers and ranges as in "4,6-7".

    Raises:
        UserError: It is none of these, or a layer has no router.
    """
    if wanted == "all":
        return model.layers
    by_number = {layer.number: layer for layer in model.layers}
    if wanted == "deep":
        picked = {number for number in by_number if 2 * number >= len(model.model.model.layers)}
    else:
        picked = set()
        for part in wanted.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                raise UserError(f"--layers {wanted}: must be deep, all, or numbers and ranges as in 4,6-7")
            for number in range(int(first), int(last if dash else first) + 1):
                if number not in by_number:
                    known = ", ".join(map(str, by_number))
                    raise UserError(f"--layers {wanted}: layer {number} has no router; layers with one: {known}")
                picked.add(number)
    if not picked:
        raise UserError(f"--layers {wanted}: there is no such layer with a router; use --layers all")
    return tuple(by_number[number] for number in sorted(picked))


def randomize(
    model: MoEModel,
    text: Text,
    layers: Sequence[MoELayer],
    overs: Sequence[Over] | None = None,
    matched: int = 8,
    draws: int = 3,
    seed: int = 0,
    score: Callable[[bool], Scores] | None = None,
) -> RandomizeResult:
    """Measure the loss with each of `layers` randomised, one at a time.

    The draws of a layer depend only on the seed, the layer's number and the protocol; tasks have draws of their own.

    Args:
        model: The model.
        text: The text for the loss, and to count the most used experts on.
        layers: The layers to randomise.
        overs: The protocols (see `candidates`); by default `usual_overs`.
        matched: The number of most used experts for the protocol "matched".
        draws: The number of draws.
        seed: The seed of the draws.
        score: Scores the model on tasks, as `Tasks.score` does for a value of `brief`. None: accuracy is not measured.

    Raises:
        UserError: The model cannot have a protocol, or no task has an accuracy.
    """
    overs = overs or usual_overs(model, matched)
    if "pool" in overs and not model.any_expert:
        raise UserError("--over pool: each layer of this model has its own experts; use layer or matched")
    if "matched" in overs and matched < model.top_k:
        raise UserError(f"--matched {matched}: must be at least {model.top_k}, the number of experts per token")
    most = len(model.layers[0].choices)
    if "matched" in overs and model.owners is not None and matched > most:
        raise UserError(f"--matched {matched}: must be at most {most}, the experts that a layer owns")
    learned = score(False) if score else None
    if learned and not learned.mean:
        raise UserError(NO_ACCURACY)
    counts, found, scored = ExpertCounts(model), list[LayerIncrease](), list[tuple[int, Over, list[Accuracies]]]()
    with observed(model, counts):
        loss = mean_loss(model, text)
    total = len(layers) * len(overs) * draws
    with tqdm(desc="randomising", total=total, unit=" draws", disable=None, leave=False) as bar:
        for layer in layers:
            for over in overs:
                ids_C = candidates(model, layer, over, matched, counts.by_layer[layer.number])
                losses, answers = list[float](), list[Accuracies]()
                for draw in range(draws):
                    numbers = (seed, draw, layer.number, OVERS.index(over))
                    with randomised(layer, ids_C, seeded(*numbers)):
                        losses.append(mean_loss(model, text))
                    if score:
                        with randomised(layer, ids_C, seeded(*numbers, 1)):
                            answers.append(accuracies(score(True)))
                    bar.update()
                mean, spread = mean_and_spread(losses)
                found.append(LayerIncrease(layer.number, over, len(ids_C), tuple(losses), mean - loss, spread))
                scored.append((layer.number, over, answers))
    means = []
    for over in overs:
        mean, spread = mean_and_spread(over_layers([r.losses for r in found if r.over == over]))
        means.append(MeanIncrease(over, mean - loss, spread))
    drops = accuracy(learned, scored) if learned else None
    return RandomizeResult(model.name, text.name, text.tokens, seed, draws, loss, tuple(found), tuple(means), drops)
