"""What is said of a run in which every rank has both roles: nothing speaks of pool ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.trainer.made_up import write_run
from trainer.config.recipe import load_recipe
from trainer.telemetry.console import describe
from trainer.view.frame import frame_lines
from trainer.view.records import facts_of
from trainer.view.report.facts import training_facts
from trainer.view.report.page import write_report
from trainer.view.view import RankUse, View, who_waits

LAYOUT = [f"parallel.{key}" for key in ("layout=every_rank", "pool_ranks=0", "trunk_ranks=2", "expert_parallel=2")]
RECIPE = load_recipe("quickstart", LAYOUT)
INFO = facts_of(RECIPE, Path("nowhere"))


def test_a_frame() -> None:
    shares = {"computing": 0.7, "waiting": 0.2, "wire": 0.05, "optimizer": 0.05}
    ranks = tuple(RankUse("trunk", rank, shares, served) for rank, served in ((0, 30.0), (1, 10.0)))
    view = View("r", "running", INFO, {}, {"trunk": shares}, ranks)
    lines = [line.plain for line in frame_lines(view, 120, 40)]
    assert " · 2 ranks with both roles" in lines[0] and "pool" not in "".join(lines)
    assert "Every rank has both roles, and waits 20% of its time for others." in lines
    assert "ranks' share 0: 75%   1: 25%" in lines[-1]
    assert who_waits({}, INFO) == "", "nobody answers"
    narrow = [line.plain for line in frame_lines(replace(view, run="quickstart"), 79, 40)]
    first = ["quickstart  running", lines[0].removeprefix("r  running · ")]
    assert narrow[:2] == first and "…" not in "".join(narrow), "two lines where one is too short"


def test_facts_and_the_first_line() -> None:
    facts = dict(training_facts(Path("nowhere"), RECIPE))
    assert facts["layout"].startswith("2 ranks with both roles: 2 shards x 1, ZeRO ") and "pool ranks" not in facts
    assert "; 2 ranks, each with a part of the pool; " in describe(RECIPE)
    whole = load_recipe("quickstart", ["parallel={layout: every_rank, trunk_ranks: 2, expert_parallel: 1}"])
    assert "; 2 ranks, each with the whole pool; " in describe(whole)


def test_a_report(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run", 20, overrides=LAYOUT)).read_text()
    assert "<b>Time of a rank</b>" in text and "Time of a trunk rank" not in text
