"""Files that others may have put where we read: pipes, devices, and files far larger than what they stand for."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.distributed import TIME_LIMIT
from tests.trainer.fuzzing import user_error
from tests.trainer.made_up import write_run
from trainer.checkpoint import format as checkpoint
from trainer.common.safe_read import LARGEST_ARRAY, LARGEST_TOKENIZER, read_array, read_tensors, refuse_unreadable
from trainer.config.recipe import Recipe, load_recipe
from trainer.data.packing import SplitRows
from trainer.data.prepared_data import open_prepared
from trainer.data.reading.content import Content
from trainer.data.status import Status
from trainer.data.tokenizer import chat_settings, load_tokenizer, train_tokenizer
from trainer.export.folder import StoredTensors, read_object
from trainer.export.hub.curves import read_curves
from trainer.importing.families import read_config
from trainer.planning.schedule import schedule_of
from trainer.probe.adapters import load
from trainer.telemetry.run_folder import RunFolder
from trainer.view.pages import targets
from trainer.view.records import Records, facts_of
from trainer.view.report.page import make_page

ROOT = Path(__file__).parents[3]
SECONDS = int(TIME_LIMIT)
MEGABYTES = 400  # less than the large file has

ELSEWHERE = {
    "bench/measure": "/proc",
    "cluster/launch": "/proc",
    "cluster/liveness": "/proc",
    "common/gpus": "/proc",
    "common/machine": "/proc and /sys",
    "doctor/network": "/sys",
    "common/atomic": "what was just written, to flush it",
    "train/profiling/profile": "what the profiler has just written",
    "config/recipe": "the recipes that come with the trainer",
    "doctor/software": "the list of versions that comes with the trainer",
    "engine/ds_config": "the configurations that come with the trainer",
    "export/write": "the model that comes with the trainer",
    "sweep/spec": "the sweeps that come with the trainer",
    "view/report/parts": "the templates that come with the trainer",
    "export/folder": "weights, after a look at what they are",
    "probe/adapters": "a folder that has been looked at",
}
"""Modules that read files without `safe_read`, and which these are."""

READERS = {"read_text", "read_bytes", "open", "from_file", "fromfile", "memmap", "safe_open", "torch.load"}
NOT_OF_PATHS = {"self.open", "content.open", "opener.open", "_opener.open", "gzip.open"}


def reads_a_path(call: ast.Call) -> bool:
    """Whether a call opens a file to read it, other than the null device, without `safe_read`."""
    function = ast.unparse(call.func)
    name = function if function == "torch.load" else function.rpartition(".")[2]
    if name not in READERS or function in NOT_OF_PATHS or function in ("read_text", "read_bytes"):
        return False
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    written = name == "open" and {"wb", "ab", "w", "r+b"} & set(modes)
    return not written and "devnull" not in ast.unparse(call) and "if saved is None" not in ast.unparse(call)


def test_every_file_is_opened_in_one_place() -> None:
    """`safe_read` refuses pipes and devices and limits sizes; what else is opened is named above, with the reason."""
    found = set()
    for package in ("trainer", "pool", "router"):
        for path in (ROOT / package).rglob("*.py"):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            if any(map(reads_a_path, calls)):
                found.add(str(path.relative_to(ROOT / package).with_suffix("")))
    assert found - {"common/safe_read"} == ELSEWHERE.keys()


@contextmanager
def bounded() -> Iterator[None]:
    """Fail after `SECONDS`, or if the process needs more than `MEGABYTES` of memory in addition."""

    def stop(*_: object) -> None:
        raise AssertionError(f"it still reads after {SECONDS} s")

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEGABYTES * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def replaced(file: Path, kind: str) -> Path:
    """Put a pipe, a link to an endless device, or a file of 512 MB in the place of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as opened:
            opened.truncate(LARGEST_TOKENIZER * 2)
    return file


kinds = pytest.mark.parametrize("kind", ["pipe", "device", "large"])


def tokenizer_in(folder: Path) -> str:
    """The name of a folder with a small tokenizer.json."""
    (folder / "tokenizer.json").write_text(train_tokenizer(["some text"], 300).to_str())
    return str(folder)


@kinds
@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("config.json", lambda folder: read_object(folder / "config.json")),
        ("config.json", lambda folder: read_config(folder)),
        ("plan.json", lambda folder: schedule_of(load_recipe("quickstart"), folder / "plan.json", resume=True)),
        ("metrics.jsonl", lambda folder: RunFolder(run_in(folder)).begin(run_in(folder), "{}", "", {}, 0)),
        ("ownership.json", checkpoint.read_ownership),
        ("layout.json", checkpoint.read_info),
        ("facts.json", open_prepared),
        ("model.safetensors", StoredTensors),
        ("mp_rank_00_model_states.pt", lambda folder: read_tensors(folder / "mp_rank_00_model_states.pt")),
        ("model.safetensors.index.json", refuse_unreadable),
        ("additional_chat_templates/a.jinja", refuse_unreadable),
    ],
)
def test_a_file_is_refused(file: str, read: Callable[[Path], Any], kind: str, tmp_path: Path) -> None:
    """In one line that names it. Weights may be large, and records are read line by line."""
    if kind == "large" and file.endswith(".pt"):
        return
    replaced(tmp_path / file, kind)
    with bounded():
        said = user_error(lambda: read(tmp_path))
    if kind == "large" and file.endswith(".jsonl"):
        assert said is None
    else:
        assert said and (file in said or str(tmp_path) in said)


