"""`train` without a launcher: which process gets which signal, the exit status, and starting again after a fault."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import psutil
import pytest

from tests.deploy.pods import can_isolate
from tests.trainer.job import ROOT, TIME_LIMIT, environment, wait_for
from trainer.cluster import launch
from trainer.cluster.launch import MAX_RESTARTS, RESTARTS, free_port, restart_limit, run_locally
from trainer.config.job_sections import Metrics
from trainer.config.recipe import load_recipe
from trainer.telemetry.prometheus import MetricsServer

RANK = """
import os, signal, sys, time
def leave(number, _):
    os.write(1, b"rank got %d\\n" % number)
    time.sleep({seconds})
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, leave if "{heeds}" else signal.SIG_IGN)
signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # without a word, as a rank does in the middle of leaving
os.write(1, b"rank is there\\n")
time.sleep(600)
"""
LAUNCHER = """
# Ends as deepspeed's does: with the status of the first rank that fails, or 1 if it is told to.
import os, signal, subprocess, sys, time
def leave(number, _):
    os.write(1, b"launcher got %d\\n" % number)
    for rank in ranks:
        rank.kill()
    sys.exit(1)
signal.signal(signal.SIGTERM, leave)
ranks = [
    subprocess.Popen([sys.executable, "-c", rank], env=os.environ | {"RANK": str(number)})
    for number, rank in enumerate(sys.argv[2:])
]
os.write(1, b"launcher is there\\n")
while all(rank.poll() is None for rank in ranks):
    time.sleep(0.05)
time.sleep(float(os.environ.get("LINGER", 0)))
sys.exit(next(rank.poll() for rank in ranks if rank.poll()))
"""
USER = """
# Says once of each rank that it watches it, and that it has ended.
import os, sys
from trainer.cluster import launch
has_ended, said = launch.has_ended, set()
def watched(process):
    ended = has_ended(process)
    if (process.pid, ended) not in said:
        said.add((process.pid, ended))
        os.write(1, b"%d %s\\n" % (process.pid, b"has ended" if ended else b"is watched"))
    return ended
launch.has_ended = watched
names = {0: 'rank 0 (trunk 0)', 1: 'rank 1 (pool 0, shard 0)'}
sys.exit(launch.LocalJob(names).run(sys.argv[1:], dict(os.environ)))
"""


def wait_for_ranks(log: Path, number: int, said: str = "rank is there") -> None:
    """Until so many ranks, or the user about so many, have said this."""
    deadline = time.monotonic() + TIME_LIMIT
    while log.read_text().count(said) < number:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def rank(seconds: float = 0.0, heeds: bool = True) -> str:
    return RANK.format(seconds=seconds, heeds="yes" if heeds else "")


QUICK, SLOW, DEAF = rank(), rank(0.5), rank(heeds=False)


@pytest.mark.parametrize(
    ("ranks", "signals", "status"),
    [
        ([QUICK, SLOW], [signal.SIGTERM], 75),
        ([SLOW, SLOW], [signal.SIGUSR1], 75),
        ([QUICK, QUICK], [signal.SIGINT], 128 + signal.SIGINT),
        ([DEAF], [signal.SIGUSR1, signal.SIGTERM], 128 + signal.SIGUSR1),
        ([rank(2.0)], [signal.SIGTERM, signal.SIGUSR1], 75),
        ([], [signal.SIGTERM], 128 + signal.SIGTERM),
    ],
    ids=["SIGTERM", "SIGUSR1", "SIGINT", "a second signal", "USR1 after SIGTERM", "before there are ranks"],
)
def test_signals(ranks: list[str], signals: list[int], status: int, tmp_path: Path) -> None:
    """The ranks get what may end in a checkpoint, and the launcher nothing then; all else ends every process."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", USER, sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch", *ranks]
    with log.open("w") as output:
        user = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        wait_for(log, "launcher is there")
        wait_for_ranks(log, len(ranks))
        for number in signals[:-1]:
            user.send_signal(number)
            if ranks == [DEAF]:  # two signals that come as one are handled in this order, too
                with pytest.raises(subprocess.TimeoutExpired):
                    user.wait(1)
            else:
                wait_for(log, f"rank got {number:d}")
        user.send_signal(signals[-1])
        assert user.wait(120) == status, log.read_text()
    told = log.read_text().splitlines()
    assert (f"launcher got {int(signal.SIGTERM)}" in told) == (status != 75)
    if status == 75:
        assert told.count(f"rank got {int(signals[0])}") == len(ranks)


