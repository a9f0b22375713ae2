"""The script for GPUs: it works on the CPU, and a part that fails or hangs costs the others nothing."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from tests.distributed import TIME_LIMIT
from tests.gpu import check
from tests.gpu.check import LIMITS, TWO_GPUS, run_part
from tests.gpu.parts import PARTS, Part, experts, machine
from tests.gpu.timeline import busy, kind_of
from trainer.cluster.launch import has_ended


def wait_for_end(pids: Path) -> None:
    """Wait until the processes of a file have ended: a signal takes a moment."""
    deadline = time.monotonic() + TIME_LIMIT
    for pid in map(int, pids.read_text().split()):
        with suppress(psutil.NoSuchProcess):
            while not has_ended(psutil.Process(pid)):
                assert time.monotonic() < deadline, f"process {pid} still runs"
                time.sleep(0.05)


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """Every part but those that are another with other numbers, and two that need no processes of their own."""
    for part in (machine, experts):
        part(Part(part.__name__, tmp_path, rehearse=True))
    found = json.loads((tmp_path / "machine.json").read_text())
    assert found["missing"] == found["unmet"] == []
    shapes = json.loads((tmp_path / "experts.json").read_text())["shapes"]
    assert set(shapes) == {"unipool-182m", "unipool-978m"}
    assert all(shape["share_of_matmul"] > 0 for shape in shapes.values())
    parts = ("quickstart", "colocated", "every_rank", "lanes_4_eight_queues")
    options = [word for name in parts for word in ("--only", name)]
    done = CliRunner().invoke(check.main, ["--rehearse", "--out", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "check.json").read_text())
    assert report["rehearsal"] and list(report["parts"]) == list(parts)
    found = report["parts"]
    assert found["quickstart"]["devices"] == "devices: CPU (parallel.device = cpu)"
    assert len(found["quickstart"]["losses"]["checked"]) == 2
    assert found["quickstart"]["largest_relative_difference"] == 0
    (rank,) = found["colocated"]["ranks"]
    assert len(rank["losses"]) == 3
    assert 0.5 < rank["peak_process"] / found["colocated"]["planned_memory"]["trunk + pool"] < 2
    assert found["colocated"]["tokens_per_second"] > 0
    assert (tmp_path / "out" / "colocated-rank0.png").read_bytes().startswith(b"\x89PNG")
    assert rank["profile"]["longest"] and 0 < rank["profile"]["busy"] <= 1
    (both,) = found["every_rank"]["ranks"]
    assert both["losses"] == pytest.approx(rank["losses"], rel=1e-4)
    trunk, pool = found["lanes_4_eight_queues"]["ranks"]
    assert trunk["losses"] == pytest.approx(rank["losses"], rel=1e-4)
    assert pool["losses"] == [None] * 3
    # As `train` sets them, unless the part has.
    queues = [one["environment"]["CUDA_DEVICE_MAX_CONNECTIONS"] for one in (rank, both, trunk, pool)]
    assert queues == [None, "32", "8", "8"]
    assert both["environment"]["CUDA_MODULE_LOADING"] == "EAGER"


def test_every_part_has_a_limit() -> None:
    assert [part.__name__ for part in PARTS] == list(LIMITS)
    one_gpu = sum(limit for name, limit in LIMITS.items() if name not in TWO_GPUS)
    assert one_gpu <= 8 * 60


def test_a_part_that_fails_or_hangs_keeps_what_it_found(tmp_path: Path) -> None:
    def part(code: str, limit: float = TIME_LIMIT) -> dict[str, Any]:
        write = f"import pathlib; pathlib.Path({str(tmp_path / 'part.json')!r}).write_text('{{\"a\": 1}}')"
        return run_part([sys.executable, "-c", f"{write}\n{code}"], limit, tmp_path / "part.json")

    fine = part("print('words')")
    assert (fine["ended"], fine["a"]) == ("ok", 1) and "output" not in fine
    failed = part("raise SystemExit('why')")
    assert (failed["ended"], failed["a"], failed["output"]) == ("failed with status 1", 1, "why\n")
    # The part's own processes end with it, also in a session of their own, as the ranks of `train` are.
    pids = tmp_path / "pids"
    hangs = (
        "import subprocess, time\n"
        "started = [subprocess.Popen(['sleep', '600'], start_new_session=own) for own in (False, True)]\n"
        f"pathlib.Path({str(pids)!r}).write_text(' '.join(str(one.pid) for one in started))\n"
        "print('words', flush=True)\n"
    )
    died = part(f"{hangs}raise SystemExit(3)")
    assert (died["ended"], died["output"], (tmp_path / "part.log").read_text()) == (
        "failed with status 3",
        "words\n",
        "words\n",
    )
    wait_for_end(pids)
    pids.write_text("")
    stopped = part(f"{hangs}time.sleep(600)", limit=5.0)
    assert stopped["ended"] == "stopped after 5 s"
    assert (stopped.get("a"), stopped["output"]) in ((1, "words\n"), (1, ""), (None, ""))
    wait_for_end(pids)


def test_the_report_is_written_after_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part does not return; without two GPUs, some are skipped."""

    def part(command: list[str], limit: float, results: Path) -> dict[str, Any]:
        if results.stem == "colocated":
            raise KeyboardInterrupt
        if results.stem == "quickstart":
            return {"ended": "failed with status 1"}
        return {"ended": "ok", "gpus": ["one"]}

    monkeypatch.setattr(check, "run_part", part)
    CliRunner().invoke(check.main, ["--out", str(tmp_path)])
    ended = {name: found["ended"] for name, found in json.loads((tmp_path / "check.json").read_text())["parts"].items()}
    assert ended == {"machine": "ok", "quickstart": "failed with status 1", "experts": "ok"}
    limits: list[float] = []

    def fast(command: list[str], limit: float, results: Path) -> dict[str, Any]:
        limits.append(limit)
        return {"ended": "ok", "gpus": ["one"]}

    # What a part leaves of its time the later ones may use, but not what they need themselves.
    monkeypatch.setattr(check, "run_part", fast)
    CliRunner().invoke(check.main, ["--out", str(tmp_path)])
    one_gpu = [limit for name, limit in LIMITS.items() if name not in TWO_GPUS]
    assert len(limits) == len(one_gpu)
    for place, limit in enumerate(limits[1:], 1):
        assert one_gpu[place] < limit <= sum(one_gpu[: place + 1])
    done = CliRunner().invoke(check.main, ["--out", str(tmp_path), "--only", "machine", "--only", "lanes_2"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["parts"]["lanes_2"] == {"ended": "skipped: needs two GPUs"}
    # Alone, a part goes by what the part `machine` found last.
    for gpus, ended in (('["a"]', "skipped: needs two GPUs"), ('["a", "b"]', "ok")):
        (tmp_path / "machine.json").write_text(f'{{"gpus": {gpus}}}')
        done = CliRunner().invoke(check.main, ["--out", str(tmp_path), "--only", "lanes_2"])
        assert json.loads(done.stdout)["parts"]["lanes_2"]["ended"] == ended
    done = CliRunner().invoke(check.main, ["--out", str(tmp_path), "--only", "machine", "--minutes", "0"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["parts"]["machine"] == {"ended": "skipped: no time left"}


def test_what_the_picture_is_made_of() -> None:
    assert busy([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert kind_of("nvjet_tst_128x256_64x4_h_bz_coopA_NNT") == "products"
    assert kind_of("void cutlass::device_kernel<flash::FlashAttnFwdSm90>") == "attention"
    assert kind_of("pytorch_flash::flash_fwd_kernel") == "attention"
    assert kind_of("Memcpy HtoD (Pinned -> Device)") == "copies"
    assert kind_of("ncclDevKernel_SendRecv") == "copies"
    assert kind_of("void at::native::vectorized_elementwise_kernel") == "the rest"
