"""`prepare` killed at any point, and in two processes at once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainer.data.prepare import prepare

WORKER = Path(__file__).with_name("prepare_worker.py")
REPOSITORY = Path(__file__).parents[3]
TIMEOUT = 60  # seconds, of a wait that takes one


def start(settings, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, WORKER, json.dumps(asdict(settings)), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "facts.json"}


def folders(settings) -> list[Path]:
    directory = Path(settings.directory)
    return [path for path in directory.iterdir() if path.is_dir()] if directory.exists() else []


@pytest.fixture
def reference(settings, tmp_path):
    return content(prepare(replace(settings, directory=str(tmp_path / "reference")), progress=False).path)


def test_killed_anywhere_leaves_nothing_that_looks_finished(settings, reference, tmp_path):
    out, _ = start(replace(settings, directory=str(tmp_path / "whole")), "kill", 0).communicate(timeout=TIMEOUT)
    events = int(out)
    assert events > 100 + 10
    points = [1, events, events - 1, events - 2, events - 3, *random.Random(0).sample(range(2, events - 3), 4)]
    finished = 0
    for point in points:
        at_point = replace(settings, directory=str(tmp_path / f"killed-{point}"))
        worker = start(at_point, "kill", point)
        _, err = worker.communicate(timeout=TIMEOUT)
        assert worker.returncode == -signal.SIGKILL, err
        for folder in folders(at_point):
            if not folder.name.startswith(".partial-"):
                assert content(folder) == reference
                finished += 1
        prepared = prepare(at_point, progress=False)
        assert content(prepared.path) == reference
        assert folders(at_point) == [prepared.path]
    assert finished == 3  # after the rename, and before and after the sync of the folder above


def test_the_next_start_removes_what_was_left_of_other_settings(settings):
    worker = start(settings, "kill", 50)
    worker.communicate(timeout=TIMEOUT)
    (abandoned,) = folders(settings)
    assert abandoned.name.startswith(".partial-")
    prepared = prepare(replace(settings, seq_len=7), progress=False)
    assert folders(settings) == [prepared.path]


def wait_until(happened, worker) -> None:
    end = time.monotonic() + TIMEOUT
    while not happened():
        assert worker.poll() is None and time.monotonic() < end, worker.stderr.read()
        time.sleep(0.01)


def test_two_processes_at_once(settings, reference, tmp_path):
    first = start(settings, "meet", tmp_path)
    wait_until((tmp_path / "reading").exists, first)
    second = start(settings, "meet", tmp_path)
    assert "waiting for another process" in second.stderr.readline()
    (partial,) = folders(settings)
    assert partial.name.startswith(".partial-")  # the second one left the first one's alone
    (tmp_path / "go").touch()
    assert int(first.communicate(timeout=TIMEOUT)[0]) == 100
    assert int(second.communicate(timeout=TIMEOUT)[0]) == 0
    (folder,) = folders(settings)
    assert content(folder) == reference
