"""Weights & Biases without a network: what the real wandb writes, read back from its file."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from tests.tools import need_package
from tests.training import tiny
from trainer.common.errors import UserError
from trainer.engine import weights_and_biases
from trainer.engine.ds_config import deepspeed_config
from trainer.engine.weights_and_biases import WandbRun, wandb_run

BLOCK, HEADER = 32768, 7
"""Of the log format of LevelDB, in which wandb writes its records."""


def all_records(folder: Path) -> list[Any]:
    """The records of a run that has finished; wandb's process writes the last ones when it likes."""
    deadline = time.monotonic() + 120
    while True:
        found = list(records(folder))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def records(folder: Path) -> Iterator[Any]:
    """The records of the only file of wandb in a folder."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # whose names are made on import
    (file,) = folder.rglob("run-*.wandb")
    data, at, part = file.read_bytes(), HEADER, b""
    while at + HEADER < len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + HEADER])
        if at + HEADER + length > len(data):
            return  # it is still being written
        part += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = messages.Record()
            record.ParseFromString(part)
            part = b""
            yield record


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    need_package("wandb", "pip install wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(name, value)


def history(found: list[Any]) -> list[dict[str, Any]]:
    """What was logged, by step."""
    lines = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in line.item} for line in lines
    ]


@pytest.mark.usefixtures("offline")
def test_a_run_and_its_resume_are_one_run_with_all_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, ids = tiny(metrics={"wandb": "pools"}), []
    for done in (0, 2):
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / str(done)))
        (tmp_path / str(done)).mkdir()
        run = wandb_run(recipe, tmp_path, done)
        assert run
        for step in (done + 1, done + 2):
            run.log({"train/loss": 5.0 - step, "train/lr": 0.1, "train/load_imbalance": 2.0, "bad": float("nan")}, step)
        run.log({"eval/val_loss": 4.5}, done + 2)
        run.log_table("samples", ("step", "prompt", "text"), [(done + 2, "def", " f")], done + 2)
        run.log_image("load", np.zeros((2, 3, 3), np.uint8), done + 2)
        run.finish()
        found = all_records(tmp_path / str(done))
        (told,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
        assert told.project == "pools" and told.display_name == tmp_path.name
        config = {item.key: json.loads(item.value_json) for item in told.config.update}
        assert config["model"]["layers"] == 3 and config["train"]["lr"] == recipe.train.lr
        first, second = history(found)
        assert (first["_step"], first["train/loss"], first["train/lr"]) == (done + 1, 4.0 - done, 0.1)
        assert "bad" not in first and first["train/load_imbalance"] == 2.0
        assert (second["_step"], second["eval/val_loss"]) == (done + 2, 4.5)
        text = json.dumps(second)
        assert "table-file" in text and "image-file" in text
        ids.append(told.run_id)
    assert ids[0] == ids[1] == (tmp_path / weights_and_biases.ID_FILE).read_text()
    silent = Broken("nowhere", False)
    monkeypatch.setattr(weights_and_biases, "_wandb", lambda: silent)
    run = wandb_run(recipe, tmp_path, 0)
    assert run and (tmp_path / weights_and_biases.ID_FILE).read_text() != ids[0], (
        "a run that begins anew is another one"
    )
    run.finish()


class Broken:
    """A wandb of which some call fails or hangs."""

    def __init__(self, where: str, fails: bool):
        self._where, self._fails, self.logged = where, fails, 0

    def Settings(self, **_: Any) -> None:
        return

    def init(self, **_: Any) -> Broken:
        self._come_to("init")
        return self

    def define_metric(self, *_: Any, **__: Any) -> None:
        return

    def log(self, *_: Any, **__: Any) -> None:
        self.logged += 1
        self._come_to("log")

    def finish(self) -> None:
        self._come_to("finish")

    def _come_to(self, where: str) -> None:
        if where == self._where and self._fails:
            raise RuntimeError("no network\nand more")
        while where == self._where:
            time.sleep(0.01)


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize("fails", [True, False])
def test_a_wandb_that_fails_or_hangs_ends_nothing(
    where: str, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    broken, killed = Broken(where, fails), MagicMock(**{"name.return_value": "wandb-core"})
    other = MagicMock(**{"name.return_value": "python"})
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    own = MagicMock(**{"children.return_value": [killed, other]})
    monkeypatch.setattr("trainer.engine.weights_and_biases.psutil.Process", lambda: own)
    monkeypatch.setattr(weights_and_biases, "_wandb", lambda: broken)
    monkeypatch.setattr(weights_and_biases, "LAST_WAIT", 60.0 if fails else 0.2)
    monkeypatch.setattr(weights_and_biases, "WAITING", 5)
    run = WandbRun("pools", tmp_path, {}, 0)
    for step in range(9 if where != "finish" else 2):
        run.log({"train/loss": 1.0}, step)
    run.finish()
    assert killed.kill.called and not other.kill.called
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: Weights & Biases is off until the next start (")
    assert "no network)" in line or not fails or "does not keep up" in line


def test_it_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.engine.ds_config.find_spec", lambda name: None)
    with pytest.raises(UserError, match="metrics.wandb = pools: wandb is not installed: pip install wandb"):
        deepspeed_config(tiny(metrics={"wandb": "pools"}), "trunk", 1, 10)
    assert "wandb" not in deepspeed_config(tiny(), "trunk", 1, 10)
