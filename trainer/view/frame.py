"""A `View` as lines of a terminal of any size: progress, loss, who waits for whom, load of the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from trainer.common.format import duration
from trainer.telemetry.step_scalars import padded
from trainer.telemetry.time_breakdown import ACTIVITIES
from trainer.view.bars import GROUP, Grid, column, gauge, grid, spark, stacked
from trainer.view.rates import Shares
from trainer.view.view import View, who_waits

_MARKS = {"computing": "█", "waiting": "░", "wire": "▓", "optimizer": "▒"}
_STYLES = {"computing": "cyan", "waiting": "yellow", "wire": "magenta", "optimizer": "green"}
_MOST_RANKS = 16
"""Ranks that are shown one by one at most."""
_CLIP = {1: 2.0, 2: 3.0}
"""Multiple of the mean load at which an expert's bar is full at the latest, by its height in lines; otherwise 4."""
_TALLEST_CURVE = 6
_NO_LIMIT = 60
"""Lines of a frame that is written to a file."""

_TITLE = {"layers", "experts", "top_k", "router", "trunk_ranks", "pool_ranks", "precision"}

Cell = tuple[str, str, str]
"""Name, text and style of a fact."""


@dataclass(frozen=True)
class Frame:
    """A `View` that rich can print; it fits the width of the console, and the height of a terminal."""

    view: View
    footer: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or (console.height - 1 if console.is_terminal else _NO_LIMIT)
        lines = frame_lines(self.view, options.max_width, height - bool(self.footer))
        yield Text("\n").join(lines)
        if self.footer:
            yield Text(self.footer, style="dim", no_wrap=True, overflow="ellipsis")


