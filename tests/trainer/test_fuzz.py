"""Whatever a person writes, or leaves damaged, ends in one line: recipes, --set, sweeps, profiles, hosts, checkpoints.

Fixed examples and the few that hypothesis makes of a fixed seed run always; UNIPOOL_FUZZ=10 makes ten times as many, of
another seed each time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pool.placement import contiguous
from tests.training import tiny
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint import resume
from trainer.cluster.hostfile import find_node
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe, check_recipe, load_recipe, read_tree, save_recipe
from trainer.planning.hardware import find_hardware, load_profile
from trainer.planning.report import make_cost_report
from trainer.planning.schedule import schedule_of
from trainer.planning.what_if import read_loads
from trainer.sweep.spec import load_sweep
from trainer.view.pages import targets
from trainer.view.records import recorded_load

TIMES = int(os.environ.get("UNIPOOL_FUZZ", "0"))


def fuzz(examples: int) -> Callable[[Any], Any]:
    """So many examples; no time limit for one, as machines differ."""
    return settings(
        max_examples=examples * max(1, TIMES),
        derandomize=not TIMES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def one_line(act: Callable[[], Any]) -> str | None:
    """What a UserError says; nothing else may come out. None without one."""
    try:
        act()
    except UserError as error:
        text = str(error)
        assert text and len(text.splitlines()) == 1 and len(text) <= 2000
        text.encode()
        return text
    return None


QUICKSTART = read_tree("quickstart")
KEYS = [f"{section}.{key}" for section, model in Recipe.model_fields.items() for key in model.annotation.model_fields]
ODD = [
    "",
    " ",
    "\n",
    "\0",
    "\x7f",
    "\ud800",
    "\u2028",
    "x" * 5000,
    "a/b",
    "~",
    "null",
    "nan",
    "1e400",
    ".inf",
    "0x10",
    "é🙂",
]
odd_text = st.one_of(st.sampled_from(ODD), st.text(max_size=8))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 10**30, 10**400]),
    st.sampled_from([0.0, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, 0.5, -1.5]),
    st.integers(-5, 5000),
    odd_text,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(odd_text, inner, max_size=3)),
    max_leaves=5,
)
keys = st.one_of(st.sampled_from(KEYS), st.sampled_from(list(Recipe.model_fields)), odd_text)


@fuzz(100)
@given(st.lists(st.tuples(keys, values), min_size=1, max_size=4), st.booleans())
@example([("train.lr", math.nan)], False)
@example([("train.lr", math.inf)], False)
@example([("model.rope_base", 1e308)], True)
@example([("model.layers", 10**400)], False)
@example([("run.dir", "a\nb")], False)
@example([("run.dir", "")], False)
@example([("data.text_field", "\ud800")], False)
@example([("a\nb", 1)], False)
@example([("train", [1])], False)
@example([("parallel.trunk_ranks", 2**62)], False)
def test_trees_of_recipes(settings: list[tuple[str, Any]], whole: bool) -> None:
    """Keys set in a good recipe, or a tree of nothing else; a recipe that passes has a plan and comes back equal."""
    checked: list[Recipe] = []

    def check() -> None:
        checked.append(check_recipe(QUICKSTART if whole else {}, settings, "recipe x"))

    if whole and one_line(check) is None:
        text = yaml.safe_dump(checked[0].model_dump(mode="json"))
        assert Recipe.model_validate(yaml.safe_load(text)) == checked[0]
        assert all(
            math.isfinite(v) for s in checked[0].model_dump().values() for v in s.values() if isinstance(v, float)
        )
    elif not whole:
        assert one_line(check)


YAML = {
    "deep": "[" * 100_000,
    "deep mappings": "{a: " * 20_000,
    "indented": "".join(" " * i + "a:\n" for i in range(45)),
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "merged laughs": "a: &a {x: 1}\n"
    + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "in itself": "a: &a [*a]",
    "twice": "run: {dir: a}\nrun: {dir: b}",
    "twice inside": "run: {dir: a, dir: b}",
    "two documents": "a: 1\n---\nb: 2",
    "a date": "run: {dir: 2026-13-45}",
    "a tag": "run: !!python/object/apply:os.system [ls]",
    "a tag that does not fit": "train: {steps: !!int many}",
    "a bool that is none": "train: {steps: !!bool many}",
    "digits": f"train: {{steps: {'9' * 5000}}}",
    "list as key": "? [1, 2]\n: 3",
    "mapping as key": "? {a: 1}\n: 3",
    "number as key": "1: 2",
    "null as key": "~: 2",
    "no alias": "a: *b",
    "a half": 'run: {dir: "\\ud800"}',
    "null byte": 'run: {dir: "a\\0b"}',
    "control": "a: \x01",
    "tabs": "a:\n\t- b",
    "empty": "",
    "only a comment": "# nothing",
    "a scalar": "train",
    "a list": "- run",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_nobody_means(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(YAML[name], encoding="utf-8")
    assert one_line(lambda: load_recipe(str(file)))
    assert one_line(lambda: load_sweep(str(file)))
    if name not in ("empty", "only a comment", "two documents"):
        one_line(lambda: load_recipe("quickstart", [f"run={YAML[name]}"]))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    """Of every kind that a person may name, wherever a text is expected; nothing hangs."""
    good = (tmp_path / "good.yaml").resolve()
    good.write_text(yaml.safe_dump(QUICKSTART))
    bad = {name: tmp_path / name for name in ("folder", "pipe", "dangling", "binary", "utf16", "large", "loop")}
    bad["folder"].mkdir()
    os.mkfifo(bad["pipe"])
    bad["dangling"].symlink_to(tmp_path / "nowhere")
    bad["loop"].symlink_to(bad["loop"])
    bad["binary"].write_bytes(bytes(range(256)))
    bad["utf16"].write_bytes(good.read_text().encode("utf-16"))
    with bad["large"].open("wb") as file:
        file.truncate(2**33)
    bad |= {
        "long": tmp_path / ("x" * 300),
        "under a file": good / "x",
        "null": Path("a\0b"),
        "device": Path("/dev/zero"),
    }
    for path in bad.values():
        assert one_line(lambda path=path: load_recipe(str(path)))
        assert one_line(lambda path=path: load_sweep(str(path)))
        assert one_line(lambda path=path: find_node(load_recipe("quickstart"), path, 0, None, None))
        assert one_line(lambda path=path: load_profile(path))
        assert one_line(lambda path=path: find_hardware(str(path)))
        assert one_line(lambda path=path: read_loads(path, load_recipe("quickstart")))
        assert targets(path) == ([], "")
    marked = tmp_path / "marked.yaml"
    marked.write_bytes(b"\xef\xbb\xbf" + good.read_bytes())
    assert load_recipe(str(marked)) == load_recipe(str(good))


@fuzz(100)
@given(st.one_of(st.tuples(keys, odd_text).map("=".join), odd_text, st.text("=.[]{}:,&*!|>'\"%@` \n-", max_size=12)))
@example("")
@example("=")
@example(".=1")
@example("a..b=1")
@example("run=1")
@example("run.dir.x=1")
@example(f"run.dir={'[' * 3000}")
@example("train.lr=.nan")
@example("train.lr=1e400")
@example("train.steps=*a")
def test_set(text: str) -> None:
    one_line(lambda: load_recipe("quickstart", [text]))


SWEEP = yaml.safe_load("{base: quickstart, baseline: a, variants: {a: {}, b: {train.lr: 1.0e-3}}, seeds: [0]}")


@fuzz(40)
@given(
    st.dictionaries(
        st.sampled_from(["dir", "base", "set", "variants", "baseline", "grid", "seeds"]),
        st.one_of(
            values, st.dictionaries(keys, values, max_size=2), st.dictionaries(odd_text, st.dictionaries(keys, values))
        ),
        min_size=1,
        max_size=2,
    )
)
@example({"grid": {"train.lr": [math.nan, math.nan]}})
@example({"grid": {"train.lr, train.min_lr": [[1]]}})
@example({"variants": {"a": None}})
@example({"base": {"run": None}})
@example({"base": "a\0b"})
@example({"base": "x" * 300})
@example({"seeds": [10**30]})
@example({"dir": "\ud800"})
@example({"dir": ""})
def test_sweeps(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "sweep.yaml"
    file.write_text(yaml.safe_dump(SWEEP | changes))
    one_line(lambda: load_sweep(str(file)))


HARDWARE = json.loads(json.dumps(find_hardware("h100").__dict__, default=vars))
PROFILE = {"hardware": HARDWARE, "figures": []}
json_values = st.recursive(
    st.one_of(scalars, st.sampled_from([1e-300, 1e300, 10**300])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(odd_text, inner, max_size=3)),
    max_leaves=4,
)


def changed(tree: Any, chosen: random.Random, value: Any) -> Any:
    """The tree with one value, somewhere, replaced or left out."""
    if not isinstance(tree, dict | list) or not tree or chosen.random() < 0.2:
        return value
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    place = chosen.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    if chosen.random() < 0.15:
        del copy[place]
    else:
        copy[place] = changed(tree[place], chosen, value)
    return copy


JSON_TEXTS = [
    "",
    "[",
    "null",
    "3",
    "[]",
    "{}",
    "NaN",
    '{"a": NaN}',
    "[" * 100_000,
    '{"a":' * 50_000,
    "9" * 5000,
    "\ud800",
    '"',
]


@fuzz(60)
@given(st.randoms(use_true_random=False), json_values)
def test_hardware_profiles(tmp_path_factory: pytest.TempPathFactory, chosen: random.Random, value: Any) -> None:
    """A profile that passes predicts a step, or is refused with the recipe."""
    file = tmp_path_factory.getbasetemp() / "profile.json"
    file.write_text(json.dumps(changed(PROFILE, chosen, value)), encoding="utf-8", errors="surrogatepass")
    one_line(lambda: make_cost_report(load_recipe("quickstart", [f"parallel.hardware={json.dumps(str(file))}"])))
    one_line(lambda: find_hardware(str(file)))


@pytest.mark.parametrize("number", range(len(JSON_TEXTS)))
def test_texts_that_are_no_profile_and_no_plan(number: int, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(JSON_TEXTS[number].encode(errors="surrogatepass"))
    assert one_line(lambda: load_profile(file))
    assert one_line(lambda: schedule_of(tiny(), file, resume=True))
    (tmp_path / "targets.json").write_bytes(file.read_bytes())
    assert targets(tmp_path) == ([], "")


@fuzz(60)
@given(st.one_of(odd_text, st.text("ab slot=0123#\n\t \0", max_size=30)), st.one_of(st.none(), st.integers(-3, 3)))
@example("a slots=²\n", 0)
@example("a slots=99999999999999999999\n", 0)
@example(f"a slots={'9' * 5000}\n", 0)
@example("a\x85slots=2\n", 0)
@example("a slots=0\nb slots=2\n", 0)
def test_hostfiles(tmp_path_factory: pytest.TempPathFactory, text: str, node_rank: int | None) -> None:
    file = tmp_path_factory.getbasetemp() / "hosts"
    file.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    one_line(lambda: find_node(load_recipe("quickstart"), file, node_rank, None, None))


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
        agree=lambda _key, make: make(),
        barrier=lambda: None,
        sum_over_ranks=lambda sums: list(sums),
        publish=lambda _key, text: said.append(text),
        look_up=lambda _key: [said[-1]],
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
    one_line(lambda: read_all(checkpoints))


def test_damage_that_is_sealed_is_set_aside(saved: Path, tmp_path: Path) -> None:
    """A layout that is none: the checkpoint before is used."""
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(saved, checkpoints)
    newest = checkpoint.folder_of(checkpoints, 2)
    (newest / "layout.json").write_text("{}")
    seal(newest)
    assert checkpoint.damage(newest) == "layout.json is not one (layout)"
    read_all(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["damaged_step_00000002", "step_00000001"]


def test_loads_that_promise_more_than_they_hold(tmp_path: Path) -> None:
    """A header of a terabyte, an empty file, a pickle, an archive."""
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (8, 12500000000), }".ljust(117) + b"\n"
    contents = {
        "huge": b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header,
        "empty": b"",
        "deep": b"\x93NUMPY\x01\x00" + (2000).to_bytes(2, "little") + b"(" * 2000,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=np.ones(3))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.save(tmp_path / "negative.npy", np.full((8, 64), -1))
    np.save(tmp_path / "floats.npy", np.full((8, 64), np.nan))
    for file in tmp_path.iterdir():
        text = one_line(lambda file=file: read_loads(file, load_recipe("quickstart")))
        assert text and text.startswith(f"--loads {file}: "), text
