"""The pictures of the documentation can be made again."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from xml.etree import ElementTree

from tests.trainer.made_up import write_run

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def test_pictures_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "quickstart", 160)
    runpy.run_path(str(IMAGES / "make.py"))["main"](run, tmp_path)
    made = {"watch.svg", "resharding.svg", "load.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"quickstart", *made}
    for name in made - {"load.png"}:
        ElementTree.parse(tmp_path / name)
    watch = (tmp_path / "watch.svg").read_text().replace("&#160;", " ")
    assert "step 150 of 240" in watch and "http" not in watch.replace("http://www.w3.org", "").replace(
        "https://www.textualize.io", ""
    )


def test_the_list_of_pictures_is_complete() -> None:
    text = (IMAGES / "README.md").read_text()
    listed = {path.name for path in IMAGES.iterdir() if path.suffix in (".svg", ".png")}
    assert all(f"`{name}`" in text for name in listed)


def test_results_hold_what_their_tables_say() -> None:
    """result.json and result.csv of every recorded result agree."""
    results = sorted((IMAGES.parent / "results").glob("*/result.json"))
    assert results
    for file in results:
        tree = json.loads(file.read_text())
        lines = file.with_name("result.csv").read_text().splitlines()[1:]
        assert len(lines) == len(tree["variants"])
        for line, variant in zip(lines, tree["variants"], strict=True):
            losses = [run["val_loss"] for run in variant["runs"]]
            assert abs(sum(losses) / len(losses) - variant["val_loss"]["mean"]) < 1e-8
            assert str(variant["val_loss"]["mean"]) in line
