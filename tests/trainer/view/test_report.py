"""`report`: one self-contained page of any run: finished, unfinished, empty, long, hostile."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.trainer.made_up import write_run
from trainer.cli import cli
from trainer.config.recipe import load_recipe
from trainer.view.records import recorded_owners
from trainer.view.report.charts import thin
from trainer.view.report.page import make_page

VOID = {"meta", "br", "link", "img"}
LARGEST = 3_000_000


class Page(HTMLParser):
    """Holds that tags are closed in order and ids are unique; gathers text, tags, and what is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.references = "", list[str](), list[str]()
        self._open, self._ids = list[str](), set[str]()
        self.feed(text)
        self.close()
        assert not self._open
        inside = {reference.removeprefix("#") for reference in self.references if reference.startswith("#")}
        assert inside <= self._ids

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                assert value and value not in self._ids, f"twice: {value}"
                self._ids.add(value)
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.references.append(value or "")
            self.references += re.findall(r"url\((.*?)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["report", *arguments])


def read(path: Path) -> Page:
    """A page that needs nothing besides itself."""
    text = path.read_text()
    page = Page(text)
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert "@import" not in text and "url(http" not in text
    return page


def test_a_whole_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run")
    done = invoke(str(run))
    assert done.exit_code == 0 and done.output.strip() == str(run / "report.html")
    page = read(run / "report.html")
    assert page.tags.count("svg") == 17, "twelve charts, three by depth, the heat map and who owns what"
    for title in (
        "Loss, nats per token",
        "Gradient norm",
        "Learning rate",
        "Time of a trunk rank",
        "Tokens per second",
    ):
        assert title in page.text
    for title in ("Time of a pool rank", "Load imbalance, max / mean", "Dead experts", "Different experts"):
        assert title in page.text
    for title in (
        "How the layers' loads differ, bits",
        "Gate values of a token, summed",
        "Loss that random experts in a layer add, nats",
    ):
        assert title in page.text
    assert "The pool waits for the trunk 40% of its time" in page.text
    assert "4 x NVIDIA H100" in page.text
    assert "8 layers share 64 experts; 1 trunk rank, 1 pool rank; fp32" in page.text
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "val_loss" in line][-1]
    assert f"{last['val_loss']:.4f}" in page.text
    assert (
        "Gate values of a token, summed, by layer" in page.text and "Effective number of experts by layer" in page.text
    )
    assert "8 of 8 layers lack up to" in page.text, "what `own` says of the run"
    assert "ZeRO 1" in page.text and "7.408M" in page.text and "scores: normalized" in page.text
    assert "The run is not finished: it has made 60 of 240 steps." in page.text
    assert not list(run.glob(".*")), "nothing is left beside it"


