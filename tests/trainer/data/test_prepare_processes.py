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

from trainer.data import source_builder as module
from trainer.data.cache import PROGRESS_FILE
from trainer.data.prepare import prepare_source

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
    """But for what has a path in it, or is of no use any more."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in ("facts.json", PROGRESS_FILE)}


def folders(settings) -> list[Path]:
    directory = Path(settings.directory)
    return [path for path in directory.iterdir() if path.is_dir()] if directory.exists() else []


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """As the worker has them."""
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 400)
    monkeypatch.setattr(module, "COMMIT_TOKENS", 500)


@pytest.fixture
def reference(settings, tmp_path):
    return content(prepare_source(replace(settings, directory=str(tmp_path / "reference")), progress=False).path)


def test_killed_anywhere_it_goes_on_and_nothing_looks_finished_before_it_is(settings, reference, tmp_path):
    out, _ = start(replace(settings, directory=str(tmp_path / "whole")), "kill", 0).communicate(timeout=TIMEOUT)
    events = int(out)
    assert events > 100 + 10
    points = [1, events, events - 1, events - 2, events - 3, *random.Random(0).sample(range(2, events - 3), 4)]
    finished = went_on = 0
    for point in points:
        at_point = replace(settings, directory=str(tmp_path / f"killed-{point}"))
        worker = start(at_point, "kill", point)
        _, err = worker.communicate(timeout=TIMEOUT)
        assert worker.returncode == -signal.SIGKILL, err
        for folder in folders(at_point):
            if not folder.name.startswith(".partial-"):
                assert content(folder) == reference
                finished += 1
            else:
                went_on += (folder / PROGRESS_FILE).is_file()
        prepared = prepare_source(at_point, progress=False)
        assert content(prepared.path) == reference
        assert folders(at_point) == [prepared.path]
    assert finished == 3  # after the rename, and before and after the sync of the folder above
    assert went_on >= 2


@pytest.mark.parametrize("point, kept", [(20, False), (-5, True)])
def test_what_was_left_of_other_settings_is_kept_if_it_can_go_on(settings, tmp_path, point, kept, capfd):
    if point < 0:
        out, _ = start(replace(settings, directory=str(tmp_path / "whole")), "kill", 0).communicate(timeout=TIMEOUT)
        point += int(out)
    start(settings, "kill", point).communicate(timeout=TIMEOUT)
    (abandoned,) = folders(settings)
    assert abandoned.name.startswith(".partial-")
    prepared = prepare_source(replace(settings, seq_len=7), progress=True)
    assert (f"{abandoned}: an unfinished preparation" in capfd.readouterr().err) == kept
    assert set(folders(settings)) == {prepared.path, *([abandoned] if kept else [])}


def test_going_on_reads_only_what_is_left(settings, reference, monkeypatch, capfd):
    """After an interruption at the last document: 'resuming' is said, and no document is tokenised twice."""

    class Interrupted(module.Documents):
        def __iter__(self):
            for piece in super().__iter__():
                if self.progress.records > 90:
                    raise KeyboardInterrupt
                yield piece

    tokenised = 0

    class Counted(module.Encoder):
        def encode(self, texts):
            nonlocal tokenised
            tokenised += len(texts)
            return super().encode(texts)

    monkeypatch.setattr(module, "Encoder", Counted)
    with monkeypatch.context() as patch:
        patch.setattr(module, "Documents", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_source(settings, progress=False)
    (partial,) = folders(settings)
    assert (partial / PROGRESS_FILE).is_file()
    before, tokenised = tokenised, 0
    assert content(prepare_source(settings, progress=True).path) == reference
    assert "resuming the preparation" in capfd.readouterr().err
    assert before > 60 and tokenised < 50


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


def test_sigterm_leaves_nothing_that_cannot_be_resumed(settings, tmp_path):
    worker = start(settings, "meet", tmp_path)
    wait_until((tmp_path / "reading").exists, worker)
    worker.terminate()
    (tmp_path / "go").touch()
    worker.communicate(timeout=TIMEOUT)
    assert worker.returncode == 128 + signal.SIGTERM
    assert folders(settings) == []


@pytest.mark.parametrize("what", [PROGRESS_FILE, "train.arrow"])
def test_a_damaged_beginning_is_begun_again(settings, reference, tmp_path, what, capfd):
    out, _ = start(replace(settings, directory=str(tmp_path / "whole")), "kill", 0).communicate(timeout=TIMEOUT)
    start(settings, "kill", int(out) - 5).communicate(timeout=TIMEOUT)
    (partial,) = folders(settings)
    os.truncate(partial / what, 100)
    assert content(prepare_source(settings, progress=True).path) == reference
    assert "again, because its files are damaged" in capfd.readouterr().err