@pytest.mark.parametrize(
    ("marked", "of_launcher", "status"),
    [("75", 1, 75), ("0", 1, 0), ("3", 1, 3), ("", 1, 1), ("0", 134, 134), ("75", 134, 134)],
)
def test_the_status_is_the_jobs_if_its_launcher_was_asked_to_end(
    marked: str, of_launcher: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by SIGTERM to a whole process group: deepspeed's launcher then ends with 1, although the ranks have saved."""
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.01)
    job = launch.LocalJob({})
    script = f'test -z "{marked}" || touch "${{{launch.DONE_FILE}}}{marked}"; exit {of_launcher}'
    assert job.run(["sh", "-c", script], {}) == status
    assert job.came_to_end == (marked in ("0", "3"))


@pytest.mark.parametrize("there", [True, False])
def test_a_signal_while_the_launcher_starts_reaches_the_ranks_that_are_there(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a rank, it ends the launcher."""
    rank = MagicMock()
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(launch, "_ranks", lambda launcher: [rank] * there)
    job = launch.LocalJob({})
    job._end(signal.SIGTERM)  # as if it came before the launcher is known
    assert job.run(["sleep", "0.1" if there else "600"], {}) == 128 + signal.SIGTERM
    assert [call.args for call in rank.send_signal.call_args_list] == [(signal.SIGTERM,)] * there


def test_a_node_whose_ranks_have_saved_ends_well_if_it_is_asked_to_stop_too(tmp_path: Path) -> None:
    """When one node was asked to stop, a cluster may ask the others while their launchers are about to end."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", USER, sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch", QUICK]
    with log.open("w") as output:
        own = environment() | {"LINGER": "2"}
        user = subprocess.Popen(command, cwd=ROOT, env=own, stdout=output, stderr=subprocess.STDOUT)
        wait_for(log, "rank is there")
        wait_for(log, "is watched")
        (launcher,) = psutil.Process(user.pid).children()
        (leaving,) = launcher.children()
        leaving.send_signal(signal.SIGTERM)
        leaving.wait(60)
        user.send_signal(signal.SIGTERM)
        assert user.wait(120) == 75, log.read_text()
    assert f"launcher got {int(signal.SIGTERM)}" not in log.read_text()


def test_a_rank_that_was_killed_is_named(tmp_path: Path) -> None:
    """Even if it has not met the others yet, who then only hear from the launcher."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", USER, sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch", SLOW, SLOW]
    with log.open("w") as output:
        user = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        wait_for_ranks(log, 2, "is watched")
        (launcher,) = psutil.Process(user.pid).children()
        other, killed = sorted(launcher.children(), key=lambda rank: rank.environ()["RANK"])
        killed.kill()
        wait_for(log, f"{killed.pid} has ended")
        other.kill()  # as deepspeed's launcher would
        assert user.wait(120) == 256 - signal.SIGKILL
    assert "unipool: rank 1 (pool 0, shard 0) was killed by SIGKILL" in log.read_text().splitlines()


class Job:
    """A job that ends with given statuses, one a start.

    Args:
        done: whether its last start does all steps.
    """

    def __init__(self, statuses: list[int], ended_by: list[int], done: bool):
        self.left, self.ended_by = list(statuses), ended_by
        self.came_to_end, self.done = False, done
        self.restarts: list[str] = []
        self.limits: set[str | None] = set()
        self.ports: list[str] = []
        self.pauses: list[float] = []
        self.environment: dict[str, str] = {}

    def run(self, command: list[str], environment: dict[str, str]) -> int:
        self.environment = environment
        self.restarts.append(environment[RESTARTS])
        self.limits.add(environment.get(MAX_RESTARTS))
        self.ports += [word.removeprefix("--master_port=") for word in command if word.startswith("--master_port=")]
        self.came_to_end = self.done and len(self.left) == 1
        return self.left.pop(0)

    def pause(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        return True


@pytest.mark.parametrize(
    ("statuses", "max_restarts", "ended_by", "done", "status"),
    [
        ([1], 0, [], False, 1),
        ([75], 0, [], False, 75),
        ([1, 75, 137, 0], 3, [], True, 0),
        ([1, 1, 1], 2, [], False, 1),
        ([1, 2], 3, [], False, 2),
        ([75], 3, [15], False, 75),
        ([130], 3, [2], False, 130),
        ([1, 1], 3, [], True, 1),
    ],
)
def test_restarts(
    statuses: list[int],
    max_restarts: int,
    ended_by: list[int],
    done: bool,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After a fault, neither a wrong input, a signal nor the end of a diverged run; so often at most, not at once."""
    job: Any = Job(statuses, ended_by, done)
    ports = count(1)
    monkeypatch.setattr(launch, "LocalJob", lambda names: job)
    monkeypatch.setattr(launch, "free_port", lambda: next(ports))
    assert run_locally(load_recipe("quickstart"), ["train", "quickstart"], max_restarts) == status
    assert job.left == []
    assert job.restarts == [str(n) for n in range(len(statuses))]
    assert job.limits == {str(max_restarts) if max_restarts else None}
    assert job.pauses == [2.0**n for n in range(len(statuses) - 1)]
    assert job.ports == [str(port) for port in range(1, len(statuses) + 1)]
    assert capsys.readouterr().err.splitlines() == [
        f"unipool: the job ended with status {ended}; restart {n} of {max_restarts} from the newest checkpoint"
        for n, ended in enumerate(statuses[:-1], 1)
    ]


def test_restarts_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESTARTS, "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "9")
    server = MetricsServer("trunk", 0)
    server.listen(Metrics(), 0)
    page = urllib.request.urlopen(f"http://{server.address}/metrics", timeout=60).read().decode()
    assert 'unipool_restarts_total{rank="0",role="trunk"} 2.0' in page.splitlines()
    assert 'unipool_max_restarts{rank="0",role="trunk"} 9.0' in page.splitlines()
    monkeypatch.setenv(MAX_RESTARTS, "20")
    assert restart_limit() == 20
    monkeypatch.setenv(MAX_RESTARTS, "many")
    assert restart_limit() is None


def test_a_container_s_first_process_heeds_signals_before_there_are_ranks() -> None:
    """The kernel gives process 1 no signal that it has no handler for."""
    if not can_isolate():
        pytest.skip("needs the right to make namespaces")
    code = (
        "from trainer.cluster.launch import end_on_signals as e; e(); print('there', flush=True); "
        "import time; time.sleep(60)"
    )
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "there\n"
            (first,) = psutil.Process(process.pid).children()
            first.send_signal(signal.SIGTERM)
            assert process.wait(120) == 128 + signal.SIGTERM
        finally:
            process.kill()


RANKS_ENVIRONMENT = """
import json, os, sys
names = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR")
with open(f"{os.environ['FOLDER']}/{os.environ['RANK']}", "w") as file:
    json.dump([os.environ.get(name) for name in names] + sys.argv[1:], file)
"""


@pytest.mark.parametrize(
    ("visible", "accelerator"),
    [
        ("4,5,6,7", None),
        ("6", None),
        (None, None),
        ("", None),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "cuda"),
        ("MIG-GPU-8932f937/1/0,MIG-c7384736-a75d-5afc-978f-d2f1294409fd", "cpu"),
    ],
    ids=["more than ranks", "fewer than ranks", "not set", "empty", "UUID", "MIG"],
)
def test_ranks_have_the_users_devices(
    visible: str | None, accelerator: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's launcher overwrites CUDA_VISIBLE_DEVICES; each rank has the user's value, whatever it looks like."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__main__.py").write_text(RANKS_ENVIRONMENT)
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("DS_ACCELERATOR", accelerator)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    command = launch.launcher({"a": 1, "b": 2}, 1, "127.0.0.1", 1234, ["train", "--set", "a=b c"])
    own = launch._environment(load_recipe("quickstart")) | {"FOLDER": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for rank, local_rank in (("1", "1"), ("2", "0")):
        told = json.loads((tmp_path / rank).read_text())
        assert told == [visible, accelerator, rank, local_rank, "3", "2", "127.0.0.1", "train", "--set", "a=b c"]
    assert not (tmp_path / "0").exists()


def test_the_launcher_of_a_node_reads_no_hostfile() -> None:
    """DeepSpeed's runner would read /job/hostfile, whatever job that is from."""
    command = launch.launcher({"localhost": 2}, 0, "127.0.0.1", 1234, [])
    assert command[1:3] == ["-m", "deepspeed.launcher.launch"]
    source = find_spec("deepspeed.launcher.launch").origin  # type: ignore[union-attr]
    assert "hostfile" not in Path(source or "").read_text().lower()


def test_a_launcher_that_is_killed_is_no_success() -> None:
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    user = [sys.executable, "-c", USER, *command]
    done = subprocess.run(
        user, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )
    assert done.returncode == 128 + 9
    assert done.stderr == "unipool: the job ended because its launcher was killed\n"


def test_a_port_is_given_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even to one who draws the same, before the port is used; a server may take it, and a third job still not."""
    monkeypatch.setattr(random.SystemRandom, "sample", lambda self, candidates, k: list(candidates[-k:]))
    port = free_port()
    assert free_port() != port
    with socket.create_server(("", port)):  # sets SO_REUSEADDR
        assert free_port() != port
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))


def test_a_job_that_has_saved_ends_well_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(launch.DONE_FILE, f"{tmp_path}/")
    (tmp_path / "3").symlink_to("/dev/full")  # nothing can be written into it
    launch.mark_end(0, 3)
    monkeypatch.setenv(launch.DONE_FILE, "/dev/null/")
    launch.mark_end(0, 0)