def test_colours_are_the_pages_own(tmp_path: Path) -> None:
    """Else a chart would be black on black in the dark."""
    page = make_page(write_run(tmp_path / "run", 5))
    pictures = page[page.index("</style>") :]
    assert not re.findall(r"(?:fill|stroke): #\w+", pictures)
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_owners_are_framed_where_a_run_has_them(tmp_path: Path) -> None:
    """Not of a run that has left its lock behind, nor owners of another model."""
    run = write_run(tmp_path / "run", 5, overrides=["lock={}"])
    tree: dict[str, Any] = {
        "owners": [e // 8 for e in range(64)],
        "shares": [0.9] * 8,
        "shortfalls": [0] * 8,
        "feasible": True,
    }
    (run / "ownership.json").write_text(json.dumps({**tree, "step": 4}))
    page = make_page(run)
    assert "Framed: the experts that each layer owns." in page
    assert page.count("stroke: var(--third); stroke-width: 1.2") >= 64
    assert not re.findall(r"(?:fill|stroke): #\w+", page[page.index("</style>") :])
    recipe = load_recipe(str(run / "recipe.yaml"))
    assert recorded_owners(run, recipe) == tuple(tree["owners"])
    assert recorded_owners(run, load_recipe(str(run / "recipe.yaml"), ["lock=null"])) is None
    for other in (json.dumps({**tree, "owners": [e // 4 for e in range(32)], "step": 4}), "{"):
        (run / "ownership.json").write_text(other)
        assert recorded_owners(run, recipe) is None


def test_runs_that_lack_something(tmp_path: Path) -> None:
    """Not begun; before its first evaluation; trained by an older version; without a recipe; dense."""
    run = write_run(tmp_path / "run", 8)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "load.npy").unlink()
    (run / "metrics.jsonl").unlink()
    assert invoke(str(run)).exit_code == 0
    said = read(run / "report.html").text
    assert "No step is recorded yet" in said and "No evaluation is recorded" in said and "No load of" in said
    (run / "metrics.jsonl").write_text(lines[0] + '{"step": 2, "lo')
    assert invoke(str(run)).exit_code == 0
    page = read(run / "report.html")
    assert "No step" not in page.text and "No evaluation is recorded" in page.text
    old = {"step": 1, "loss": 7.5, "lr": 1e-3, "tokens": 4096, "tokens_per_second": 1000.0, "grad_norm": None}
    (run / "metrics.jsonl").write_text(json.dumps(old) + "\n" + json.dumps(old | {"step": 2, "loss": float("nan")}))
    (run / "recipe.yaml").write_text("model: {unknown: 1}\n")
    (run / "load.npy").write_text("no numbers")
    assert invoke(str(run), "--out", str(tmp_path / "out.html")).exit_code == 0
    page = read(tmp_path / "out.html")
    assert "No shares of time are recorded" in page.text and "of another version" in page.text
    assert page.tags.count("svg") == 3 and "unknown: 1" in page.text and "4 s" in page.text
    dense = write_run(tmp_path / "dense", 3, "dense-182m")
    (dense / "load.npy").unlink()
    assert invoke(str(dense)).exit_code == 0
    text = read(dense / "report.html").text
    assert "Gradient norm" in text and "No load" not in text and "Gate values" not in text


@pytest.mark.parametrize("shape", [(8, 63), (5, 64)])
def test_a_load_of_another_model_is_one_group(shape: tuple[int, int], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3, overrides=["model.groups=2"])
    np.save(run / "load.npy", np.ones(shape, np.int64))
    assert invoke(str(run)).exit_code == 0


def test_a_hostile_recipe_is_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>&\"'"
    run = write_run(tmp_path / "<b>run", 5, overrides=[f"data.source={json.dumps(bad)}"])
    assert invoke(str(run)).exit_code == 0
    page = read(run / "report.html")
    assert page.text.count("<script>alert(1)</script>") == 2, "in the facts and in the recipe, as text"
    assert page.text.count("<b>run") >= 2


def test_a_long_run_is_a_small_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 50, "unipool-830m")
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in parsed if "loss" in record]
    rounded = [{name: round(value, 3) for name, value in record.items() if name != "layer_gates"} for record in trained]
    records = [json.dumps(record).partition(",")[2] for record in rounded]
    steps, spike = 200_000, 123_456
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step},{records[step % 50]}\n' for step in range(1, steps + 1) if step != spike)
        file.write(f'{{"step": {steps}, "val_loss": 2.0, "val_tokens": 1}}\n' * 3000)
    assert invoke(str(run)).exit_code == 0
    assert (run / "report.html").stat().st_size < LARGEST
    page = read(run / "report.html")
    assert "A point is the mean of about 500 steps" in page.text
    assert page.tags.count("tr") <= 26 + 4, "evaluations, and what the time went into"


def test_thinned_curves_keep_their_spikes() -> None:
    steps = np.arange(1, 100_001, dtype=float)
    values = np.ones(100_000)
    values[54_321], values[77_777] = 9.0, np.nan
    thinned = thin(steps, values, 100)
    assert len(thinned.steps) == 100
    assert thinned.high.max() == 9.0 and thinned.low.min() == 1.0
    assert abs(thinned.steps[int(thinned.high.argmax())] - 54_321) < 1000
    assert thinned.mean.max() == pytest.approx(1 + 8 / 1000, rel=1e-2)
    few = thin(steps[:7], values[:7], 100)
    assert few.steps.tolist() == steps[:7].tolist() and few.low is few.high


def test_wrong_input(tmp_path: Path) -> None:
    assert "not a run" in str(invoke(str(tmp_path)).exception)
    assert "not a run" in str(invoke(str(tmp_path / "nothing")).exception)
    run = write_run(tmp_path / "run", 3)
    out = tmp_path / "no folder" / "r.html"
    assert str(invoke(str(run), "--out", str(out)).exception) == f"{out}: cannot be written (No such file or directory)"