def run_in(folder: Path) -> Recipe:
    return load_recipe("quickstart", [f"run.dir={folder}"])


@kinds
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_tokenizer_is_refused(file: str, kind: str, tmp_path: Path) -> None:
    """Pipes and devices count as no file, so that the tokenizer is missing or says nothing of its end."""
    tokenizer_in(tmp_path)
    replaced(tmp_path / file, kind)
    with bounded():
        said = user_error(lambda: load_tokenizer(str(tmp_path)))
        also = user_error(lambda: chat_settings(str(tmp_path)))
    if kind == "large":
        assert said and file in said and "larger than" in said
    else:
        assert (said is None) == (file != "tokenizer.json")
    assert also is None or file in also


@kinds
def test_a_run_is_shown_without_it(kind: str, tmp_path: Path) -> None:
    """By the commands that look at runs, which also show what is left of a damaged one; and it starts again."""
    run = write_run(tmp_path / "run", 12)
    for file in ("targets.json", "plan.json", "recipe.yaml", "ownership.json", "load.npy"):
        replaced(run / file, kind)
    with bounded():
        records = Records(run)
        records.read()
        assert len(records.steps) == 12 and "<html" in make_page(run)
        assert targets(run) == ([], "") and facts_of(run_in(run), run)["lanes"] == ""
        RunFolder(run_in(run)).begin(run_in(run), "{}", "", {}, 12)
    replaced(run / "metrics.jsonl", kind)
    with bounded():
        records.read()
        assert not Records(run).steps and not read_curves(run, 12)["loss"].steps


@kinds
def test_an_array_is_refused(kind: str, tmp_path: Path) -> None:
    file = replaced(tmp_path / "load.npy", kind)
    if kind == "large":
        np.lib.format.open_memmap(file, "w+", np.int64, (LARGEST_ARRAY // 8 + 1,)).flush()
    with bounded(), pytest.raises(ValueError, match="not a regular file" if kind != "large" else "larger than 1 GiB"):
        read_array(file)


@kinds
def test_other_files(kind: str, tmp_path: Path) -> None:
    """The status of a preparation, rows of tokens, a checkpoint's files, and a model that a library would read."""
    with bounded():
        assert Status.read(replaced(tmp_path / "status.json", kind)) is None
        with pytest.raises((OSError, ValueError)):
            SplitRows(replaced(tmp_path / "train.arrow", kind), 256)
        for name in (checkpoint.MARKER_FILE, checkpoint.MANIFEST_FILE, checkpoint.LAYOUT_FILE):
            folder = tmp_path / f"without {name}"
            folder.mkdir()
            manifest = b'{"steps": 1, "files": {}}'
            (folder / checkpoint.MANIFEST_FILE).write_bytes(manifest)
            (folder / checkpoint.MARKER_FILE).write_text(hashlib.sha256(manifest).hexdigest())
            replaced(folder / name, kind)
            assert str(checkpoint.damage(folder)).startswith(f"{name} cannot be read")
        if kind != "large":  # the text of a source may have any size
            with pytest.raises(OSError, match="not a regular file"):
                Content(replaced(tmp_path / "text.txt", kind))
        model = tmp_path / "model"
        replaced(model / "tokenizer_config.json", kind)
        (model / "config.json").write_text('{"model_type": "olmoe"}')
        assert f"{model / 'tokenizer_config.json'}: cannot be read" in str(user_error(lambda: load(str(model), False)))


def test_a_file_that_a_checkpoint_lists_is_a_pipe(tmp_path: Path) -> None:
    """A pipe has no bytes by `stat`, as the manifest says."""
    os.mkfifo(tmp_path / "recipe.yaml")
    about = {"layout": {"ranks": [1, 1, 1], "zero": [1, 1], "placement": None}, "data": "", "steps": 1}
    (tmp_path / "layout.json").write_text(json.dumps({**about, "micro_batches": 1}))
    listed = {path.name: {"bytes": path.stat().st_size, "sha256": ""} for path in tmp_path.iterdir()}
    (tmp_path / "manifest.json").write_text(json.dumps({"steps": 1, "files": listed}))
    (tmp_path / "COMPLETE").write_text(hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest())
    with bounded():
        found = checkpoint.damage(tmp_path, lambda names: ["recipe.yaml"])
    assert found == "recipe.yaml cannot be read (not a regular file)"
