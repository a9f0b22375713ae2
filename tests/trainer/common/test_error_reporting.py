"""Whatever a command's streams, environment and paths are, it ends with one line and a status, without a traceback."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from tests.distributed import TIME_LIMIT
from tests.tools import ended
from tests.trainer.job import ROOT, write_recipe
from trainer.cli import cli
from trainer.common.atomic import atomic_write
from trainer.common.error_reporting import report_errors

UNIPOOL = (sys.executable, "-m", "trainer")


def started(arguments: tuple[str, ...], before: str = "", **options: Any) -> subprocess.Popen[bytes]:
    """Start a command after what a shell does before: Python code between fork and exec may hang beside threads."""
    shell = ("sh", "-c", f'{before}; exec "$0" "$@"') if before else ()
    return subprocess.Popen([*shell, *UNIPOOL, *arguments], stderr=subprocess.PIPE, **{"cwd": ROOT, **options})


def test_streams_of_every_kind(tmp_path: Path) -> None:
    """All at once, for they mostly load: a reader that is gone, a full disk, closed streams, no home, no folder."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    gone = tmp_path / "gone"
    gone.mkdir()
    bare = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    with open("/dev/full", "w") as full:
        jobs = {
            "broken pipe": started(("recipes",), stdout=write_end),
            "full": started(("recipes",), stdout=full),
            "closed": started(("recipes",), "exec <&- >&-"),
            "bare": started(("plan", "quickstart", "--json"), stdout=subprocess.PIPE, env=bare, cwd="/"),
            "no folder": started(("plan", "quickstart"), "rmdir ../gone", stdout=subprocess.PIPE, env=bare, cwd=gone),
        }
    os.close(write_end)
    found = {name: (job.communicate(timeout=TIME_LIMIT)[1].decode(), job.returncode) for name, job in jobs.items()}
    assert found == {
        "broken pipe": ("", 1),
        "full": ("error: no space left on device\n", 1),
        "closed": ("", 0),
        "bare": ("", 0),
        "no folder": ("", 0),
    }


def test_libraries_add_nothing() -> None:
    """A wrong folder is one line also for a command that loads transformers, and with it torchao."""
    job = started(("generate", "none", "--prompt", "x"))
    said = job.communicate(timeout=TIME_LIMIT)[1].decode()
    assert job.returncode == 2 and said.count("\n") == 1 and said.startswith("error: none: no such folder"), said


