"""`train --hostfile`: which ranks a node has, and what is refused before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.trainer.job import write_recipe
from tests.training import tiny
from trainer.cli import cli
from trainer.cluster import launch
from trainer.cluster.hostfile import Node, find_node
from trainer.cluster.rank_assignment import ROLE
from trainer.common.errors import UserError

RECIPE = tiny(parallel={"trunk_ranks": 2, "pool_ranks": 4, "expert_parallel": 4})


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_node_s_place(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "# trunk\na slots=2\n\n  b\tslots=1 # pool\nc slots=3\n")
    slots = {"a": 2, "b": 1, "c": 3}
    assert find_node(RECIPE, path, 0, None, None) == Node(slots, 0, True, "a", 29500)
    assert find_node(RECIPE, path, 1, None, None) == Node(slots, 1, False, "a", 29500)
    assert find_node(RECIPE, path, 2, "10.0.0.1", 1234) == Node(slots, 2, False, "10.0.0.1", 1234)


def test_which_nodes_have_trunk_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hostfile(tmp_path, "a slots=3\nb slots=3\n")
    interleaved = RECIPE.model_copy(update={"topology": RECIPE.topology.model_copy(update={"order": "interleaved"})})
    assert find_node(interleaved, path, 1, None, None).has_trunk_ranks
    for role, expected in (("trunk", True), ("pool", False)):
        monkeypatch.setenv(ROLE, role)
        assert find_node(RECIPE, path, 0, None, None).has_trunk_ranks is expected


@pytest.mark.parametrize(
    ("text", "node_rank", "line"),
    [
        ("a slots=2\nb slots=4\n", None, "--node-rank is missing: must be 0 to 1, because {path} has 2 hosts"),
        ("a slots=2\nb slots=4\n", 2, "--node-rank 2: must be 0 to 1, because {path} has 2 hosts"),
        ("a slots=2\nb slots=4\n", -1, "--node-rank -1: must be 0 to 1, because {path} has 2 hosts"),
        ("a slots=2\na slots=4\n", 0, "--hostfile {path}, line 2: a is listed twice"),
        ("a slots=2\nb\n", 0, "--hostfile {path}, line 2: 'b' must be HOST slots=RANKS"),
        ("a slots=0\n", 0, "--hostfile {path}, line 1: 'a slots=0' must be HOST slots=RANKS"),
        ("a 6\n", 0, "--hostfile {path}, line 1: 'a 6' must be HOST slots=RANKS"),
        ("# nobody\n", 0, "--hostfile {path}: no host is listed; add lines HOST slots=RANKS"),
        (
            "a slots=2\nb slots=3\n",
            0,
            "--hostfile {path}: the slots are 2 + 3 = 5, but parallel.trunk_ranks + parallel.pool_ranks = 2 + 4 = 6: "
            "make them equal",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, node_rank: int | None, line: str) -> None:
    path = hostfile(tmp_path, text)
    with pytest.raises(UserError) as error:
        find_node(RECIPE, path, node_rank, None, None)
    assert str(error.value) == line.format(path=path)


def test_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--hostfile .*/none: cannot be read \\(no such file or directory\\)"):
        find_node(RECIPE, tmp_path / "none", 0, None, None)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--node-rank", "1"], "--node-rank 1: needs --hostfile"),
        (["--master-addr", "a"], "--master-addr a: needs --hostfile"),
        (["--master-port", "1"], "--master-port 1: needs --hostfile"),
        (
            ["--hostfile", "hosts", "--node-rank", "0", "--max-restarts", "2"],
            "--max-restarts 2: not allowed with --hostfile, because all nodes must restart together; ",
        ),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    recipe = write_recipe(tmp_path)
    hostfile(tmp_path, "a slots=1\nb slots=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "end_on_signals", lambda: None)
    error = CliRunner().invoke(cli, ["train", str(recipe), *arguments]).exception
    assert isinstance(error, UserError)
    assert str(error).startswith(line)
    assert not (tmp_path / "run").exists()


def test_each_node_starts_its_ranks_through_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a node with trunk ranks prepares data; the cluster's count of restarts is passed on."""
    recipe = write_recipe(tmp_path)
    hostfile(tmp_path, "a slots=1\nb slots=1\n")
    started = []

    def run(_: launch.LocalJob, command: list[str], environment: dict[str, str]) -> int:
        started.append((command, environment[launch.RESTARTS]))
        return 75

    arguments = ["train", str(recipe), "--hostfile", "hosts", "--master-port", "1234", "--node-rank", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "end_on_signals", lambda: None)
    monkeypatch.setattr(launch.LocalJob, "__init__", lambda _, names: None)
    monkeypatch.setattr(launch.LocalJob, "run", run)
    monkeypatch.setattr(sys, "argv", ["unipool", *arguments])
    monkeypatch.setenv(launch.RESTARTS, "3")
    assert CliRunner().invoke(cli, arguments).exit_code == 75
    assert not (tmp_path / "data").exists()
    (command, restarts), *others = started
    assert command == launch.launcher({"a": 1, "b": 1}, 1, "a", 1234, arguments)
    assert (restarts, others) == ("3", [])
    assert CliRunner().invoke(cli, [*arguments[:-1], "0"]).exit_code == 75
    assert (tmp_path / "data").exists()
