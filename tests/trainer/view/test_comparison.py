"""`report` of several runs: what differs between them, what their time went into, and how their layers differ."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.fuzzing import user_error
from tests.trainer.made_up import write_run
from tests.trainer.view.test_report import invoke, read
from trainer.config.recipe import load_recipe
from trainer.view.records import Records
from trainer.view.report.comparison import (
    Compared,
    differing_keys,
    names,
    read_run,
    training_change,
    validation_change,
    write_comparison,
)
from trainer.view.report.depth import GATE, by_depth, effective, favourites
from trainer.view.report.phases import BOTH, EVALUATION, LOST, OTHER, SAVING, SKIPPED, START, TRAINING, phases


def test_two_runs(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", 24)
    other = write_run(tmp_path / "$b_<i>", 30, overrides=["model.groups=8", "train.lr=3e-3"])
    done = invoke(str(first), str(other))
    assert done.exit_code == 0 and done.output.strip() == str(first / "comparison.html")
    page = read(first / "comparison.html")
    assert page.tags.count("svg") == page.tags.count("figure") > 20
    assert not re.findall(r"(?:fill|stroke): #\w+", (first / "comparison.html").read_text().partition("</style>")[2])
    ends = []
    for run in (first, other):
        records = Records(run)
        records.read()
        ends.append(records.val_losses[-1])
    assert f"{ends[1] - ends[0]:+.4f}" in page.text
    assert "$b_<i>" in page.text and "24 of 240" in page.text and "30 of 240" in page.text
    assert "Hours in training steps" in page.text, "these runs do not record goodput"


def test_recipes_differ_in_these_keys(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", 2)
    other = write_run(tmp_path / "b", 2, overrides=["model.groups=8", "lock=null", "data.max_documents=7"])
    different = differing_keys([read_run(first, "a"), read_run(other, "b")])
    assert "<td>model.groups</td><td>1</td><td>8</td>" in different
    assert "<td>data.max_documents</td><td>null</td><td>7</td>" in different
    assert different.count("<tr") == 3, "and not run.dir"
    assert "Nothing but run.dir." in differing_keys([read_run(first, "a"), read_run(first, "c")])
    (other / "recipe.yaml").write_text("model: {unknown: 1}\n")
    assert "cannot be compared" in differing_keys([read_run(first, "a"), read_run(other, "b")])


def losses(folder: Path, tokens: int, values: list[float], evaluated: dict[int, float]) -> Compared:
    """A run that has recorded nothing but losses."""
    folder.mkdir()
    lines: list[dict[str, Any]] = [
        {"step": step, "tokens": tokens, "loss": loss} for step, loss in enumerate(values, 1)
    ]
    lines += [{"step": step, "val_loss": loss} for step, loss in evaluated.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = Records(folder)
    records.read()
    return Compared(folder, folder.name, records, None, None)


def test_differences_are_at_equal_tokens(tmp_path: Path) -> None:
    """Of runs with other batches and lengths: at the place where both have seen as many tokens."""
    first = losses(tmp_path / "a", 100, [10 - step / 10 for step in range(1, 41)], {10: 9.0, 30: 7.0})
    other = losses(tmp_path / "b", 200, [10.5 - step / 5 for step in range(1, 31)], {5: 8.0, 10: 8.5, 20: 1.0})
    at, change = validation_change(first, other)
    assert at.tolist() == [1000, 2000, 4000]
    assert change.tolist() == pytest.approx([-1.0, 0.5, math.nan], nan_ok=True), "9 and 8 there; then none"
    at, change = training_change(first, other)
    assert len(at) == 20 and at[-1] < 4000 and np.isfinite(change).all()
    # a bin of 200 tokens has the first's losses at 100 and 200 tokens, and the other's at 200
    assert change == pytest.approx(0.5 - 0.05)


def test_phases_add_up(tmp_path: Path) -> None:
    """A made-up timeline, from which goodput is computed as a run does: time that counts over time since the start."""
    run = write_run(tmp_path / "run", 2, overrides=["checkpoint.every=4"])
    lines, now, counted = [], 30.0, 0.0
    pauses = {2: 3.0, 4: 8.0, 6: 3.5, 8: 200.0, 10: 3.0, 12: 9.0}
    for step in range(1, 14):
        seconds, applied = 1.0 + step / 100, step != 5
        now += seconds
        counted += seconds if applied else 0.0
        lines.append({"step": step, "loss": 1.0, "tokens": 50, "seconds": seconds, "applied": applied})
        lines[-1]["goodput"] = counted / now
        now += pauses.get(step, 0.25)
        if step in (2, 4, 6, 10):
            lines.append({"step": step, "val_loss": 2.0, "val_tokens": 600})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records, recipe = Records(run), load_recipe(str(run / "recipe.yaml"))
    records.read()

    def found() -> dict[str, float]:
        return {phase.name: phase.seconds for phase in phases(run, records, recipe)}

    steps = sum(1 + step / 100 for step in range(1, 14)) - 1.05
    expected = {TRAINING: steps, SKIPPED: 1.05, EVALUATION: 9.5, SAVING: 209.0, BOTH: 8.0, OTHER: 1.5, START: 30.0}
    assert found() == pytest.approx(expected)
    assert {phase.name: phase.tokens for phase in phases(run, records, recipe)}[EVALUATION] == 1800
    # Started twice: of the pauses after 2, 6, 8, 10 and 12 steps, of one kind now, that after 8 has the restart.
    (run / "plan.json").write_text(json.dumps({"recorded": 9}))
    recipe = load_recipe(str(run / "recipe.yaml"), ["checkpoint.every=1"])
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": {step}, "val_loss": 2.0}}\n' for step in (8, 12))
    records.read()
    assert found()[LOST] == pytest.approx(200 - 5.75) and found()[BOTH] == pytest.approx(3 + 8 + 3.5 + 5.75 + 3 + 9)


def test_layers_by_depth(tmp_path: Path) -> None:
    load_LM = np.array([[5, 0, 0, 5], [1, 2, 3, 4], [0, 0, 0, 0]])
    expected = [2.0, math.exp(-sum(n / 10 * math.log(n / 10) for n in (1, 2, 3, 4))), math.nan]
    assert effective(load_LM).tolist() == pytest.approx(expected, nan_ok=True)
    assert favourites(load_LM).tolist() == pytest.approx([0.5, 0.4, math.nan], nan_ok=True)
    run = write_run(tmp_path / "run", 30)
    records, recipe = Records(run), load_recipe(str(run / "recipe.yaml"))
    records.read()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gates = [row["layer_gates"] for row in rows if "layer_gates" in row][-20:]
    assert by_depth(records, recipe, None)[GATE] == pytest.approx(np.mean(gates, axis=0))


def test_names_tell_runs_apart() -> None:
    assert names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert names([Path("/x/one/a"), Path("/x/two/a"), Path("/x/b")]) == ["one/a", "two/a", "x/b"]


def test_wrong_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2)
    assert "is given twice" in str(user_error(lambda: write_comparison([run, run / ".." / "run"])))
    assert "not a run; give" in str(user_error(lambda: write_comparison([run, tmp_path])))
    assert "at most 8" in str(user_error(lambda: write_comparison([run] * 9)))
    out = tmp_path / "no folder" / "c.html"
    other = write_run(tmp_path / "other", 2)
    assert "cannot be written" in str(user_error(lambda: write_comparison([run, other], out)))
