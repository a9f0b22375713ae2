"""A `View` as lines of a terminal of any size: progress, loss, who waits for whom, load of the experts."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from trainer.common.format import duration, percent, quantity, size
from trainer.config.lock import STAGES
from trainer.telemetry.step_scalars import padded
from trainer.telemetry.time_breakdown import ACTIVITIES
from trainer.view.bars import GROUP, Grid, column, gauge, grid, spark
from trainer.view.rates import Shares
from trainer.view.records import finite, finite_mean
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
    head = [*_title(view, width), *_progress(view, width), *_flow(_facts(view.scalars), width)]
    head += [line for note in view.notes for line in _note(note, width)]
    sides = _sides(view, width)
    load = [_rule(width, Text("load of the experts", "bold"), Text(view.load_window, "dim"))] if view.experts else []
    load += _flow(_load_facts(view), width) if view.experts else []
    shards = _shards(view, width)
    ranks = _rank_lines(view, width)
    curve = 2 if len(finite(view.losses)) > 1 else 0
    room = max(height - sum(map(len, (head, sides, load, shards))) - curve - bool(view.experts), 1)
    least = _grid(view, width, room).rows if view.experts else 0
    if len(ranks) > min(max(room - least, 0), _MOST_RANKS):
        ranks = []
    room -= len(ranks)
    if curve:  # give the loss some of the room that is left
        more = min(max((room - 3 * least) // 2, 0), _TALLEST_CURVE - curve)
        curve, room = curve + more, room - more
    lines = [*head, *_loss(view, width, curve), *sides[:-1], *ranks, *sides[-1:], *load]
    lines += _bars(view, width, room) if view.experts else []
    lines += shards
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines


def _title(view: View, width: int) -> list[Text]:
    """Name the run and its state and, on the same line if there is room, its model and layout."""
    title = Text.assemble((view.run or "run", "bold"), "  ")
    title.append(view.state, style="green" if view.state == "running" else "yellow")
    i = view.info
    if i.keys() >= _TITLE:
        experts = "" if i["experts"] == "0" else f", {i['experts']} experts, top-{i['top_k']} {i['router']}"
        ranks = "colocated" if i["pool_ranks"] == "0" else f"trunk + {i['pool_ranks']} pool"
        if i.get("layout") == "every_rank":
            ranks = "ranks with both roles"
        lanes = f" · {i['lanes']} lane{'' if i['lanes'] == '1' else 's'}" if i.get("lanes") else ""
        text = f"{i['layers']} layers{experts} · {i['trunk_ranks']} {ranks}{lanes} · {i['precision']}"
        text += f" · {i['devices']}" if i.get("devices") else ""
        if len(title) + 3 + len(text) > width:
            return [title, Text(text, "dim")]
        title.append(f" · {text}", "dim")
    return [title]


def _progress(view: View, width: int) -> list[Text]:
    s = view.scalars
    if "step" not in s:
        return []
    text, target = f"step {s['step']:,.0f}", s.get("target_steps", 0)
    if not target:
        return [Text(text)]
    text += f" of {target:,.0f}"
    share = min(s["step"] / target, 1.0)
    after = f"{share:4.0%}" + (f"  ETA {duration(s['eta'])}" if "eta" in s else "")
    bar = max(width - len(text) - len(after) - 4, 4)
    return [Text.assemble(text, "  ", (gauge(share, bar), "green on grey23"), "  ", after)]


def _facts(s: Mapping[str, float]) -> list[Cell]:
    facts = _cells(
        s,
        ("loss", "loss", ".4f", "bold"),
        ("val loss", "val_loss", ".4f", "bold"),
        ("tokens/s", "tokens_per_second", ",.0f", "bold"),
        ("lr", "lr", ".3g", "bold"),
        ("grad norm", "grad_norm", ".3g", "bold"),
    )
    if s.get("lock_stage") in range(len(STAGES)):
        facts.append(("stage of the lock", STAGES[int(s["lock_stage"])], ""))
    facts += _quantities(s)
    age = duration(s["checkpoint_age"]) if "checkpoint_age" in s else ""
    if s.get("checkpoint_step"):
        facts.append(("checkpoint", f"step {s['checkpoint_step']:,.0f}" + (f", {age} old" if age else ""), ""))
    elif age:
        facts.append(("checkpoint", f"none since {age}", ""))
    return facts + _cells(
        {key: count for key, count in s.items() if count},
        ("skipped steps", "skipped_steps", ",.0f", "yellow"),
        ("failed saves", "checkpoint_failures", ",.0f", "yellow"),
        ("restarts", "restarts", ",.0f", "yellow"),
    )


def _quantities(s: Mapping[str, float]) -> list[Cell]:
    """Format the efficiency of the last step."""
    shown = {
        "per rank": ("flops_per_second", lambda n: quantity(n, "FLOP/s")),
        "MFU": ("mfu", lambda n: percent(n, 1)),
        "memory": ("trunk_memory", size),
        "pool memory": ("pool_memory", size),
        "goodput": ("goodput", percent),
    }
    return [(name, show(s[key]), "") for name, (key, show) in shown.items() if math.isfinite(s.get(key, math.nan))]


def _cells(scalars: Mapping[str, float], *facts: tuple[str, str, str, str]) -> list[Cell]:
    """Format those scalars that are known.

    Args:
        scalars: Values by key.
        facts: Name, key, format specification and style of each.
    """
    known = [(name, scalars[key], spec, style) for name, key, spec, style in facts if key in scalars]
    return [(name, format(n, spec), style if math.isfinite(n) else "bold bright_red") for name, n, spec, style in known]


def _note(note: str, width: int) -> list[Text]:
    """Return a problem in as many lines as it needs: which ranks are silent stands at its end."""
    lines = textwrap.wrap(note, max(width - 2, 8), break_on_hyphens=False) or [""]
    return [Text(f"{'  ' if place else '! '}{line}", style="bold bright_red") for place, line in enumerate(lines)]


def _loss(view: View, width: int, height: int) -> list[Text]:
    """Draw the curve, with its first value at the upper left and its last value at the lower right."""
    if not height:
        return []
    losses = finite(view.losses)
    left, right = f"loss {losses[0]:.3f} ", f" {losses[-1]:.3f}"
    lines = spark(view.losses, width - len(left) - len(right), height)
    texts = [
        Text.assemble((left if not place else " " * len(left), "dim"), (line, "green"))
        for place, line in enumerate(lines)
    ]
    texts[-1].append(right, style="bold")
    return texts


def _sides(view: View, width: int) -> list[Text]:
    """Return a rule, a bar for each role, and a sentence."""
    roles = {role: shares for role, shares in view.roles.items() if shares}
    if not roles:
        return []
    legend = Text(" ").join(Text(f"{_MARKS[activity]} {activity}", _STYLES[activity]) for activity in ACTIVITIES)
    rule = _rule(width, Text("who waits for whom", "bold"), legend, Text(view.window if width >= 110 else "", "dim"))
    sentence = who_waits(view.roles, view.info)
    waiting = [(use.shares["waiting"], use) for use in view.ranks if use.shares]
    if len(waiting) > 2:
        most, use = max(waiting, key=lambda pair: pair[0])
        if most > view.roles[use.role]["waiting"] + 0.1:
            sentence += f" {use.role.capitalize()} rank {use.rank} waits most: {most:.0%}."
    bars = [_use_line(role, "bold", shares, width) for role, shares in roles.items()]
    return [rule, *bars, Text(sentence, style="bold")]


def _rank_lines(view: View, width: int) -> list[Text]:
    """Return a bar for each rank of a role that has several."""
    ranks = Counter(use.role for use in view.ranks)
    several = [use for use in view.ranks if ranks[use.role] > 1 and use.shares]
    return [_use_line(f"  {use.role[0]} {use.rank}", "dim", use.shares, width) for use in several]


def _use_line(label: str, style: str, shares: Shares, width: int) -> Text:
    """Return a stacked bar of shares of time, which add up to 1, and the numbers."""
    bar = max(width - 7 - 5 * len(ACTIVITIES) - 1, 8)
    line = Text.assemble((f"{label:<7}", style))
    end = 0.0
    for activity in ACTIVITIES:
        start, end = end, end + shares[activity]
        line.append(_MARKS[activity] * (round(bar * end) - round(bar * start)), style=_STYLES[activity])
    line.append(" ")
    for activity in ACTIVITIES:
        line.append(f"{shares[activity]:5.0%}", style=_STYLES[activity])
    return line


def _load_facts(view: View) -> list[Cell]:
    load, mean = finite(view.experts), finite_mean(view.experts)
    dead = view.scalars.get("dead_experts", float((load == 0).sum()))
    s = {"load_imbalance": load.max() / mean if mean else math.nan, **view.scalars}
    layers = _cells(s, ("layers", "layer_imbalance", ".2f", ""))
    if view.layers:
        worst = max(view.layers)
        text = f"{finite_mean(view.layers):.2f}, worst {view.layers.index(worst)}: {worst:.2f}"
        layers = [("layers", text, "")]
    return [
        *_cells(s, ("max/mean", "load_imbalance", ".2f", "bold")),
        ("busiest", _id(view, int(np.nanargmax(view.experts))), ""),
        *layers,
        *_cells(s, ("shards", "shard_imbalance", ".2f", "")),
        ("dead", f"{dead:,.0f}", "bold bright_red" if dead else "green"),
        *([("on their own experts", percent(s["own_share"]), "")] if "own_share" in s else []),
        *_cells(
            s, ("effective", "effective_experts", ".1f", ""), ("distinct per token", "distinct_experts", ".1f", "")
        ),
    ]


def _grid(view: View, width: int, room: int) -> Grid:
    return grid(len(view.experts), width - len(_id(view, 0)) - 1, room)


def _bars(view: View, width: int, room: int) -> list[Text]:
    """Return rows of bars, one per expert, that begin with the first expert's number, and what a full bar is."""
    g = _grid(view, width, room)
    mean, most = finite_mean(view.experts), float(finite(view.experts).max())
    full = min(most, _CLIP.get(g.height, 4.0) * mean)
    indent = " " * (len(_id(view, 0)) + 1)
    lines = []
    in_row = g.merged * g.per_row
    for first in range(0, len(view.experts), in_row):
        row = [Text(indent) for _ in range(g.height - 1)] + [Text.assemble((f"{_id(view, first)} ", "dim"))]
        for place, start in enumerate(range(first, min(first + in_row, len(view.experts)), g.merged)):
            tokens = max(finite(view.experts[start : start + g.merged]), default=math.nan)
            cells, style = _bar(tokens, mean, full, g.height)
            gap = " " if place and place % GROUP == 0 else ""
            for line, cell in zip(row, cells, strict=True):
                line.append(gap).append(cell * g.width, style=style)
        lines += row
    return [*lines, Text(indent + _legend(view, g, full, mean, width - len(indent)), style="dim")]


