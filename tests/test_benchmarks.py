"""The benchmarks' own arithmetic and plumbing, without running one."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.benchmarks import contenders, peers, report, step_forms
from tests.benchmarks.contenders import Contender, ContenderFailed
from tests.benchmarks.experts import SHAPES, DenseFFN, Shape, Work, experts_ratios, make_work
from tests.benchmarks.saving import saving_results
from tests.benchmarks.startup import startup_results
from tests.benchmarks.step import choose, step_ratios
from tests.benchmarks.step_forms import CONTENDERS, FOUR_RANKS, MODEL_OF, Form, KnownForms, recipe

RANK = """
import os, sys
sys.path.insert(0, {folder!r})
from peer_protocol import serve, take_stdout
answer = take_stdout()
print("noise of a library")
def work(fail):
    if fail:
        sys.exit("rank " + os.environ["RANK"] + " fell over")
serve(answer, work)
"""


def rank_command() -> list[str]:
    return [sys.executable, "-c", RANK.format(folder=str(Path(contenders.__file__).parent))]


def test_report_ends_with_medians_and_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_report(
        "title", "command", {"a_over_b": report.ratios([2.0, 9.0, 8.0], [1.0, 3.0, 2.0])}, ["note"], True
    )
    *table, last = capsys.readouterr().out.splitlines()
    assert any(line.split()[:4] == ["a_over_b", "3.00", "2.00", "4.00"] for line in table)
    assert "- note" in table
    found = json.loads(last)
    assert found["ratios"] == {"a_over_b": 3.0} and found["spread"] == {"a_over_b": [2.0, 4.0]}
    assert found["commit"] and found["machine"]


def test_experts_ratios_are_the_peers_seconds_over_ours() -> None:
    seconds = {"dense": [2.0], "1 lanes": [8.0], "2 lanes": [5.0], "4 lanes": [4.0], "hf_shared": [20.0], "loop": [6.0]}
    assert experts_ratios(seconds, "fp32") == {
        "experts_over_dense_fp32": [0.5],
        "experts_1_lanes_over_dense_fp32": [0.25],
        "experts_2_lanes_over_dense_fp32": [0.4],
        "experts_over_hf_shared_fp32": [5.0],
        "experts_over_loop_fp32": [1.5],
    }


SECONDS = {
    "one_plus_one": [2.0, 2.0],
    "colocated": [4.0, 5.0],
    "every_rank": [1.0, 4.0],
    "vanilla": [3.0, 5.0],
    "dense": [1.0, 3.0],
    "hugging_face": [6.0, 9.0],
    "deepspeed_moe": [7.0, 8.0],
}


def test_step_ratios_take_the_faster_contender_by_its_median() -> None:
    assert SECONDS.keys() == CONTENDERS.keys()
    assert step_ratios(SECONDS, "bf16") == {
        "colocated_over_vanilla_bf16": [0.75, 1.0],
        "colocated_over_dense_bf16": [0.25, 0.6],
        "vanilla_over_dense_bf16": [1 / 3, 0.6],
        "one_plus_one_over_best_peer_bf16": [3.0, 4.5],
        "one_plus_one_over_dense_bf16": [0.5, 1.5],
        "every_rank_over_best_peer_bf16": [6.0, 2.25],
        "best_layout_over_best_peer_bf16": [3.0, 4.5],
    }


def test_step_ratios_leave_out_what_was_not_measured() -> None:
    measured = {name: SECONDS[name] for name in ("colocated", "dense", "hugging_face", "deepspeed_moe")}
    assert step_ratios(measured, "fp32").keys() == {"colocated_over_dense_fp32"}


def test_step_keeps_the_fastest_form() -> None:
    """A form that fails is named; the fastest is tried with larger micro-batches; all that are not kept are ended."""
    one, two, three = Form(2, 1), Form(1, 2), Form(1, 2, compiled=True)
    pairs, whole = replace(three, micro_batches=2), replace(three, micro_batches=1)
    seconds = {one: 3.0, two: None, three: 2.0, pairs: 1.0, whole: 4.0}
    forms = {form: FakeContender(taken) for form, taken in seconds.items()}
    with ExitStack() as stack:
        kept = choose([one, two, three], forms.__getitem__, stack)  # type: ignore[arg-type]
        assert kept.form == pairs and kept.contender is forms[pairs]
        slower = {one: "0.67", three: "0.50", whole: "0.25"}
        assert kept.slower == {form: f"{taken} times as fast" for form, taken in slower.items()} | {
            two: "failed: no compiler"
        }
        assert [form.ended for form in forms.values()] == [True, True, True, False, True]
    assert forms[pairs].ended
    with pytest.raises(ContenderFailed, match="runs in no form: failed: no compiler"):
        choose([two], forms.__getitem__, stack)  # type: ignore[arg-type]


def test_step_takes_a_known_form_as_it_is() -> None:
    with ExitStack() as stack:
        assert choose([Form(1, 2)], lambda _: FakeContender(1.0), stack).slower == {}  # type: ignore[arg-type,return-value]


class FakeContender:
    """A contender whose steps take `seconds`, or which fails."""

    def __init__(self, seconds: float | None):
        self.name, self.seconds, self.ended = "fake", seconds, False

    def __enter__(self) -> FakeContender:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True

    def run(self, steps: int) -> float:
        if self.seconds is None:
            raise ContenderFailed("fake, rank 0, ended:\nno compiler\n")
        return self.seconds


def test_step_remembers_forms(tmp_path: Path) -> None:
    path = tmp_path / "forms.json"
    first = KnownForms(path)
    assert first.to_try("dense", "small", "fp32") == CONTENDERS["dense"]
    first.keep("dense", "small", "fp32", Form(1, 2, compiled=True))
    again = KnownForms(path)
    assert again.to_try("dense", "small", "fp32") == (Form(1, 2, compiled=True),)
    assert again.to_try("dense", "small", "bf16") == CONTENDERS["dense"]


def test_startup_reports_seconds() -> None:
    results = startup_results([6.0, 9.0], [2.0, 3.0])
    assert results["seconds_to_first_step"] == [6.0, 9.0]
    assert results["first_step_over_imports"] == [3.0, 3.0]


def test_saving_reports_longer_steps_and_seconds() -> None:
    runs = {0: [{"step": 2.0}], 5: [{"step": 3.0, "stall": 0.1, "duration": 1.0}], 1: [{"step": 4.0}]}
    assert saving_results(runs) == {
        "step_with_a_save_every_5_over_none": [1.5],
        "step_with_a_save_every_1_over_none": [2.0],
        "seconds_stall": [0.1],
        "seconds_duration": [1.0],
    }


@pytest.mark.parametrize("name", sorted(MODEL_OF))
@pytest.mark.parametrize("shape", step_forms.SHAPES)
def test_every_form_has_the_same_step(name: str, shape: str, tmp_path: Path) -> None:
    """A step has equally many tokens in every form, and a token can reach equally many experts over all layers."""
    s = step_forms.SHAPES[shape]
    for form in (larger for first in (CONTENDERS | FOUR_RANKS)[name] for larger in with_larger(first)):
        made = recipe(MODEL_OF[name], form, s, "fp32", tmp_path)
        assert made.grid.world_size == form.ranks
        assert made.micro_batches * made.parallel.trunk_ranks == form.micro_batches
        assert made.train.global_batch * made.model.seq_len == s.tokens
        assert made.pool.experts == (0 if name == "dense" else s.experts)
        assert made.experts_per_layer == {"dense": 0, "vanilla": s.experts // s.layers}.get(name, s.experts)
        assert made.train.compile == form.compiled


def with_larger(form: Form) -> list[Form]:
    """A form, and those with larger micro-batches."""
    larger = form.larger()
    return [form, *with_larger(larger)] if larger else [form]


def test_forms_fill_two_cores() -> None:
    assert all(x.ranks * x.threads == 2 for forms in CONTENDERS.values() for x in forms)
    assert str(Form(2, 1, "dedicated", compiled=True)) == "1 trunk + 1 pool rank, compiled, 4 micro-batches a step"
    assert str(Form(4, 1, "dedicated")) == "2 trunk + 2 pool ranks, 4 micro-batches a step"
    assert [form.micro_batches for form in with_larger(Form(2, 1))] == [4, 2]
    assert [form.micro_batches for form in with_larger(Form(1, 2))] == [4, 2, 1]
    assert [form.micro_batches for form in with_larger(Form(2, 1, "dedicated"))] == [4, 2, 1]


def test_work_has_every_token_once_a_layer_unevenly() -> None:
    work = make_work(SHAPES["quick"], torch.float32, torch.device("cpu"))
    loads = [counts.rows_e for micro_batch in work.counts for counts in micro_batch]
    assert len(loads) == 32 and all(sum(load) == 2048 for load in loads)
    assert all(1.2 < max(load) * 64 / 2048 < 4 for load in loads)


def test_dense_backward_is_autograd_s() -> None:
    torch.manual_seed(0)
    dense = DenseFFN(Shape(6, 10, 1), torch.float32, torch.device("cpu"))
    w13, w2 = (weight.clone().requires_grad_() for weight in dense.weights[0])
    x, dy = torch.randn(7, 6), torch.randn(7, 6)
    a, b = (x @ w13.t()).chunk(2, dim=1)
    (torch.nn.functional.silu(a) * b @ w2.t()).backward(dy)
    gradients = [torch.zeros_like(w13), torch.zeros_like(w2)]
    hidden = dense._forward(x, *dense.weights[0])
    dense._backward(x, hidden, dy, dense.weights[0], gradients)
    torch.testing.assert_close(gradients, [w13.grad, w2.grad])
    dense.step(Work([x], [dy], []))


def test_contender_answers_stays_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "END_LIMIT", 240.0)  # it ends by itself, however long that takes
    with Contender("two ranks", rank_command(), 2, 1, tmp_path) as contender:
        processes = list(contender._ranks)
        assert contender.run(fail=False) > 0
        assert contender.run(fail=False) > 0
        assert [p.poll() for p in processes] == [None, None]
    assert [p.poll() for p in processes] == [0, 0]
    assert "noise of a library" in (tmp_path / "two_ranks-1.log").read_text()


def test_contender_that_dies_is_named_and_cleared_away(tmp_path: Path) -> None:
    with Contender("two ranks", rank_command(), 2, 1, tmp_path) as contender:
        processes = list(contender._ranks)
        with pytest.raises(ContenderFailed, match=r"two ranks, rank \d, ended:\n(.*\n)*rank \d fell over"):
            contender.run(fail=True)
    assert all(p.poll() is not None for p in processes)


def test_contender_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "START_LIMIT", 0.2)
    monkeypatch.setattr(contenders, "END_LIMIT", 0.1)
    sleeper = Contender("sleeper", [sys.executable, "-c", "import time; time.sleep(600)"], 1, 1, tmp_path)
    started: list[object] = []
    start = sleeper._start
    monkeypatch.setattr(sleeper, "_start", lambda *a: started.append(start(*a)) or started[-1])
    with pytest.raises(ContenderFailed, match="sleeper, rank 0, has not answered"):
        sleeper.__enter__()
    assert [p.poll() for p in started] == [-9]


def test_the_peers_are_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is installed is not what the requirements say now, the environment is made again, else not."""
    made: list[object] = []
    monkeypatch.setattr(peers, "INSTALLED", tmp_path / "installed")
    monkeypatch.setattr(peers.venv, "create", lambda *_, **__: made.append("environment"))
    monkeypatch.setattr(peers.subprocess, "run", lambda command, **_: made.append(command[-1]))
    for _ in range(2):
        assert peers.peers_python().endswith("python")
    assert made == ["environment", str(peers.REQUIREMENTS)]
    (tmp_path / "installed").write_text("other versions")
    peers.peers_python()
    assert len(made) == 4
