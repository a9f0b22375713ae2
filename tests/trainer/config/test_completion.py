"""Completion: what is offered, and what real shells make of it in a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from tests.distributed import TIME_LIMIT
from tests.trainer.job import ROOT
from trainer.cli import cli
from trainer.config.completion import SHELLS
from trainer.config.recipe import Recipe, recipe_names
from trainer.sweep.spec import sweep_names


def offered(line: str) -> list[str]:
    """What is offered for the last word of a command line."""
    *words, begun = line.split(" ")
    shell = ShellComplete(cli, {}, "unipool", "_UNIPOOL_COMPLETE")
    return [item.value if item.type == "plain" else item.type for item in shell.get_completions(words[1:], begun)]


def test_names_keys_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, file in (("runs/a", "recipe.yaml"), ("runs/b", "notes"), ("out", "config.json")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).touch()
    (tmp_path / "queue.yaml").touch()
    assert offered("unipool pl") == ["plan"]
    assert offered("unipool train --max") == ["--max-restarts"]
    assert offered("unipool train ") == [*recipe_names(), "queue.yaml"]
    assert offered("unipool plan qu") == ["quickstart", "queue.yaml"]
    assert offered("unipool bench elsewhere/") == ["file"]
    assert offered("unipool plan quickstart --hardware h") == ["h100", "h200"]
    assert offered("unipool plan quickstart --hardware runs/") == ["file"]
    assert offered("unipool sweep ") == [*sweep_names(), "queue.yaml"]
    assert offered("unipool init mine --source te") == ["file"]
    assert offered("unipool train --set ") == [f"{section}." for section in Recipe.model_fields]
    assert offered("unipool train --set train.decay_f") == ["train.decay_fraction="]
    assert offered("unipool sweep x --set lock.al") == ["lock.allocation="]
    assert offered("unipool train --set router.kind=") == [
        f"router.kind={kind}" for kind in ("norm", "norm_bias", "softmax", "sigmoid_bias")
    ]
    assert offered("unipool train --set=parallel.trunk_zero=") == [f"parallel.trunk_zero={stage}" for stage in range(4)]
    assert offered("unipool train --set train.compile=") == [f"train.compile={v}" for v in ("true", "false", "null")]
    for unknown in ("train.steps=", "train.betas=", "train.x=", "nothing.", "data.split="):
        assert offered(f"unipool train --set {unknown}") == [], unknown
    assert offered("unipool export ") == ["out", "runs/a"]
    assert offered("unipool watch runs/") == ["runs/a"]
    assert offered("unipool eval runs/b") == ["dir"]


KEYS = {
    "unipool tra\tquic\t--set parallel.lay\tdedi\t": "<unipool><train><quickstart><--set><parallel.layout=dedicated>",
    "unipool own runs/one\t": "<unipool><own><runs/one-run>",
}
"""What is typed, and the words of the command line that Tab has made of it."""

START = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
SET_UP = {
    "bash": 'eval "$(unipool completion bash)"',
    "zsh": 'autoload -U compinit; compinit -u -D; eval "$(unipool completion zsh)"',
    "fish": "unipool completion fish | source",
}


@pytest.mark.parametrize("name", SHELLS)
def test_a_real_shell(name: str, tmp_path: Path) -> None:
    """Tab is pressed in a terminal; Ctrl-A and printf then show the words of the line."""
    if shutil.which(name) is None:
        pytest.skip(f"needs {name}")
    (tmp_path / "runs/one-run").mkdir(parents=True)
    (tmp_path / "runs/one-run/recipe.yaml").touch()
    program = tmp_path / "bin/unipool"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m trainer "$@"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "dumb"}
    ours, theirs = pty.openpty()
    command = ["setsid", "--ctty", *START[name]]
    shell = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        typed = [SET_UP[name], *(f"{keys}\x01printf '<%s>' \x05; printf '.%s.\\n' end" for keys in KEYS)]
        said = ""
        for line in typed:
            os.write(ours, f"{line}\r".encode())
            if "\x01" in line:
                said += _read_until(ours, ".end.")
        assert re.findall(r"(<unipool>.*?)\.end\.", said) == list(KEYS.values()), said
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


def _read_until(terminal: int, wanted: str) -> str:
    said, deadline = "", time.monotonic() + TIME_LIMIT
    while wanted not in said:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, said
        said += os.read(terminal, 65536).decode(errors="replace")
    return said
