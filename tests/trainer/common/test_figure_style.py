"""What all pictures share."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from trainer.common.figure_style import (
    INK,
    SERIES,
    add_legend,
    new_figure,
    spread_labels,
    style_axes,
    write_png_and_svg,
)


def test_equal_figures_make_equal_files(tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        figure = new_figure(3, 2)
        axes = figure.subplots()
        axes.plot([1, 2], [3, 4], color=SERIES[0], label="curve")
        style_axes(axes, "both")
        add_legend(axes)
        written.append([path.read_bytes() for path in write_png_and_svg(figure, tmp_path / f"{name}.any")])
    assert written[0] == written[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]
    assert written[0][0].startswith(b"\x89PNG") and b"<svg" in written[0][1] and b"dc:date" not in written[0][1]


def test_style() -> None:
    axes = new_figure(3, 2).subplots()
    style_axes(axes, "none")
    assert not axes.spines["top"].get_visible() and axes.spines["left"].get_visible()
    assert to_hex(axes.xaxis.label.get_color()) == INK


@pytest.mark.parametrize(
    ("heights", "expected"),
    [([], []), ([3.0, 1.0], [3.0, 1.0]), ([1.0, 1.0], [0.5, 1.5]), ([0.0, 0.2, 0.4, 9.0], [-0.8, 0.2, 1.2, 9.0])],
)
def test_labels_keep_their_distance(heights: list[float], expected: list[float]) -> None:
    assert spread_labels(heights, 1.0) == pytest.approx(expected)


def test_blocks_of_labels_push_each_other() -> None:
    spread = spread_labels([0.0, 0.1, 1.2, 1.3], 1.0)
    assert all(b - a >= 1.0 - 1e-9 for a, b in pairwise(spread))
    assert sum(spread) == pytest.approx(2.6)
