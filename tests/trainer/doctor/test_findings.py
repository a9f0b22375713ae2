"""Checks that hang, crash or fail cost the others nothing; and the command."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.distributed import TIME_LIMIT
from tests.trainer.job import ROOT
from trainer.cli import cli
from trainer.common.errors import UserError
from trainer.common.strict_json import loads
from trainer.config.recipe import Recipe
from trainer.doctor import checks
from trainer.doctor.findings import Check, Finding, error, examine, ok, warning

GOOD = ok("good", "all is well")


def good(recipe: Recipe | None) -> Iterator[Finding]:
    print("a library is talkative", flush=True)
    os.write(2, b"so is another")
    yield GOOD


def hanging(recipe: Recipe | None) -> Iterator[Finding]:
    yield GOOD
    time.sleep(600)


def crashing(recipe: Recipe | None) -> Iterator[Finding]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield GOOD


def leaving(recipe: Recipe | None) -> Iterator[Finding]:
    os._exit(3)
    yield GOOD


def wrong(recipe: Recipe | None) -> Iterator[Finding]:
    yield GOOD
    raise UserError("data.source x: is empty")


def unreadable(recipe: Recipe | None) -> Iterator[Finding]:
    yield from (ok("lines", line) for line in open("/proc/none"))  # noqa: SIM115


def broken(recipe: Recipe | None) -> Iterator[Finding]:
    yield ok("sum", str(1 // 0))


def test_every_check_gets_its_answer(capfd: pytest.CaptureFixture[str]) -> None:
    kinds = (good, hanging, crashing, leaving, wrong, unreadable, broken, good)
    given = [
        Check(f"{number} {kind.__name__}", kind, 0.3 if kind is hanging else TIME_LIMIT)
        for number, kind in enumerate(kinds)
    ]
    done: list[int] = []
    assert examine(given, None, lambda: done.append(1)) == [
        GOOD,
        error("1 hanging", "no answer within 0 s", "what it asks hangs, such as a disk or a driver: see dmesg"),
        error("2 crashing", "the check was ended by SIGKILL", "see dmesg; what it asks is broken"),
        error("3 leaving", "the check ended with status 3", "see dmesg; what it asks is broken"),
        GOOD,
        Finding("4 wrong", "error", "data.source x: is empty"),
        error("5 unreadable", "/proc/none: no such file or directory", "see that this user may read it"),
        error(
            "6 broken",
            "the check failed: ZeroDivisionError: integer division or modulo by zero",
            "please report it with unipool --version",
        ),
        GOOD,
    ]
    assert len(done) == len(kinds)
    deadline = time.monotonic() + TIME_LIMIT
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []
    assert capfd.readouterr() == ("", "")


def doctor(monkeypatch: pytest.MonkeyPatch, *findings: Finding, arguments: str = "") -> tuple[int, str]:
    monkeypatch.setattr(checks, "CHECKS", (Check("all", lambda recipe: findings),))
    done = CliRunner().invoke(cli, ["doctor", *arguments.split()])
    return done.exit_code, done.output


def test_what_is_printed_and_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    low, none = warning("files", "limit 9 [b]", "ulimit -n 99"), error("GPUs", "none", "buy some")
    assert doctor(monkeypatch, GOOD) == (0, doctor(monkeypatch, GOOD)[1])
    assert doctor(monkeypatch, GOOD)[1].splitlines()[-1] == "all is well"
    status, said = doctor(monkeypatch, GOOD, low)
    assert status == 0 and said.endswith("\n1 warning\n") and "limit 9 [b]; ulimit -n 99" in said
    status, said = doctor(monkeypatch, low, none)
    assert status == 1 and said.endswith("\n1 error, 1 warning\n")
    assert "\x1b" not in said
    status, said = doctor(monkeypatch, GOOD, none, arguments="--json")
    assert status == 1
    assert loads(said) == {
        "ok": False,
        "findings": [
            {"about": "good", "status": "ok", "found": "all is well", "mend": ""},
            {"about": "GPUs", "status": "error", "found": "none", "mend": "buy some"},
        ],
    }
    wrong = CliRunner().invoke(cli, ["doctor", "quikstart"])
    assert isinstance(wrong.exception, UserError) and "did you mean: quickstart" in str(wrong.exception)


def test_this_machine(tmp_path: Path) -> None:
    """All real checks of a recipe; whether they find errors depends on the machine, and how long they take."""
    code = (
        "from dataclasses import replace; from trainer.cli import main; from trainer.doctor import checks\n"
        f"checks.CHECKS = tuple(replace(check, seconds={TIME_LIMIT}) for check in checks.CHECKS); main()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "doctor",
        "quickstart",
        "--json",
        "--set",
        f"run.dir={tmp_path}/new/run",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    said = loads(done.stdout)
    found = {finding["about"]: finding for finding in said["findings"]}
    assert {"Python", "packages", "torch", "GPUs", "CPU", "memory", "open files", "run.dir", "data.dir"} <= set(found)
    assert {"ranks", "fit", "data.source", "metrics.port", "clock", "network", "launchers", "/dev/shm"} <= set(found)
    assert [finding for finding in said["findings"] if "the check" in finding["found"]] == []
    assert found["run.dir"]["found"].startswith(f"{tmp_path}/new/run: ")
    assert done.returncode == (0 if said["ok"] else 1)
    assert said["ok"] == all(finding["status"] != "error" for finding in said["findings"])
    assert list(tmp_path.iterdir()) == [] and done.stderr == ""


def test_the_version_for_a_report() -> None:
    first, second = CliRunner().invoke(cli, ["--version"]).output.splitlines()
    assert first.startswith("unipool 0.")
    assert all(f"{name} " in second for name in ("Python", "torch", "deepspeed", "transformers"))
