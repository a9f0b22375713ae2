"""`prepare` killed at any point, and in two processes at once."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.distributed import TIME_LIMIT
from trainer.common import atomic
from trainer.common.errors import START_AGAIN, Unavailable
from trainer.data import cache, status
from trainer.data import source_builder as module
from trainer.data.cache import PREVIOUS_FILE, PROGRESS_FILE, Conduct, make_once
from trainer.data.prepare import prepare_source
from trainer.data.status import Report, Status

WORKER = Path(__file__).with_name("prepare_worker.py")
REPOSITORY = Path(__file__).parents[3]
LEASE = 1.0
QUIET, TELLING = Conduct(show=False, patience=TIME_LIMIT), Conduct(patience=TIME_LIMIT)


def start(settings, *arguments, host=None, lease=LEASE) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, WORKER, json.dumps(asdict(settings)), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | ({"HOST": host, "LEASE": str(lease)} if host else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def content(folder: Path) -> dict[str, bytes]:
    """But for what has a path in it, or is of no use any more."""
    left_out = ("facts.json", PROGRESS_FILE, PREVIOUS_FILE)
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in left_out}


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
    return content(prepare_source(replace(settings, directory=str(tmp_path / "reference")), QUIET).path)


def test_killed_anywhere_it_goes_on_and_nothing_looks_finished_before_it_is(settings, reference, tmp_path):
    out, _ = start(replace(settings, directory=str(tmp_path / "whole")), "kill", 0).communicate(timeout=TIME_LIMIT)
    events = int(out)
    assert events > 100 + 10
    # In the last 30 events the folder is written to the disk and renamed, and what has become useless is removed.
    sample = random.Random(0).sample
    points = [1, events, *sample(range(2, events - 30), 3), *sample(range(events - 30, events), 5)]
    finished = went_on = 0
    for point in points:
        at_point = replace(settings, directory=str(tmp_path / f"killed-{point}"))
        worker = start(at_point, "kill", point)
        _, err = worker.communicate(timeout=TIME_LIMIT)
        assert worker.returncode == -signal.SIGKILL, err
        for folder in folders(at_point):
            if not folder.name.startswith(".partial-"):
                assert content(folder) == reference
                finished += 1
            else:
                went_on += (folder / PROGRESS_FILE).is_file()
        prepared = prepare_source(at_point, QUIET)
        assert content(prepared.path) == reference
        assert folders(at_point) == [prepared.path]
    assert finished >= 2 and went_on >= 3


@pytest.mark.parametrize("point, kept", [(20, False), (-30, True)])
def test_what_was_left_of_other_settings_is_kept_if_it_can_go_on(settings, tmp_path, point, kept, capfd):
    if point < 0:
        out, _ = start(replace(settings, directory=str(tmp_path / "whole")), "kill", 0).communicate(timeout=TIME_LIMIT)
        point += int(out)
    start(settings, "kill", point).communicate(timeout=TIME_LIMIT)
    (abandoned,) = folders(settings)
    assert abandoned.name.startswith(".partial-")
    prepared = prepare_source(replace(settings, seq_len=7), TELLING)
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
            prepare_source(settings, QUIET)
    (partial,) = folders(settings)
    assert (partial / PROGRESS_FILE).is_file()
    before, tokenised = tokenised, 0
    assert content(prepare_source(settings, TELLING).path) == reference
    assert "resuming the preparation" in capfd.readouterr().err
    assert before > 60 and tokenised < 50


def test_after_a_full_disk_it_goes_on(settings, reference, monkeypatch, capfd):
    class FullDisk(module.SplitWriter):
        def add(self, *args):
            if self.tokens > 1500:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "SplitWriter", FullDisk)
        with pytest.raises(Unavailable, match=r"No space left .* free some space .*; the next start resumes"):
            prepare_source(settings, QUIET)
    assert content(prepare_source(settings, TELLING).path) == reference
    assert "resuming the preparation" in capfd.readouterr().err


def wait_until(happened, worker) -> None:
    end = time.monotonic() + TIME_LIMIT
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
    assert int(first.communicate(timeout=TIME_LIMIT)[0]) == 100
    assert int(second.communicate(timeout=TIME_LIMIT)[0]) == 0
    (folder,) = folders(settings)
    assert content(folder) == reference


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 90)])
def test_signals_end_it_at_once_and_keep_what_can_be_resumed(settings, reference, tmp_path, number, at):
    worker = start(settings, "meet", tmp_path, at, host="elsewhere")
    wait_until((tmp_path / "reading").exists, worker)
    if at > 1:
        (partial,) = folders(settings)
        wait_until((partial / PREVIOUS_FILE).exists, worker)
    worker.send_signal(number)
    assert worker.wait(TIME_LIMIT) == START_AGAIN
    worker.communicate(timeout=TIME_LIMIT)
    assert [(folder / PROGRESS_FILE).is_file() for folder in folders(settings)] == ([True] if at > 1 else [])
    assert {path.name for path in Path(settings.directory).iterdir()} == {folder.name for folder in folders(settings)}
    assert content(prepare_source(settings, QUIET).path) == reference  # without waiting for a machine that may be dead


@pytest.fixture
def patience_of_seconds(monkeypatch):
    """As the worker has it on another machine."""
    monkeypatch.setattr(cache, "LEASE_SECONDS", LEASE)
    monkeypatch.setattr(cache, "_BEAT_SECONDS", 0.2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_another_machine_takes_over_when_the_first_shows_no_life(
    settings, reference, tmp_path, number, patience_of_seconds, capfd
):
    """One that was only stopped finds the finished folder when it goes on, and leaves it as it is."""
    worker = start(settings, "meet", tmp_path, 90, host="elsewhere")
    wait_until((tmp_path / "reading").exists, worker)
    worker.send_signal(number)
    prepared = prepare_source(settings, TELLING)
    said = capfd.readouterr().err
    assert f"waiting for another process, {worker.pid} on elsewhere, which prepares {prepared.path}" in said
    assert "resuming the preparation" in said and content(prepared.path) == reference
    facts = (prepared.path / "facts.json").read_bytes()
    (tmp_path / "go").touch()
    if number == signal.SIGSTOP:
        worker.send_signal(signal.SIGCONT)
        _, err = worker.communicate(timeout=TIME_LIMIT)
        assert worker.returncode == 0 and "another process has taken over" in err
    worker.communicate(timeout=TIME_LIMIT)
    assert folders(settings) == [prepared.path] and content(prepared.path) == reference
    assert (prepared.path / "facts.json").read_bytes() == facts


def test_who_is_ended_after_another_has_taken_over_leaves_its_work_alone(
    settings, reference, tmp_path, patience_of_seconds, monkeypatch
):
    worker = start(settings, "meet", tmp_path, host="elsewhere")
    wait_until((tmp_path / "reading").exists, worker)
    worker.send_signal(signal.SIGSTOP)

    class Documents(module.Documents):
        def __iter__(self):
            for number, piece in enumerate(super().__iter__()):
                if not number:
                    worker.send_signal(signal.SIGTERM)
                    worker.send_signal(signal.SIGCONT)
                    assert worker.wait(TIME_LIMIT) == START_AGAIN
                yield piece

    monkeypatch.setattr(module, "Documents", Documents)
    assert content(prepare_source(settings, QUIET).path) == reference
    worker.communicate(timeout=TIME_LIMIT)


def test_a_process_that_is_forked_meanwhile_holds_up_nobody(tmp_path):
    """It has all files open, the ends of pipes too."""
    ended = tmp_path / "ended"
    forked = multiprocessing.get_context("fork").Process(target=touch_late, args=(ended,), daemon=True)
    try:
        make_once(tmp_path, "made", lambda *_: forked.start(), replace(QUIET, ends_on_signals=True))
        assert not ended.exists()
    finally:
        forked.kill()


def touch_late(file: Path) -> None:
    time.sleep(TIME_LIMIT)
    file.touch()


def test_who_is_overtaken_while_it_writes_to_the_disk_does_not_publish(settings, reference, monkeypatch):
    """The other one has cut off what comes after its position, and goes on from there."""
    synced = []

    def slow(file: Path) -> None:
        if file.name == "train.arrow" and not synced:
            (status,) = file.parent.parent.glob(".*.status")
            status.write_text(json.dumps(json.loads(status.read_text()) | {"owner": "the other one"}))
            os.truncate(file, file.stat().st_size - 100)
            synced.append(file)

    monkeypatch.setattr(atomic, "fsync", slow)
    assert content(prepare_source(settings, QUIET).path) == reference and synced


def test_what_a_killed_process_has_left_is_no_other_process_even_on_a_full_disk(tmp_path, monkeypatch):
    """The preparation would begin again and again, because of another process that there is not."""
    monkeypatch.setattr(Report, "_put", lambda *_: None)
    (tmp_path / "status").write_text(json.dumps(asdict(Status("killed", "here", 1, 0, "beginning"))))
    assert not Report(tmp_path / "status", False, lambda: False).taken_over()


def test_a_wait_without_progress_ends(settings, tmp_path, monkeypatch):
    worker = start(settings, "meet", tmp_path, host="elsewhere", lease=cache.LEASE_SECONDS)
    wait_until((tmp_path / "reading").exists, worker)
    # Patience ends in two seconds, while a worker that the system leaves alone for some more is not taken for dead.
    monkeypatch.setattr(status, "time", SimpleNamespace(monotonic=lambda: 100 * time.monotonic()))
    with pytest.raises(Unavailable) as error:
        prepare_source(settings, Conduct(patience=180.0))  # longer than a dead machine is waited for
    assert error.value.status == 1
    said = f"waited 3 min (parallel.start_timeout_seconds) for process {worker.pid} on elsewhere, which prepares"
    assert said in str(error.value)
    (lease,) = Path(settings.directory).glob("*.lease")
    before = lease.stat().st_mtime_ns
    wait_until(lambda: lease.stat().st_mtime_ns != before, worker)  # it lives
    (tmp_path / "go").touch()
    assert int(worker.communicate(timeout=TIME_LIMIT)[0]) == 100


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("what", "damage", "said"),
    [
        (PROGRESS_FILE, lambda file: os.truncate(file, 100), "the position before the last, because"),
        (
            "train.arrow",
            lambda file: os.truncate(file, file.stat().st_size - 100),
            "the position before the last",
        ),
        ("train.arrow", lambda file: os.truncate(file, 100), "again, because its files are damaged"),
        ("train.arrow", flip, "again, because its files are damaged"),
    ],
)
def test_a_damaged_beginning_is_not_used(settings, reference, tmp_path, what, damage, said, capfd):
    worker = start(settings, "meet", tmp_path, 90)
    wait_until((tmp_path / "reading").exists, worker)
    worker.kill()
    worker.communicate(timeout=TIME_LIMIT)
    (partial,) = folders(settings)
    damage(partial / what)
    assert content(prepare_source(settings, TELLING).path) == reference
    assert said in capfd.readouterr().err


def test_the_command_ends_with_the_status_of_a_stop_while_it_waits(settings, tmp_path):
    """And at once with 0 when there is nothing left to do."""
    keys = {f"model.{key}": getattr(settings, key) for key in ("vocab", "seq_len")}
    keys |= {f"data.{key}": getattr(settings, key) for key in ("source", "tokenizer")}
    keys |= {"data.split": list(settings.split), "data.dir": settings.directory}
    options = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "trainer", "prepare", "quickstart", *options]
    first = start(settings, "meet", tmp_path)
    wait_until((tmp_path / "reading").exists, first)
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as waiting:
        try:
            assert "waiting for another process" in waiting.stderr.readline()
            waiting.terminate()
            assert waiting.wait(TIME_LIMIT) == START_AGAIN
        finally:
            waiting.kill()
    (tmp_path / "go").touch()
    first.communicate(timeout=TIME_LIMIT)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0 and done.stderr == "" and f"{folders(settings)[0]}, vocabulary 300" in done.stdout
