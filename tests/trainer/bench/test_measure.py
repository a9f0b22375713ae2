"""`bench` on tiny sizes: what it writes, whatever the speed of the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from trainer.bench import wire
from trainer.bench.measure import PRECISIONS, ROWS_PER_EXPERT, Effort, best_seconds, run
from trainer.bench.tables import print_profile
from trainer.cli import cli
from trainer.common import machine
from trainer.common.errors import UserError
from trainer.common.gpus import GpuFacts
from trainer.common.machine import pick_device
from trainer.config.recipe import load_recipe
from trainer.planning.hardware import Profile, load_profile
from trainer.planning.step_time import step_time

CPU = torch.device("cpu")
TINY = Effort(0.01, gemm_sizes=(48, 64), copy_bytes=2**16, message_bytes=2**14)
SMALL = ("model.hidden=32", "model.heads=4", "model.ffn_hidden=24", "model.vocab=70", "model.seq_len=16")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, Path]:
    path = tmp_path_factory.mktemp("bench") / "profile.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "TIME_LIMIT", 600.0)  # two processes start, on a machine that does much else too
        return run(load_recipe("quickstart", [*SMALL, "model.groups=2"]), CPU, path, TINY), path


def test_profile_is_saved_whole_and_predicts(measured: tuple[Profile, Path]) -> None:
    profile, path = measured
    assert load_profile(path) == profile
    assert [p.name for p in path.parent.iterdir()] == ["profile.json"]
    step = step_time(load_recipe("quickstart", SMALL), profile.hardware)
    assert step.seconds > 0 and 0 < step.mfu <= 1


def test_figures_are_there_and_their_shares_agree(measured: tuple[Profile, Path]) -> None:
    profile, _ = measured
    hardware = profile.hardware
    for precision in PRECISIONS:
        figures = {f.name: f for f in profile.figures if f.precision == precision}
        products = ["dense product", *(f"experts, {rows} rows each" for rows in ROWS_PER_EXPERT), "router"]
        assert list(figures) == [*products, "router's time", "layer with router", "head and loss"]
        rates = hardware.rates(precision)
        assert figures["dense product"].value == rates.flops
        for name, figure in figures.items():
            assert figure.value > 0
            if name != "router's time":
                assert figure.share == pytest.approx(figure.value / rates.flops)
        best = max(figures[name].value for name in products if name.startswith("experts"))
        assert rates.experts == pytest.approx(min(1, best / rates.flops))
        assert rates.trunk == pytest.approx(min(1, figures["layer with router"].value / rates.flops))
        assert rates.head == pytest.approx(min(1, figures["head and loss"].value / rates.flops))
    others = {f.name: f for f in profile.figures if f.precision is None}
    assert others["memory, read + written"].value == hardware.memory_bandwidth
    assert others["wire, one way"].value == hardware.wire_bandwidth > 0
    assert others["wire latency, one way"].value == hardware.wire_latency > 0
    assert 0 <= others["transfer hidden by computing"].value <= 1


def test_tables_fit(measured: tuple[Profile, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """In 80 columns, with shares of a quiet machine; on a busy one they may come to thousands of per cent."""
    figures = (replace(f, share=None if f.share is None else min(f.share, 1.5)) for f in measured[0].figures)
    print_profile(replace(measured[0], figures=tuple(figures)))
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("- "))
    for name in ("experts, 512 rows each", "router's time", "wire latency, one way", "memory bandwidth"):
        assert name in text


def test_best_of_runs_ignores_the_first() -> None:
    calls: list[int] = []
    assert best_seconds(lambda: calls.append(1), CPU, 0.0) > 0
    assert len(calls) == 2


def test_wrong_input_is_reported_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no experts"):
        run(load_recipe("dense-182m"), CPU, tmp_path / "p.json", TINY)
    for out in (tmp_path, tmp_path / "none" / "p.json"):
        with pytest.raises(UserError, match=r"--out .* cannot be written"):
            run(load_recipe("quickstart"), CPU, out, TINY)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda"):
            pick_device("cuda")


def test_it_measures_the_device_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "look", lambda: GpuFacts(torch="2.13.0"))  # a build without CUDA
    out = tmp_path / "p.json"
    arguments = ["bench", "--set", "parallel.device=cuda", "--out", str(out)]
    with pytest.raises(UserError, match="^parallel.device = cuda: torch 2.13.0 is built without .* allowed here: cpu"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert not out.exists()


def test_help_has_an_example() -> None:
    text = CliRunner().invoke(cli, ["bench", "--help"]).output
    assert "unipool bench unipool-182m --device cuda" in text and "quickstart" in text
