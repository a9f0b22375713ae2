"""A damaged checkpoint is set aside, or one line says what is wrong; nothing else happens."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pool.placement import contiguous
from tests.trainer.fuzzing import JSON_TEXTS, YAML, changed, fuzz, json_values, user_error
from tests.training import tiny
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint import resume
from trainer.config.recipe import save_recipe
from trainer.view.records import recorded_load


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after steps 1 and 2, with all that is read before the weights are."""
    checkpoints, recipe = tmp_path_factory.mktemp("saved") / "checkpoints", tiny()
    for steps in (1, 2):
        folder = checkpoint.folder_of(checkpoints, steps)
        (folder / "trunk").mkdir(parents=True)
        (folder / "trunk" / "rank_0.pt").write_bytes(b"weights")
        save_recipe(recipe, folder / checkpoint.RECIPE_FILE)
        layout = checkpoint.layout_of(recipe, contiguous(recipe.pool.experts, 1, 1)).model_dump()
        about = {"layout": layout, "data": "", "steps": steps, "updates": steps, "micro_batches": recipe.micro_batches}
        (folder / checkpoint.LAYOUT_FILE).write_text(json.dumps(about))
        np.save(folder / checkpoint.LOAD_FILE, np.ones((recipe.model.layers, recipe.pool.experts), dtype=np.int64))
        seal(folder)
    return checkpoints


def seal(folder: Path) -> None:
    """Make manifest and marker fit the files that are there, as somebody may who changes one."""
    files = {}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = str(path.relative_to(folder))
        if name not in (checkpoint.MANIFEST_FILE, checkpoint.MARKER_FILE):
            content = path.read_bytes()
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / checkpoint.MANIFEST_FILE).write_text(json.dumps({"steps": 2, "files": files}))
    mark(folder)


def mark(folder: Path) -> None:
    manifest = (folder / checkpoint.MANIFEST_FILE).read_bytes()
    (folder / checkpoint.MARKER_FILE).write_text(hashlib.sha256(manifest).hexdigest())


def alone() -> Any:
    """A job of one rank, as far as `resume.choose` asks it."""
    return SimpleNamespace(
        rank=0,
        topology=SimpleNamespace(world_size=1),
        shared=SimpleNamespace(
            broadcast=lambda _key, make: make(),
            put=lambda _key, text: said.append(text),
            gather=lambda _key: [said[-1]],
        ),
        barrier=lambda: None,
        sum_over_ranks=lambda sums: list(sums),
    )


said: list[str] = []


def read_all(checkpoints: Path) -> None:
    """What a resume, an export and a watcher read of the checkpoint that they choose, short of the weights."""
    recipe = tiny()
    resume.early_check(recipe, checkpoints, force=False)
    found = resume.choose(alone(), recipe, checkpoints, force=False)
    assert found, "there are checkpoints"
    _, folder = found
    resume.check_data(recipe, folder, "", force=False)
    checkpoint.choose_placement(tiny(pool={"experts": 8, "placement": "auto"}), folder)
    checkpoint.read_placement(folder)
    checkpoint.weights_of(folder)
    recorded_load(checkpoints.parent)


FILES = (
    checkpoint.LAYOUT_FILE,
    checkpoint.MANIFEST_FILE,
    checkpoint.MARKER_FILE,
    checkpoint.RECIPE_FILE,
    checkpoint.LOAD_FILE,
)
texts = st.one_of(
    st.sampled_from(JSON_TEXTS), st.binary(max_size=40), st.sampled_from([YAML["laughs"], YAML["in itself"]])
)


@fuzz(80)
@given(st.sampled_from(FILES), st.booleans(), st.booleans(), st.randoms(use_true_random=False), json_values, texts)
def test_checkpoints(
    saved: Path,
    tmp_path_factory: pytest.TempPathFactory,
    file: str,
    sealed: bool,
    any_text: bool,
    chosen: random.Random,
    value: Any,
    text: str | bytes,
) -> None:
    """A file of the newest altered, its checksums too or not: the one before is taken, or one line says why not."""
    checkpoints = tmp_path_factory.getbasetemp() / "fuzzed" / "checkpoints"
    shutil.rmtree(checkpoints.parent, ignore_errors=True)
    shutil.copytree(saved, checkpoints)
    newest = checkpoint.folder_of(checkpoints, 2)
    content = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    if file.endswith(".json") and not any_text:
        tree = changed(json.loads((newest / file).read_text()), chosen, value)
        content = json.dumps(tree).encode()
    elif file == checkpoint.RECIPE_FILE and not any_text:
        content = yaml.safe_dump(changed(yaml.safe_load((newest / file).read_text()), chosen, value)).encode()
    elif file == checkpoint.LOAD_FILE and not any_text:
        bent = bytearray((newest / file).read_bytes())
        for _ in range(chosen.randint(1, 4)):
            bent[chosen.randrange(min(len(bent), 128))] = chosen.randrange(256)
        content = bytes(bent)
    (newest / file).write_bytes(content)
    if sealed and file == checkpoint.MANIFEST_FILE:
        mark(newest)
    elif sealed and file != checkpoint.MARKER_FILE:
        seal(newest)
    user_error(lambda: read_all(checkpoints))


def test_damage_that_is_sealed_is_set_aside(saved: Path, tmp_path: Path) -> None:
    """A layout that is none: the checkpoint before is used."""
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(saved, checkpoints)
    newest = checkpoint.folder_of(checkpoints, 2)
    (newest / "layout.json").write_text("{}")
    seal(newest)
    assert checkpoint.damage(newest) == "layout.json has unexpected content (layout)"
    read_all(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["damaged_step_00000002", "step_00000001"]
