"""The heat map: the numbers that it is drawn from, and that the file appears whole."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer.telemetry.expert_heatmap import draw_heat_map, draw_ownership, over_all_experts, write_heat_map


def counts(layers: int, experts: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).poisson(3, (layers, experts))


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, of a file that begins and ends as a PNG does."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.parametrize(
    ("layers", "experts", "size"),
    [(1, 1, (960, 504)), (8, 64, (1051, 542)), (24, 192, (2400, 1003)), (48, 384, (2400, 1440))],
)
def test_file_appears_whole(layers: int, experts: int, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "load.png"
    write_heat_map(counts(layers, experts), path, "step 160")
    assert png_size(path) == size
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "load.png"
    write_heat_map(counts(2, 5), path, "old")
    old = path.read_bytes()

    def half(canvas: object, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"\x89PNG")
        raise OSError("disk full")

    monkeypatch.setattr("trainer.telemetry.expert_heatmap.FigureCanvasAgg.print_figure", half)
    with pytest.raises(OSError, match="disk full"):
        write_heat_map(counts(2, 5), path, "new")
    assert path.read_bytes() == old


def test_picture_shows_the_data(tmp_path: Path) -> None:
    pictures = []
    for number, tokens_LM in enumerate((counts(3, 7), counts(3, 7), counts(3, 7, seed=1))):
        path = tmp_path / f"{number}.png"
        write_heat_map(tokens_LM, path, "step 1")
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_layers_without_tokens(tmp_path: Path) -> None:
    tokens_LM = counts(3, 7)
    tokens_LM[1] = 0
    with np.errstate(all="raise"):
        write_heat_map(tokens_LM, tmp_path / "some.png", "a layer without tokens")
        write_heat_map(np.zeros_like(tokens_LM), tmp_path / "none.png", "no tokens")


def test_one_group_sees_all_experts() -> None:
    np.testing.assert_array_equal(over_all_experts(counts(3, 7), 1), counts(3, 7))


def test_groups_are_blocks_on_the_diagonal(tmp_path: Path) -> None:
    nan = np.nan
    tokens_LM = np.array([[1, 2], [3, 4], [5, 6], [7, 8]])
    expected_LM = [[1, 2, nan, nan], [3, 4, nan, nan], [nan, nan, 5, 6], [nan, nan, 7, 8]]
    np.testing.assert_array_equal(over_all_experts(tokens_LM, 2), expected_LM)
    vanilla_LM = over_all_experts(counts(4, 3), 4)
    assert [np.flatnonzero(~np.isnan(row)).tolist() for row in vanilla_LM] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ]
    write_heat_map(tokens_LM, tmp_path / "groups.png", "sub-pools", groups=2)
    write_heat_map(tokens_LM, tmp_path / "one.png", "sub-pools", groups=1)
    assert (tmp_path / "groups.png").read_bytes() != (tmp_path / "one.png").read_bytes()


def framed(figure: Figure) -> list[tuple[int, int, int]]:
    """First column, row and number of columns of each frame on the map, whatever the scale of the axes is."""
    (frames,) = [c for c in figure.axes[0].collections if isinstance(c, PatchCollection)]
    boxes = [path.get_extents() for path in frames.get_paths()]
    return [(round(b.x0 + 0.5), round(b.y0 + 0.5), round(b.width)) for b in boxes]


def test_own_experts_are_framed() -> None:
    figure = draw_heat_map(counts(3, 6), "step 1", owners=(2, 0, 1, 0, 2, 1))
    assert framed(figure) == [(0, 2, 1), (1, 0, 1), (2, 1, 1), (3, 0, 1), (4, 2, 1), (5, 1, 1)]
    assert not [c for c in draw_heat_map(counts(3, 6), "step 1").axes[0].collections if isinstance(c, PatchCollection)]


def test_experts_are_ordered_by_owner() -> None:
    tokens_LM = np.array([[1, 5, 0, 8], [7, 2, 9, 0]])
    figure = draw_ownership(tokens_LM.astype(float), (1, 0, 1, 0), "run", (13 / 14, 16 / 18), 0.95)
    shown_LM = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(shown_LM, tokens_LM[:, [3, 1, 2, 0]] / np.array([[14], [18]]))
    assert framed(figure) == [(0, 0, 2), (2, 1, 2)]
    bars = [bar.get_width() for bar in figure.axes[1].patches]
    assert bars == pytest.approx([13 / 14, 16 / 18])
