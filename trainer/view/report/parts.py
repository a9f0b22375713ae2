"""Parts of a page of HTML: figures, lists, tables. Texts that come from a run are escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from trainer.view.report.charts import COLOURS, STYLES
from trainer.view.report.facts import Facts


def fill_page(name: str, about: str, sections: Sequence[tuple[str, str]], top: str = "") -> str:
    """Return the HTML of a page; sections without a body are left out.

    Args:
        name: Its title.
        about: What stands below it, HTML.
        sections: Titles and bodies, HTML.
        top: What stands above the sections, HTML.
    """
    files = resources.files("trainer.view.report")
    bodies = [f"<section><h2>{title}</h2>{body}</section>" for title, body in sections if body]
    return Template((files / "report.html").read_text()).substitute(
        name=escape(name), style=(files / "report.css").read_text(), about=about, sections="\n".join([top, *bodies])
    )


def figure(caption: str, picture: str) -> str:
    """Return a picture with a caption; both are HTML."""
    return f"<figure><figcaption>{caption}</figcaption>{picture}</figure>"


def titled(title: str, picture: str) -> str:
    """Return a picture with a title; nothing without a picture."""
    return figure(f"<b>{escape(title)}</b>", picture) if picture else ""


def curves(*figures: str) -> str:
    """Return figures side by side; nothing without any."""
    inside = "".join(figures)
    return f'<div class="curves">{inside}</div>' if inside else ""


def wide(picture: str) -> str:
    """Return a picture that scrolls where the page is narrower."""
    return f'<div class="scroll">{picture}</div>'


def fact_list(found: Facts, style: str = "") -> str:
    """Return names and values."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in found)
    return f'<dl class="{style}">{items}</dl>' if items else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = (), keys: bool = False) -> str:
    """Return a table in a card; nothing without rows.

    Args:
        head: Names of its columns.
        rows: Texts of its cells.
        marked: Whether to mark each row; none by default.
        keys: Whether the columns but the first are runs, in the colours of their lines.
    """
    if not rows:
        return ""
    names = [key(text, place) if keys and place >= 0 else escape(text) for place, text in enumerate(head, -1)]
    top = "".join(f"<th>{name}</th>" for name in names)
    styles = [' class="differs"' if mark else "" for mark in marked] or [""] * len(rows)
    cells = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in rows)
    body = "".join(f"<tr{style}>{row}</tr>" for style, row in zip(styles, cells, strict=True))
    return f'<div class="card scroll"><table><tr>{top}</tr>{body}</table></div>'


def key(text: str, place: int) -> str:
    """Return a name with the colour of the line at this place in a chart's legend."""
    colour, dashes = STYLES[place]
    dashed = " dashed" if dashes != "-" else ""
    return f'<span class="key{dashed}" style="--key: {COLOURS[colour]}">{escape(text)}</span>'


def quiet(text: str) -> str:
    """Return a remark in a paragraph of its own."""
    return f'<p class="quiet">{escape(text)}</p>'


def missing(lines: Sequence[str]) -> str:
    """Return what the page cannot show and why; nothing without any line."""
    return f'<div class="missing">{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>' if lines else ""