def frame_lines(view: View, width: int, height: int) -> list[Text]:
    """Return the lines of a frame; where there are too few, the last sections are cut, which matter least."""
    head = [_title(view, width), *_progress(view, width), *_flow(_facts(view), width)]
    head += [Text(f"! {note}", style="bold bright_red") for note in view.notes]
    sides = _sides(view, width)
    load_facts = _flow(_load_facts(view), width) if view.experts else []
    shards = _shards(view, width)
    ranks = _rank_lines(view, width)
    curve = 2 if sum(map(math.isfinite, view.losses)) > 1 else 0
    fixed = len(head) + curve + len(sides) + len(load_facts) + len(shards) + 2 * bool(view.experts)
    room = max(height - fixed, 1)
    least = grid(len(view.experts), width - _label_width(view), room).rows if view.experts else 0
    if len(ranks) > min(max(room - least, 0), _MOST_RANKS):
        ranks = []
    room -= len(ranks)
    if curve:  # give the loss some of the room that is left
        more = min(max((room - 3 * least) // 2, 0), _TALLEST_CURVE - curve)
        curve, room = curve + more, room - more
    lines = [*head, *_loss(view, width, curve), *sides[:-1], *ranks, *sides[-1:]]
    if view.experts:
        lines += [_rule("load of the experts", view.load_window, width), *load_facts, *_bars(view, width, room)]
    return [_cut(line, width) for line in (*lines, *shards)]


def _title(view: View, width: int) -> Text:
    i = view.info
    about = []
    if i.keys() >= _TITLE:
        experts = f", {i['experts']} experts, top-{i['top_k']} {i['router']}"
        about.append(f"{i['layers']} layers" + ("" if i["experts"] == "0" else experts))
        colocated = i["pool_ranks"] == "0"
        about.append(f"{i['trunk_ranks']} {'colocated' if colocated else 'trunk + ' + i['pool_ranks'] + ' pool'}")
        about += [f"{i['lanes']} lanes"] if i.get("lanes") else []
        about.append(i["precision"])
    style = "green" if view.state == "running" else "yellow"
    title = Text.assemble((view.run or "run", "bold"), "  ", (view.state, style))
    for part in about:
        if len(title) + len(part) + 3 <= width:
            title.append(f" · {part}", style="dim")
    return title


def _progress(view: View, width: int) -> list[Text]:
    s = view.scalars
    if "step" not in s:
        return []
    target = s.get("target_steps", 0)
    text = f"step {s['step']:,.0f}" + (f" of {target:,.0f}" if target else "")
    if not target:
        return [Text(text)]
    share = min(s["step"] / target, 1.0)
    after = f"{share:4.0%}" + (f"  ETA {duration(s['eta'])}" if "eta" in s else "")
    bar = max(width - len(text) - len(after) - 4, 4)
    return [Text.assemble(text, "  ", (gauge(share, bar), "green on grey23"), "  ", after)]


def _facts(view: View) -> list[Cell]:
    s = view.scalars
    cells: list[Cell] = []
    for name, key, spec in (
        ("loss", "loss", ".4f"),
        ("val loss", "val_loss", ".4f"),
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("lr", "lr", ".3g"),
        ("grad norm", "grad_norm", ".3g"),
    ):
        if key in s and not (key == "val_loss" and math.isnan(s[key])):
            cells.append((name, format(s[key], spec), "bold" if math.isfinite(s[key]) else "bold bright_red"))
    if s.get("checkpoint_step"):
        age = f", {duration(s['checkpoint_age'])} old" if "checkpoint_age" in s else ""
        cells.append(("checkpoint", f"step {s['checkpoint_step']:,.0f}{age}", ""))
    elif "checkpoint_age" in s:
        cells.append(("checkpoint", f"none since {duration(s['checkpoint_age'])}", ""))
    for name, key in (
        ("skipped steps", "skipped_steps"),
        ("failed saves", "checkpoint_failures"),
        ("restarts", "restarts"),
    ):
        if s.get(key):
            cells.append((name, f"{s[key]:,.0f}", "yellow"))
    return cells


def _loss(view: View, width: int, height: int) -> list[Text]:
    """Draw the curve, with its first value at the upper left and its last value at the lower right."""
    finite = [loss for loss in view.losses if math.isfinite(loss)]
    if not height:
        return []
    left, right = f"loss {finite[0]:.3f} ", f" {finite[-1]:.3f}"
    lines = spark(view.losses, width - len(left) - len(right), height)
    texts = [Text.assemble((" " * len(left)), (line, "green")) for line in lines]
    texts[0] = Text.assemble((left, "dim"), (lines[0], "green"))
    texts[-1].append(right, style="bold")
    return texts


def _sides(view: View, width: int) -> list[Text]:
    """Return a rule, a bar for each role, and a sentence."""
    roles = {role: shares for role, shares in view.roles.items() if shares}
    sentence = who_waits(view.roles, view.info)
    if not roles:
        return []
    legend = Text()
    for activity in ACTIVITIES:
        legend.append(f"{_MARKS[activity]} {activity} ", style=_STYLES[activity])
    lines = [_rule("who waits for whom", view.window if width >= 110 else "", width, legend)]
    lines += [_use_line(role, shares, width) for role, shares in roles.items()]
    waiting = [(use.shares["waiting"], use) for use in view.ranks if use.shares]
    if len(waiting) > 2:
        most, use = max(waiting, key=lambda pair: pair[0])
        if most > view.roles[use.role]["waiting"] + 0.1:
            sentence += f" {use.role.capitalize()} rank {use.rank} waits most: {most:.0%}."
    return [*lines, Text(sentence, style="bold")]


def _rank_lines(view: View, width: int) -> list[Text]:
    """Return a bar for each rank of a role that has several."""
    several = [use for use in view.ranks if sum(other.role == use.role for other in view.ranks) > 1 and use.shares]
    return [_use_line(f"  {use.role[0]} {use.rank}", use.shares, width, dim=True) for use in several]


def _use_line(label: str, shares: Shares, width: int, dim: bool = False) -> Text:
    numbers = [(f"{shares[activity]:5.0%}", _STYLES[activity]) for activity in ACTIVITIES]
    bar = max(width - 7 - 5 * len(numbers) - 1, 8)
    line = Text.assemble((f"{label:<7}", "dim" if dim else "bold"))
    for activity, cells in stacked(shares, bar).items():
        line.append(_MARKS[activity] * cells, style=_STYLES[activity])
    line.append(" ")
    for number, style in numbers:
        line.append(number, style=style)
    return line


def _load_facts(view: View) -> list[Cell]:
    s = view.scalars
    cells: list[Cell] = []
    known = [(tokens, expert) for expert, tokens in enumerate(view.experts) if not math.isnan(tokens)]
    most, expert = max(known)
    mean = sum(tokens for tokens, _ in known) / len(known)
    imbalance = s.get("load_imbalance", most / mean if mean else math.nan)
    cells.append(("max/mean", f"{imbalance:.2f}", "bold"))
    cells.append(("busiest", _id(view, expert), ""))
    if view.layers:
        worst = max(range(len(view.layers)), key=lambda layer: view.layers[layer])
        mean = sum(view.layers) / len(view.layers)
        cells.append(("layers", f"{mean:.2f}, worst {worst}: {view.layers[worst]:.2f}", ""))
    elif "layer_imbalance" in s:
        cells.append(("layers", f"{s['layer_imbalance']:.2f}", ""))
    if "shard_imbalance" in s:
        cells.append(("shards", f"{s['shard_imbalance']:.2f}", ""))
    dead = s.get("dead_experts", sum(tokens == 0 for tokens, _ in known))
    cells.append(("dead", f"{dead:,.0f}", "bold bright_red" if dead else "green"))
    for name, key in (("effective", "effective_experts"), ("distinct per token", "distinct_experts")):
        if key in s:
            cells.append((name, f"{s[key]:.1f}", ""))
    return cells


def _bars(view: View, width: int, room: int) -> list[Text]:
    """Return rows of bars, one per expert, that begin with the first expert's number, and what a full bar is."""
    label = _label_width(view)
    g = grid(len(view.experts), width - label, room)
    known = [tokens for tokens in view.experts if not math.isnan(tokens)]
    mean = sum(known) / len(known)
    merged = [_most(view.experts[at : at + g.merged]) for at in range(0, len(view.experts), g.merged)]
    full = min(max(known), _CLIP.get(g.height, 4.0) * mean)
    lines = []
    for first in range(0, len(merged), g.per_row):
        lines += _bar_lines(view, merged[first : first + g.per_row], first, g, mean, full)
    each = "one bar per expert" if g.merged == 1 else f"one bar per {g.merged} experts, for the busiest of them"
    above = " or more" if max(known) > full else ""
    legend = f"{each}; full: {full / mean:.1f} x mean{above}, {full:,.0f} tokens per step" if mean else each
    legend += ("; x: dead" if 0 in known else "") + ("; ?: not known" if len(known) < len(view.experts) else "")
    return [*lines, Text(" " * label + legend, style="dim")]


def _bar_lines(view: View, bars: Sequence[float], first: int, g: Grid, mean: float, full: float) -> list[Text]:
    lines = [Text(" " * _label_width(view)) for _ in range(g.height)]
    lines[-1] = Text.assemble((f"{_id(view, first * g.merged)} ", "dim"))
    for place, tokens in enumerate(bars):
        if place and place % GROUP == 0:
            for line in lines:
                line.append(" ")
        cells, style = _bar(tokens, mean, full, g.height)
        for line, cell in zip(lines, cells, strict=True):
            line.append(cell * g.width, style=style)
    return lines


def _bar(tokens: float, mean: float, full: float, height: int) -> tuple[str, str]:
    if math.isnan(tokens):
        return "?".rjust(height), "dim"
    if tokens == 0:
        return "x".rjust(height), "bold bright_red"
    style = "bright_red" if tokens > 4 * mean else "yellow" if tokens > 2 * mean else "cyan"
    return column(tokens / full, height), "dim cyan" if tokens < mean / 2 else style


def _most(tokens: Sequence[float]) -> float:
    return max((number for number in tokens if not math.isnan(number)), default=math.nan)


def _shards(view: View, width: int) -> list[Text]:
    """Return each pool rank's share of the assignments."""
    served = [use for use in view.ranks if use.role == "pool" and use.served == use.served]
    total = sum(use.served for use in served)
    if len(served) < 2 or not total:
        return []
    title = "pool ranks' share"
    shares = [f"{use.rank}: {use.served / total:.0%}" for use in served]
    if len(title) + sum(len(text) + 3 for text in shares) <= width:
        return _flow([(title, "   ".join(shares), "")], width)
    most = max(served, key=lambda use: use.served)
    said = f"max/mean {most.served * len(served) / total:.2f}, most: rank {most.rank}"
    bars = "".join(column(use.served / most.served, 1) for use in served)
    room = width - len(title) - len(said) - 4
    return _flow([(title, f"{bars}  {said}" if len(bars) <= room else said, "")], width)


def _flow(cells: Sequence[Cell], width: int) -> list[Text]:
    """Arrange facts side by side, in as many lines as they need."""
    lines: list[Text] = []
    for name, text, style in cells:
        cell = Text.assemble((f"{name} ", "dim"), (text, style))
        if lines and len(lines[-1]) + 3 + len(cell) <= width:
            lines[-1].append("   ").append_text(cell)
        else:
            lines.append(cell)
    return lines


def _rule(title: str, aside: str, width: int, legend: Text | None = None) -> Text:
    """Draw a line with a title, a legend and a remark in it."""
    line = Text.assemble(("── ", "dim"), (title, "bold"), " ")
    if legend:
        line.append_text(Text.assemble(("── ", "dim"), legend))
    if aside:
        line.append_text(Text.assemble(("── ", "dim"), (f"{aside} ", "dim")))
    return line.append("─" * max(width - len(line), 0), style="dim")


def _label_width(view: View) -> int:
    return len(_id(view, 0)) + 1


def _id(view: View, expert: int) -> str:
    return padded(expert, len(view.experts))


def _cut(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    text.no_wrap = True
    return text