@pytest.mark.parametrize("words", [(), ("probe",), ("train",), ("export", "runs/a"), ("completion",)], ids=" ".join)
def test_what_is_missing(words: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """A group alone shows its help, as it is; a command without its argument says where to look."""
    with pytest.raises(SystemExit) as ended, report_errors():
        cli.main(list(words), prog_name="unipool", standalone_mode=False)
    out, said = capfd.readouterr()
    assert (ended.value.code, out) == (2, "")
    if words[:1] in ((), ("probe",)):
        assert said.splitlines()[0] == f"Usage: {' '.join(['unipool', *words])} [OPTIONS] COMMAND [ARGS]..."
        assert "\\n" not in said and "\nCommands:\n" in said
    else:
        missing = {"train": "'RECIPE'", "export": "'OUT'", "completion": "'SHELL'. Choose from: bash, zsh, fish"}[
            words[0]
        ]
        assert said == f"error: Missing argument {missing}. See unipool {words[0]} --help.\n"


def leaves() -> list[tuple[str, ...]]:
    """Every command with its groups."""

    def below(command: click.Command, words: tuple[str, ...]) -> list[tuple[str, ...]]:
        if not isinstance(command, click.Group):
            return [words]
        return [leaf for name, inner in command.commands.items() for leaf in below(inner, (*words, name))]

    return below(cli, ())


@pytest.mark.parametrize("words", leaves(), ids=" ".join)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENAMETOOLONG, "Too long", "x")])
def test_interrupted_in_any_command(
    words: tuple[str, ...], error: BaseException, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise error

    command: Any = cli
    for word in words:
        command = command.commands[word]
    monkeypatch.setattr(command, "invoke", stop)
    monkeypatch.setattr(command, "parse_args", lambda *_: [])
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    status = 2 if isinstance(error, OSError) else 130
    assert ended(monkeypatch, *words) == status
    assert capfd.readouterr().err.strip() == ("error: x: too long" if status == 2 else "")


def test_what_stdout_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question mark, and no error."""
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "ascii"))
    with report_errors():
        print("naïve café ± 東京")
    assert content.getvalue() == b"na?ve caf? ? ??\n"


def test_an_error_that_is_ours_keeps_its_traceback() -> None:
    with pytest.raises(ConnectionRefusedError), report_errors():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    with pytest.raises(ValueError, match="ours"), report_errors():
        raise ValueError("ours")


def test_an_empty_path_is_no_file() -> None:
    """As of `--out ""`: it is the current folder."""
    with pytest.raises(IsADirectoryError, match="'.'"):
        atomic_write(Path(""), lambda _: pytest.fail("written"))


PATHS: dict[str, Callable[[Path], Path]] = {
    "too long": lambda folder: folder / ("x" * 300),
    "a file": lambda folder: folder / "file",
    "below a file": lambda folder: folder / "file" / "run",
    "a dangling link": lambda folder: folder / "dangling",
    "a link to itself": lambda folder: folder / "loop",
    "a pipe": lambda folder: folder / "pipe",
    "not to be made": lambda _: Path("/proc/run"),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_run_folder_that_cannot_be(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`train` says so before anything is prepared or started."""
    recipe = write_recipe(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "deep")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    for variable in ("RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("trainer.cluster.launch.end_on_signals", lambda: None)
    monkeypatch.setattr("trainer.cluster.launch.run_locally", lambda *_: pytest.fail("started"))
    path = PATHS[name](tmp_path)
    assert ended(monkeypatch, "train", str(recipe), "--set", f"run.dir={path}") == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: run.dir = {path}: cannot be written (") and err.count("\n") == 1, err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        *(("eval", "PATH"), ("export", "PATH", "out"), ("generate", "PATH", "--prompt", "x"), ("watch", "PATH")),
        *(("report", "PATH"), ("probe", "load", "PATH"), ("sweep", "PATH"), ("law", "PATH"), ("plan", "PATH")),
        *(("prepare", "PATH"), ("bench", "PATH"), ("train", "PATH")),
        ("plan", "quickstart", "--hardware", "PATH"),
        ("plan", "quickstart", "--simulate", "--loads", "PATH"),
        ("plan", "quickstart", "--simulate", "--timeline", "PATH/x.png"),
        ("train", "quickstart", "--hostfile", "PATH", "--node-rank", "0"),
        ("bench", "quickstart", "--out", "PATH/p.json"),
        ("sweep", "small-scores", "--dir", "PATH"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("kind", ["too long", "a file", "below a file", "a pipe"])
def test_paths_that_cannot_be(
    words: tuple[str, ...],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Wherever a command takes one: an error of one line, status 2, and nothing hangs."""
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "pipe")
    for variable in ("RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("trainer.cluster.launch.end_on_signals", lambda: None)
    path = str(PATHS[kind](tmp_path))
    monkeypatch.chdir(tmp_path)
    assert ended(monkeypatch, *(word.replace("PATH", path) for word in words)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines


ENDS = """
import atexit, os, sys
from types import SimpleNamespace
from trainer.common.error_reporting import end_process
class Aborts:
    def __del__(self):
        os.abort()
left = Aborts()
atexit.register(print, "clean-up")
if sys.argv[1] == "mpi":
    finalize = lambda: print("MPI")
    sys.modules["mpi4py.MPI"] = SimpleNamespace(Is_finalized=lambda: False, Finalize=finalize)
{end}(75)
"""


def test_a_rank_ends_without_taking_the_interpreter_apart() -> None:
    """What would abort it then does not run; what is to be cleaned up is, and what was printed is there."""

    def run(end: str, mpi: str = "") -> tuple[int, str]:
        code = ENDS.format(end=end)
        done = subprocess.run([sys.executable, "-c", code, mpi], cwd=ROOT, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout

    assert run("end_process") == (75, "clean-up\n")
    assert run("end_process", "mpi") == (75, "clean-up\nMPI\n")
    assert run("sys.exit")[0] == -signal.SIGABRT, "as it would"
