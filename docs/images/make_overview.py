"""Draw docs/images/overview.svg: `python docs/images/make_overview.py`.

The upper half shows where the experts are: in every layer (vanilla) or in one pool (UniPool). The lower half shows what
a trunk rank and a pool rank do over time, with one lane and with two.
"""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 940, 582
TEXT, GREY, LINE = "#1f2933", "#5f6b7a", "#9aa5b1"
LAYERS = ("#2f6690", "#3a8f85", "#c8702a", "#8a4f9e")  # a colour per layer
LANES = {"A": "#2f6690", "B": "#d98e3f"}
UNIT = 44  # width of one layer's work in the strips


def box(x: float, y: float, w: float, h: float, fill: str, stroke: str = "none", r: float = 4) -> str:
    """A rounded rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r:g}" fill="{fill}" stroke="{stroke}"/>'


def text(
    x: float, y: float, words: str, size: int = 13, fill: str = TEXT, anchor: str = "start", bold: bool = False
) -> str:
    """A line of text."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{words}</text>'


def layer(x: float, y: float, number: int) -> list[str]:
    """A layer's attention and its router."""
    colour = LAYERS[number]
    return [
        box(x, y, 118, 34, "#f0f4f8", colour),
        text(x + 10, y + 22, f"layer {number + 1}"),
        box(x + 66, y + 6, 46, 22, colour, r=11),
        text(x + 89, y + 21, "router", 11, "#fff", "middle"),
    ]


def vanilla(x: float, y: float) -> list[str]:
    """Each layer with experts of its own."""
    parts = [text(x, y, "Vanilla MoE", 16, bold=True), text(x, y + 20, "Every layer owns its experts.", 13, GREY)]
    for number, colour in enumerate(LAYERS):
        top = y + 40 + 54 * number
        parts += layer(x, top, number)
        parts.append(
            f'<path d="M{x + 118} {top + 17} H{x + 158}" stroke="{colour}" stroke-width="2" marker-end="url(#tip)"/>'
        )
        parts += [box(x + 164 + 34 * expert, top + 3, 28, 28, "#e4e7eb", colour) for expert in range(4)]
    parts.append(text(x, y + 262, "16 experts, and every layer chooses among 4", 12, GREY))
    return parts


def unipool(x: float, y: float) -> list[str]:
    """All layers with one pool."""
    parts = [
        text(x, y, "UniPool", 16, bold=True),
        text(x, y + 20, "All layers share one pool of experts; every layer keeps its own router.", 13, GREY),
        box(x + 262, y + 40, 188, 196, "#fdf6ec", "#c8702a", 8),
        text(x + 356, y + 60, "one pool, on pool ranks", 12, GREY, "middle"),
    ]
    chosen = {(0, 0): 0, (1, 2): 1, (2, 1): 2, (3, 3): 3, (0, 3): 1, (2, 2): 0, (3, 0): 2, (1, 1): 3}
    for row in range(4):
        for column in range(4):
            user = chosen.get((row, column))
            colour = "#c8702a" if user is None else LAYERS[user]
            parts.append(
                box(x + 281 + 39 * column, y + 72 + 40 * row, 32, 32, "#fff" if user is None else colour, colour)
            )
    for number, colour in enumerate(LAYERS):
        top = y + 40 + 54 * number
        parts += layer(x, top, number)
        start, end = top + 17, y + 100 + 25 * number
        parts.append(
            f'<path d="M{x + 118} {start} C{x + 190} {start} {x + 190} {end} {x + 256} {end}" fill="none" '
            f'stroke="{colour}" stroke-width="2" marker-end="url(#tip)"/>'
        )
    parts.append(text(x, y + 262, "16 experts, and every layer chooses among 16", 12, GREY))
    return parts


def strip(x: float, y: float, role: str, work: dict[int, str]) -> list[str]:
    """What one rank does: work by time slot, as in "A1" for layer 1 of lane A; a slot without work is a wait."""
    parts = [text(x - 12, y + 18, role, 12, GREY, "end"), box(x, y, 16 * UNIT, 26, "#f0f4f8", r=3)]
    for slot, name in work.items():
        parts += [
            box(x + UNIT * slot + 1, y + 1, UNIT - 2, 24, LANES[name[0]], r=3),
            text(x + UNIT * (slot + 0.5), y + 18, name, 12, "#fff", "middle"),
        ]
    return parts


def strips(x: float, y: float) -> list[str]:
    """Both ranks with one lane, and with two."""
    one_trunk = {2 * i: f"A{i + 1}" for i in range(4)} | {8 + 2 * i: f"B{i + 1}" for i in range(4)}
    two_trunk = {2 * i + j: f"{lane}{i + 1}" for i in range(4) for j, lane in enumerate("AB")}
    rows = (
        ("One lane: each side waits for the other.", one_trunk),
        ("Two lanes: the pool serves one micro-batch while the trunk computes another.", two_trunk),
    )
    parts = []
    for row, (title, trunk) in enumerate(rows):
        top = y + 108 * row
        parts.append(text(x, top, title, 13, bold=True))
        parts += strip(x, top + 12, "trunk rank", trunk)
        parts += strip(x, top + 42, "pool rank", {slot + 1: name for slot, name in trunk.items()})
    done, end = y + 108 + 12, x + 9 * UNIT + 4
    parts.append(f'<path d="M{end} {done - 4} V{done + 60}" stroke="{TEXT}" stroke-dasharray="4 3"/>')
    parts.append(text(x + 9 * UNIT + 12, done + 18, "the same work is done in 9 slots instead of 16", 12))
    parts.append(text(x + 16 * UNIT, done + 78, "time &#8594;", 12, GREY, "end"))
    parts.append(text(x, done + 78, "A, B: micro-batches (lanes); 1 to 4: layers; forward pass only", 12, GREY))
    return parts


def overview() -> str:
    """The picture."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">'
        "<title>UniPool: many layers, one pool of experts</title>"
        f'<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{GREY}"/></marker></defs>'
    )
    card = box(1, 1, WIDTH - 2, HEIGHT - 2, "#ffffff", LINE, 10)
    divider = f'<path d="M30 330 H{WIDTH - 30}" stroke="#e4e7eb"/>'
    parts = [head, card, *vanilla(40, 48), *unipool(440, 48), divider, *strips(140, 364), "</svg>"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "overview.svg").write_text(overview())
