"""`watch`: rates from pages, frames of any size, ranks that are silent or started again, the command."""

from __future__ import annotations

import json
import math
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from tests.trainer.made_up import SHARES, job, page, serving, skewed, write_run
from trainer import load_run
from trainer.cli import cli
from trainer.common.errors import UserError
from trainer.config.recipe import load_recipe
from trainer.export.hub.curves import read_curves
from trainer.telemetry.prometheus import parse
from trainer.telemetry.rank_time import PHASES
from trainer.telemetry.run_folder import RunFolder
from trainer.telemetry.step_scalars import parse_record
from trainer.view.bars import column, grid, spark
from trainer.view.frame import Frame, frame_lines
from trainer.view.pages import Page, page_url, targets
from trainer.view.records import Records
from trainer.view.view import Follower, View, recorded_view, who_waits

INFO = {"pool_ranks": "1"}


def pages(texts: list[str], seconds: float = 2e9) -> list[Page]:
    return [Page(f"http://h:{9400 + rank}/metrics", parse(text), seconds=seconds) for rank, text in enumerate(texts)]


def shown(view: View, width: int, height: int) -> list[str]:
    return [line.plain for line in frame_lines(view, width, height)]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With servers in threads of this process, which a busy machine may keep waiting."""
    monkeypatch.setattr("trainer.view.pages.TIMEOUT_SECONDS", 60.0)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["watch", *arguments])


def test_rates_are_of_the_steps_between_two_pages() -> None:
    follower = Follower()
    first = follower.view(pages(job(10, 8)))
    assert first.experts == tuple(skewed(8)), "since the start, a step"
    assert first.window == "the 10 steps since the start"
    assert first.roles["pool"] == pytest.approx(dict(zip(first.roles["pool"], SHARES["pool"], strict=True)))
    later = job(10, 8)
    later[2] = page("pool", 2, 10, skewed(8)).replace("} 10", "} 14")  # 4 more steps without any work
    second = follower.view(pages(later))
    assert second.experts == (0.0,) * 8
    assert second.roles["trunk"] == first.roles["trunk"], "it has made no step: its window stays"
    assert second.roles["pool"] == {}, "no time, no shares"


def test_a_restarted_rank_counts_from_nothing() -> None:
    """Its counters are below those of before, or above them already: the process is another one."""
    for steps in (3, 500):
        follower = Follower()
        follower.view(pages(job(100, 8)))
        follower.view(pages(job(104, 8)))
        view = follower.view(pages(job(steps, 8, started=2e9)))
        assert view.experts == pytest.approx(skewed(8))
        assert all(0 <= share <= 1 for shares in view.roles.values() for share in shares.values())
        assert view.window == f"the {steps} steps since the start"
        assert len(view.losses) == (1 if steps == 3 else 3), "what was lost goes from the curve too"


def test_ranks_with_windows_of_different_length_weigh_the_same() -> None:
    """A page read just before a step's end has one step less: replicas of an expert are summed by the step."""
    follower = Follower()
    for steps in (10, 12):
        follower.view(pages([page("pool", 0, steps, [60, 20]), page("pool", 1, steps + steps // 12, [30, 10])]))
    view = follower.view(pages([page("pool", 0, 14, [60, 20]), page("pool", 1, 16, [30, 10])]))
    assert view.experts == pytest.approx((90, 30))


def test_a_silent_rank_says_why() -> None:
    follower = Follower()
    follower.view(pages(job(10, 64, pool_ranks=2)))
    texts = pages(job(12, 64, pool_ranks=2))
    texts[3] = Page(texts[3].url, error="connection refused")
    view = follower.view(texts)
    assert view.notes == ("no metrics (connection refused): pool rank 3 at h:9403",)
    assert [math.isnan(tokens) for tokens in view.experts] == [False] * 32 + [True] * 32
    lines = shown(view, 80, 24)
    assert "! no metrics (connection refused): pool rank 3 at h:9403" in lines
    assert any("? ???????" in line or "????????" in line for line in lines)
    gone = follower.view([Page(p.url, error="timed out after 2 s") for p in texts])
    assert gone.state == "no rank answers" and gone.notes[0].startswith(
        "no metrics (timed out after 2 s): trunk rank 0 at h:9400, "
    )


def in_phase(page: str, phase: str) -> str:
    """The page of a rank that does something."""
    own = 'role="trunk",rank="0"'
    return page + "".join(f'unipool_phase{{{own},phase="{name}"}} {int(name == phase)}\n' for name in PHASES)


@pytest.mark.parametrize(
    ("phases", "state"),
    [
        (("training", "training", "training"), "running"),
        (("training", "saving", "evaluating"), "running"),
        (("starting", "rendezvous", "rendezvous"), "starting"),
        (("warming_up", "warming_up", "training"), "warming up"),
        (("evaluating",) * 3, "evaluating"),
    ],
)
def test_the_state_is_that_of_the_rank_that_is_least_far(phases: tuple[str, ...], state: str) -> None:
    texts = [in_phase(page, phase) for page, phase in zip(job(10, 8), phases, strict=True)]
    view = Follower().view(pages(texts))
    assert view.state == state
    assert state in shown(view, 100, 40)[0]


def test_before_the_ranks_have_joined_there_is_little_to_show() -> None:
    view = Follower().view(pages([in_phase("", "preparing")]))
    assert view.state == "preparing" and not view.scalars
    assert shown(view, 80, 24) == ["run  preparing"]


def test_a_rank_that_trains_on_the_cpu_beside_gpus_is_noticed() -> None:
    texts = job(10, 8)
    texts[1] += 'unipool_unused_gpus{role="trunk",rank="1"} 8\n'
    texts[2] += 'unipool_unused_gpus{role="pool",rank="2"} 0\n'
    assert Follower().view(pages(texts)).notes == (
        "trunk rank 1 trains on the CPU although its machine has 8 GPUs: see the run's log",
    )


def test_two_runs_at_once_are_noticed() -> None:
    early = [page.replace("unipool_steps_total", "unipool_restarts_total") for page in job(1, 8)]
    assert not Follower().view(pages(early)).notes, "ranks before their first step are not taken for each other"
    notes = Follower().view(pages(job(5, 8) + job(5, 8))).notes
    assert "trunk rank 0 appears more than once: do the pages belong to several runs?" in notes


@pytest.mark.parametrize("experts", [64, 384])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 40), (160, 50)])
def test_a_frame_fits_and_shows_every_expert(experts: int, width: int, height: int) -> None:
    follower = Follower()
    follower.view(pages(job(1000, experts, pool_ranks=4, loss=3.5)))
    view = follower.view(pages(job(1010, experts, pool_ranks=4), seconds=2e9 + 10))
    lines = shown(view, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    digits = len(str(experts - 1))
    g = grid(experts, width - digits - 1, len(lines))
    rows = [line for line in lines if line[:digits].isdigit()]
    assert [int(row[:digits]) for row in rows] == list(range(0, experts, g.per_row))
    bars = "".join(row[digits + 1 :].replace(" ", "") for row in rows)
    assert len(bars) == experts * g.width, "a bar an expert, none empty"
    assert bars.count("x") == g.width and bars[3 * g.width] == "x", "expert 3 is dead"
    text = "\n".join(lines)
    for fact in ("step 1,010 of 60,000", "loss 3.2500", "val loss 3.3500", "tokens/s 524,288", "ETA 16 h", "dead 1"):
        assert fact in text
    assert "The pool waits for the trunk 40% of its time; the trunk for the pool 5%." in lines
    assert "pool ranks' share" in lines[-1]


def test_80_columns_cut_nothing_off() -> None:
    """The notes wrap, and the legend takes fewer words; which ranks are silent and what a mark means is still there."""
    follower = Follower()
    live = pages(job(10, 512, pool_ranks=16))
    follower.view(live)
    silent = [
        replace(page, samples={}, error="connection refused") if rank > 12 else page for rank, page in enumerate(live)
    ]
    view = follower.view(silent)
    lines = shown(view, 80, 24)
    assert not any(line.endswith("…") for line in lines) and max(map(len, lines)) <= 80
    text = " ".join(line.strip() for line in lines)
    assert "pool rank 13 at h:9413" in text and "pool rank 15 at h:9415 and 2 more" in text
    assert shown(view, 80, 20)[-2].strip() == "the busiest of 2 each; full: 2.0 x mean or more; x: dead; ?: not known"
    assert "one bar per 2 experts, for the busiest of them; full: " in " ".join(shown(view, 160, 14))


def test_a_run_with_a_lock_shows_what_its_layers_own() -> None:
    lines = "".join(f'unipool_layer_own_share_ratio{{layer="{layer}"}} {0.5 + layer / 10}\n' for layer in range(4))
    first, *others = job(10, 8)
    view = Follower().view(pages([first + lines + 'unipool_lock_stage{role="trunk",rank="0"} 1\n', *others]))
    text = " ".join(shown(view, 80, 24))
    assert "on their own experts 65%" in text and "stage of the lock anneal" in text


def test_a_bar_a_role_and_a_rank() -> None:
    lines = shown(Follower().view(pages(job(10, 64, pool_ranks=2))), 80, 50)
    bars = {line[:7].strip(): line[7:] for line in lines if "%" in line and line[7] == "█"}
    assert list(bars) == ["trunk", "pool", "t 0", "t 1", "p 2", "p 3"]
    bar, *numbers = bars["pool"].split()
    assert numbers == ["50%", "40%", "6%", "4%"]
    assert bar.count("█") == 26 and bar.count("░") == 21 and len(bar) == 52
    crowded = shown(Follower().view(pages(job(10, 384, pool_ranks=48))), 80, 24)
    assert not any(line.startswith("  p") for line in crowded)
    assert "pool ranks' share" in crowded[-1] and "max/mean 1.43, most: rank 28" in crowded[-1]


def test_frames_of_little_and_of_strange_things(tmp_path: Path) -> None:
    """Losses that are not finite, no pool, another version's labels, nothing at all: no error."""
    odd = job(10, 8, loss=math.nan)
    odd[0] = odd[0].replace('layers="8"', 'depth="8"').replace('expert="007"', 'expert="seven"')
    views = [Follower().view(pages(odd)), Follower().view(pages([job(10, 0)[0]])), Follower().view([]), View("r", "s")]
    views.append(replace(views[0], experts=(0.0,) * 8, scalars={}))
    views.append(recorded_view(tmp_path, Records(tmp_path), "has not begun"))
    for view in views:
        for size in ((80, 24), (20, 5), (200, 100)):
            assert max(map(len, shown(view, *size))) <= size[0]
    assert "loss nan" in "\n".join(shown(views[0], 80, 24))


@pytest.mark.parametrize(
    ("trunk", "pool", "said"),
    [
        (0.05, 0.4, "The pool waits for the trunk 40%"),
        (0.3, 0.1, "The trunk waits for the pool 30%"),
        (0.3, 0.25, "Each side waits for the other"),
        (0.05, 0.08, "Neither side waits for long"),
    ],
)
def test_who_waits(trunk: float, pool: float, said: str) -> None:
    assert who_waits({"trunk": {"waiting": trunk}, "pool": {"waiting": pool}}, INFO).startswith(said)
    assert "none waits for another role" in who_waits({"trunk": {"waiting": 0.0}}, {"pool_ranks": "0"})
    assert who_waits({"trunk": {"waiting": 0.5}, "pool": {}}, INFO) == "", "the pool is silent"


def test_bars() -> None:
    assert [column(level, 2) for level in (0, 0.5, 0.75, 1)] == [" ▁", " █", "▄█", "██"]
    assert spark([0, 1, math.nan, 2, 2, 2], 3, 1) == ["▁██"]
    assert spark([1, 1], 5, 1) == ["▄▄▄▄▄"]
    assert spark([0, 2, 1], 6, 2) == ["  ██  ", "▁▁████"]
    big = grid(4096, 75, 6)
    assert big.merged * big.per_row * big.rows >= 4096 and big.rows <= 6


def test_pages_have_urls() -> None:
    assert page_url("node-3:9400") == page_url("http://node-3:9400/") == "http://node-3:9400/metrics"
    assert page_url("[::1]:9400") == "http://[::1]:9400/metrics"
    assert page_url("https://h/custom") == "https://h/custom"
    for wrong in ("runs/none", "ftp://h:1/metrics", "file:///etc/passwd", "h:99999", "h:1 2", "h:1/\x1b[2J", ""):
        with pytest.raises(UserError, match="neither the folder of a run nor the address of a page"):
            page_url(wrong)


def test_once_from_real_servers(tmp_path: Path) -> None:
    """One frame from pages, and from a run's folder before and after a restart with other ports."""
    run = write_run(tmp_path / "made-up", 30)
    with serving(job(1000, 64)) as servers:
        addresses = [f"127.0.0.1:{server.server_port}" for server in servers]
        frame = invoke(*addresses)  # no terminal: once
        assert frame.exit_code == 0 and "step 1,000 of 60,000" in frame.output
        assert "running" in frame.output and "\x1b" not in frame.output
        write_targets(run, addresses)
        view = json.loads(invoke(str(run), "--json").output)
        assert view["state"] == "running" and view["scalars"]["loss"] == 3.25
        assert view["scalars"]["val_loss"] == records_of(run).val_losses[-1], "the records' own"
        write_targets(run, ["127.0.0.1:1", *addresses[1:]])
        assert "! no metrics (connection refused): 127.0.0.1:1" in invoke(str(run)).output
    refused = invoke(*addresses)
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception).endswith("connection refused (and 2 more); no rank answers")
    crashed = invoke(str(run)).output
    assert "does not answer" in crashed and "step 30 of 240" in crashed and "loss 7." in crashed
    with serving(job(1200, 64, started=2e9)) as servers:
        write_targets(run, [f"127.0.0.1:{server.server_port}" for server in servers])
        assert "step 1,200 of 60,000" in invoke(str(run)).output
        write_targets(run, [f"127.0.0.1:{server.server_port}" for server in servers], "another")
        assert "names pages that belong to another run now: made-up" in invoke(str(run)).output
    (run / "targets.json").unlink()
    stopped = invoke(str(run)).output
    assert "stopped" in stopped and "no metrics" not in stopped and "The pool waits" in stopped


def write_targets(run: Path, addresses: list[str], name: str = "made-up") -> None:
    (run / "targets.json").write_text(json.dumps([{"targets": addresses, "labels": {"run": name}}]))


def records_of(run: Path) -> Records:
    records = Records(run)
    records.read()
    return records


def test_pages_that_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port of another program, one with other metrics, one that accepts and says nothing."""
    with serving(["<html>", "go_info 1", job(5, 8)[0]]) as servers:
        ports = [server.server_port for server in servers]
        notes = json.loads(invoke(*(f"127.0.0.1:{port}" for port in ports), "--json").output)["notes"]
        assert "HTTP status 404" in str(invoke(f"http://127.0.0.1:{ports[-1]}/other").exception)
    reasons = ("not a page of metrics", "metrics of another program")
    assert notes == [f"no metrics ({why}): 127.0.0.1:{port}" for port, why in zip(ports, reasons, strict=False)]
    monkeypatch.setattr("trainer.view.pages.TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert "timed out after 0.2 s" in str(invoke(f"127.0.0.1:{mute.getsockname()[1]}").exception)


def test_wrong_sources(tmp_path: Path) -> None:
    assert "not a run" in str(invoke(str(tmp_path)).exception)
    assert "give either the folder of one run or addresses" in str(invoke(str(tmp_path), "h:1").exception)
    assert "neither the folder of a run" in str(invoke("runs/nothing").exception)
    (tmp_path / "targets.json").write_text("{")
    assert targets(tmp_path) == ([], "")
    assert "has not begun" in invoke(str(tmp_path)).output


@pytest.mark.parametrize(
    "text", ["1e999", "-1e308", "Infinity", "NaN", "1" + "0" * 400, "[0.5, 1e39]", '{"00": 1e999}']
)
def test_a_record_with_a_number_that_no_run_records_is_damaged(text: str, tmp_path: Path) -> None:
    """What a run measured that was not finite is null, so the line is left out as one that is no JSON is."""
    run = write_run(tmp_path / "run", 8)
    file = run / "metrics.jsonl"
    whole, before = file.read_text(), Records(run)
    before.read()
    for name in ("step", "loss", "seconds", "layer_gates"):
        with file.open("a") as appended:
            appended.write(f"{json.dumps({'step': 9, 'loss': 1.5} | {name: 'TEXT'})}\n".replace('"TEXT"', text))
    after = Records(run)
    after.read()
    assert after.steps == before.steps and after.columns["loss"] == before.columns["loss"]
    assert list(load_run(run).metrics.index) == list(range(1, 9))
    assert read_curves(run, 9)["loss"].steps == list(range(1, 9))
    recipe = load_recipe("quickstart", [f"run.dir={run}"])
    RunFolder(recipe).begin(recipe, "{}", "CPU", {}, done_steps=9)
    assert file.read_text() == whole
    assert parse_record('{"step": 9, "tasks": {"wikitext": {"word_perplexity": 1e40}}}\n'), "as of an untrained model"


def test_records_are_read_as_they_grow(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + lines[4][:20])  # half a line
    records = Records(run)
    records.read()
    before = len(records.steps)
    with file.open("a") as appended:
        appended.write(lines[4][20:] + 'not JSON\n[]\n{"step": 1e999}\n' + "".join(lines[5:]))
    records.read()
    assert before < len(records.steps) == 10
    assert list(records.steps) == list(range(1, 11))
    assert len(records.columns["loss"]) == 10 and not math.isnan(records.columns["loss"][-1])
    new = tmp_path / "new"
    new.write_text(lines[0])
    new.replace(file)  # as a resume does
    records.read()
    assert len(records.steps) == 1


def test_a_terminal_gets_colours_and_a_footer() -> None:
    console = Console(width=80, height=24, force_terminal=True, record=True, color_system="standard")
    with console.capture() as captured:
        console.print(Frame(Follower().view(pages(job(10, 64))), "Ctrl-C ends"))
    text = captured.get()
    assert "\x1b[" in text and "Ctrl-C ends" in text.splitlines()[-1]
    (row,) = (line for line in text.splitlines() if line.startswith("\x1b[2m00 \x1b[0m"))
    assert "\x1b[36m" in row, "bars of little load are dim, others are not"
