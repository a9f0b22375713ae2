"""What the learned choice of experts is worth: METHOD.md, probe 1 (routing randomisation)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainer.common.errors import UserError
from trainer.model.random_routing import seeded
from trainer.probe.accuracy import Accuracies, Accuracy, Exam, accuracy
from trainer.probe.adapters import Choice, MoELayer, MoEModel, observed, rerouted
from trainer.probe.effects import OVERS, WHAT, Effect, Over, effect_table, over_layers, plot_effects, spread_of
from trainer.probe.output import INK
from trainer.probe.text import Text, mean_loss, progress

if TYPE_CHECKING:
    from rich.table import Table

    from trainer.evaluate.scores import Scores


@dataclass(frozen=True)
class Randomised:
    """One layer with random experts.

    Attributes:
        over, experts: from which, and how many, they were drawn.
        losses: of every draw, nats a token.
        increase: mean over the draws, over the learned routing's loss.
        spread: standard deviation over the draws; None for one.
    """

    layer: int
    over: Over
    experts: int
    losses: tuple[float, ...]
    increase: float
    spread: float | None


@dataclass(frozen=True)
class Mean:
    """The mean over the layers; `spread` is the standard deviation of that mean over the draws."""

    over: Over
    increase: float
    spread: float | None


@dataclass(frozen=True)
class Randomization:
    """A `Result`. `loss` is that of the learned routing; `accuracy` is None without tasks."""

    model: str
    text: str
    tokens: int
    seed: int
    draws: int
    loss: float
    layers: tuple[Randomised, ...]
    means: tuple[Mean, ...]
    accuracy: Accuracy | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

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

    def effects(self) -> list[Effect]:
        means = [Effect(None, m.over, m.increase, m.spread) for m in self.means]
        return [Effect(r.layer, r.over, r.increase, r.spread) for r in self.layers] + means

    def tables(self) -> list[Table]:
        title = f"{self.model}: loss with random experts in one layer, {self.text}"
        losses = effect_table(title, self.effects(), "+z.4f")
        return [losses, *self.accuracy.tables(self.model)] if self.accuracy else [losses]

    def notes(self) -> list[str]:
        experts = {over: sorted({r.experts for r in self.layers if r.over == over}) for over in OVERS}
        drawn = "; ".join(f"{WHAT[over]}: {', '.join(map(str, n))}" for over, n in experts.items() if n)
        spread = f"± is the standard deviation over {self.draws} draws. " if self.draws > 1 else ""
        return [
            f"Learned routing: {self.loss:.4f} nats a token over {self.tokens:,} tokens; the table has the increase.",
            f"{spread}Drawn from: {drawn}.",
            "Gate values stay the learned ones; the experts alone are drawn, K different ones a token.",
            *(self.accuracy.notes() if self.accuracy else []),
        ]

    def draw(self) -> Figure:
        """Increase by layer, a line a protocol with its spread, and the means; below it the same of accuracy's drop."""
        panels = 2 if self.accuracy else 1
        figure = Figure(figsize=(7, 1.4 + 3.2 * panels), dpi=120, layout="constrained")
        axes, *below = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
        labels = {mean.over: f"random over {WHAT[mean.over]}, mean {mean.increase:+z.4f}" for mean in self.means}
        if self.accuracy:
            for drop in self.accuracy.means:
                labels[drop.over] += f" nats, {drop.drop:z.2f} points"
            plot_effects(below[0], self.accuracy.effects(), {})
            learned = self.accuracy.learned.mean["acc"]
            below[0].set_ylabel(f"accuracy drop, points (from {100 * learned:.1f} %)")
        plot_effects(axes, self.effects(), labels)
        axes.set_ylabel(f"loss increase, nats (from {self.loss:.3f})")
        (below or [axes])[-1].set_xlabel("layer that is randomised", color=INK)
        figure.legend(loc="outside lower center", frameon=False, fontsize=9, labelcolor=INK)
        axes.set_title(f"{self.model}: random experts in one layer", loc="left", color=INK, fontsize=12)
        return figure


@contextmanager
def randomised(layer: MoELayer, candidates_C: Tensor, generator: torch.Generator) -> Iterator[None]:
    """Every forward of the model inside the `with` has random experts in one layer.

    METHOD.md, "What the paper measured", probe 1: "in one layer of the deep half replace the learned top-k by uniform
    random experts". Each token gets K different ones. Of the gate values METHOD.md says nothing: here the learned ones
    stay, the k-th for the k-th random expert, so that the FFN keeps its size and only the choice is lost.

    Args:
        candidates_C: global ids to draw from, on the CPU, at least K of them; see `candidates`.
        generator: on the CPU, so that all devices draw the same.
    """

    def draw(ids_TK: Tensor) -> Tensor:
        tokens, top_k = ids_TK.shape
        places_TK = torch.rand(tokens, len(candidates_C), generator=generator).topk(top_k, dim=-1).indices
        return candidates_C[places_TK].to(ids_TK.device)

    with rerouted(layer, draw):
        yield


