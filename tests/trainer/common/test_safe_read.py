"""Files that are not text, wherever a text is expected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.trainer.fuzzing import JSON_TEXTS, user_error
from trainer.cluster.hostfile import find_node
from trainer.config.recipe import load_recipe, read_tree
from trainer.planning.hardware import find_hardware, load_profile
from trainer.planning.what_if import read_loads
from trainer.sweep.spec import load_sweep
from trainer.view.pages import targets


def test_files_that_are_no_text(tmp_path: Path) -> None:
    """Of every kind that a person may name, wherever a text is expected; nothing hangs."""
    good = (tmp_path / "good.yaml").resolve()
    good.write_text(yaml.safe_dump(read_tree("quickstart")))
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
        assert user_error(lambda path=path: load_recipe(str(path)))
        assert user_error(lambda path=path: load_sweep(str(path)))
        assert user_error(lambda path=path: find_node(load_recipe("quickstart"), path, 0, None, None))
        assert user_error(lambda path=path: load_profile(path))
        assert user_error(lambda path=path: find_hardware(str(path)))
        assert user_error(lambda path=path: read_loads(path, load_recipe("quickstart")))
        assert targets(path) == ([], "")
    marked = tmp_path / "marked.yaml"
    marked.write_bytes(b"\xef\xbb\xbf" + good.read_bytes())
    assert load_recipe(str(marked)) == load_recipe(str(good))


@pytest.mark.parametrize("text", JSON_TEXTS)
def test_texts_that_are_not_addresses(text: str, tmp_path: Path) -> None:
    (tmp_path / "targets.json").write_bytes(text.encode(errors="surrogatepass"))
    assert targets(tmp_path) == ([], "")