def _legend(view: View, g: Grid, full: float, mean: float, width: int) -> str:
    """Say what a bar is, how high a full one is, and what its marks mean; in fewer words where there is no room."""
    known = finite(view.experts)
    marks = ("; x: dead" if 0 in known else "") + ("; ?: not known" if len(known) < len(view.experts) else "")
    level = f"full: {full / mean:.1f} x mean{' or more' if known.max() > full else ''}" if mean else ""
    each = f"one bar per {g.merged} experts, for the busiest of them" if g.merged > 1 else "one bar per expert"
    long = f"{each}; {level}, {full:,.0f} tokens per step" if mean else each
    if len(long + marks) <= width or not mean:
        return long + marks
    return (f"the busiest of {g.merged} each; " if g.merged > 1 else "") + level + marks


def _bar(tokens: float, mean: float, full: float, height: int) -> tuple[str, str]:
    if math.isnan(tokens):
        return "?".rjust(height), "dim"
    if tokens == 0:
        return "x".rjust(height), "bold bright_red"
    style = "bright_red" if tokens > 4 * mean else "yellow" if tokens > 2 * mean else "cyan"
    return column(tokens / full, height), "dim cyan" if tokens < mean / 2 else style


def _shards(view: View, width: int) -> list[Text]:
    """Return the share of the assignments of each rank that serves them."""
    both = view.info.get("layout") == "every_rank"
    serving = (use for use in view.ranks if both or use.role == "pool")
    served = {use.rank: use.served for use in serving if not math.isnan(use.served)}
    total = sum(served.values())
    if len(served) < 2 or not total:
        return []
    name = "ranks' share" if both else "pool ranks' share"
    text = "   ".join(f"{rank}: {tokens / total:.0%}" for rank, tokens in served.items())
    if len(name) + 3 + len(text) > width:
        busiest = max(served, key=lambda rank: served[rank])
        text = f"max/mean {served[busiest] * len(served) / total:.2f}, most: rank {busiest}"
        text += "  " + "".join(column(tokens / served[busiest], 1) for tokens in served.values())
    return _flow([(name, text, "")], width)


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


def _rule(width: int, *parts: Text) -> Text:
    """Draw a line with texts in it."""
    line = Text()
    for part in filter(None, parts):
        line.append("── ", style="dim").append_text(part).append(" ")
    return line.append("─" * max(width - len(line), 0), style="dim")


def _id(view: View, expert: int) -> str:
    return padded(expert, len(view.experts))