def candidates(model: MoEModel, layer: MoELayer, over: Over, matched: int, counts_E: Tensor) -> Tensor:
    """Global ids to draw from.

    Args:
        over: "layer": the experts that the layer chooses among; "pool": all of the model's; "matched": those that it
            uses most.
        matched: how many.
        counts_E: the layer's assignments by expert of its bank, on held-out text.
    """
    if over == "pool":
        return torch.arange(model.experts)
    if over == "layer":
        return layer.bank.first + torch.arange(layer.bank.experts)
    return layer.bank.first + counts_E.sort(descending=True, stable=True).indices[:matched]


def usual_overs(model: MoEModel, matched: int) -> tuple[Over, ...]:
    """The protocols that differ from each other for this model, by METHOD.md: the pool is for models that share one."""
    shared = model.any_expert and not model.layer_private
    usual = {
        "layer": len(model.banks) > 1 or not shared,
        "pool": shared,
        "matched": model.top_k < matched < model.banks[0].experts,
    }
    return tuple(over for over in OVERS if usual[over])


def pick_layers(model: MoEModel, wanted: str) -> tuple[MoELayer, ...]:
    """Layers by "deep" (numbers from half of the depth on), "all", or numbers and ranges as in "4,6-7".

    Raises:
        UserError: it is none of these, or a layer has no router.
    """
    by_number = {layer.number: layer for layer in model.layers}
    if wanted == "all":
        return model.layers
    if wanted == "deep":
        deep = tuple(layer for layer in model.layers if 2 * layer.number >= model.depth)
        if not deep:
            raise UserError("--layers deep: no layer of the deep half has a router; give all")
        return deep
    picked: dict[int, MoELayer] = {}
    for part in wanted.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--layers {wanted}: give deep, all, or numbers and ranges as in 4,6-7")
        for number in range(int(first), int(last if dash else first) + 1):
            if number not in by_number:
                raise UserError(
                    f"--layers {wanted}: layer {number} has no router; those that have: "
                    f"{', '.join(map(str, by_number))}"
                )
            picked[number] = by_number[number]
    if not picked:
        raise UserError(f"--layers {wanted}: names no layer")
    return tuple(picked[number] for number in sorted(picked))


def randomize(
    model: MoEModel,
    text: Text,
    layers: Sequence[MoELayer],
    overs: Sequence[Over] | None = None,
    matched: int = 8,
    draws: int = 3,
    seed: int = 0,
    score: Callable[[bool], Scores] | None = None,
) -> Randomization:
    """The loss on `text` with each of `layers` randomised, one at a time, beside that of the learned routing.

    A layer's draws depend on nothing but the seed, its number and the protocol; those for tasks are others.

    Args:
        overs: protocols (see `candidates`); default: those that differ.
        matched: of how many most used experts the matched protocol draws; they are counted on the same text.
        score: scores the model on tasks, as `Exam` takes it: then accuracy is measured too.

    Raises:
        UserError: a protocol that the model cannot have, or tasks without accuracy.
    """
    overs = overs or usual_overs(model, matched)
    if "pool" in overs and not model.any_expert:
        raise UserError("--over pool: each layer of this model has experts of its own; give layer or matched")
    if "matched" in overs and matched < model.top_k:
        raise UserError(f"--matched {matched}: a token takes {model.top_k} different experts; give at least as many")
    counts = {layer.number: torch.zeros(layer.bank.experts, dtype=torch.int64) for layer in model.layers}

    def count(layer: MoELayer, choice: Choice) -> None:
        own = (choice.topk_expert_ids_TK - layer.bank.first).flatten().cpu()
        counts[layer.number] += torch.bincount(own, minlength=layer.bank.experts)

    exam = Exam(model, score) if score else None
    found, taken = [], list[tuple[int, Over, list[Accuracies]]]()
    routings = len(layers) * len(overs) * draws
    forwards = (1 + routings) * len(text.batches) + (routings * exam.forwards if exam else 0)
    with progress("randomising", forwards) as done:
        with observed(model, count):
            loss = mean_loss(model, text, done)
        for layer in layers:
            for over in overs:
                ids_C = candidates(model, layer, over, matched, counts[layer.number])
                losses, answers = [], []
                for draw in range(draws):
                    numbers = (seed, draw, layer.number, OVERS.index(over))
                    with randomised(layer, ids_C, seeded(*numbers)):
                        losses.append(mean_loss(model, text, done))
                    if exam:
                        with randomised(layer, ids_C, seeded(*numbers, 1)):
                            answers.append(exam.take(done))
                increase = statistics.fmean(losses) - loss
                found.append(Randomised(layer.number, over, len(ids_C), tuple(losses), increase, spread_of(losses)))
                taken.append((layer.number, over, answers))
    means = tuple(_mean_over_layers(over, loss, [r for r in found if r.over == over]) for over in overs)
    drops = accuracy(exam.learned, taken) if exam else None
    return Randomization(model.name, text.name, text.tokens, seed, draws, loss, tuple(found), means, drops)


def _mean_over_layers(over: Over, loss: float, layers: Sequence[Randomised]) -> Mean:
    by_draw = over_layers([r.losses for r in layers])
    return Mean(over, statistics.fmean(by_draw) - loss, spread_of(by_draw))
