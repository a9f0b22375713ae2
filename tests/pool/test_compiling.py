"""Where what is compiled is kept, and that a compiled function is one graph for all sizes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

from pool import compiling, grouped_experts

VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    compiling._set_cache_folders.cache_clear()
    compiling.compiled.cache_clear()
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that it is as before afterwards
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    compiling._set_cache_folders.cache_clear()
    compiling.compiled.cache_clear()


def folders() -> list[str]:
    compiling.compiled(grouped_experts.swiglu, dynamic=True)
    return [os.environ[variable] for variable in VARIABLES]


def test_the_users_cache_folder(tmp_path: Path) -> None:
    assert folders() == [str(tmp_path / "cache" / name) for name in ("torchinductor", "triton")]
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_torchs_default_is_not_taken_for_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == os.environ[VARIABLES[0]] and Path(cache_dir()).parent == Path(tempfile.gettempdir())
    assert folders()[0] == str(tmp_path / "cache" / "torchinductor")


def test_folders_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, f"/chosen/{variable}")
    assert folders() == [f"/chosen/{variable}" for variable in VARIABLES]


def test_a_folder_of_its_own_where_the_users_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (home,) = {Path(folder).parent for folder in folders()}
    assert home.parent == tmp_path and home.stat().st_mode & 0o777 == 0o700
    (line,) = caplog.messages
    assert str(home) in line and "XDG_CACHE_HOME" in line


@pytest.mark.parametrize("function", [grouped_experts.swiglu, grouped_experts.swiglu_backward])
def test_the_experts_functions_are_one_graph_for_any_number_of_rows(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one for a single row, which is not compiled on a GPU; in both the widths are numbers."""
    torch._dynamo.reset()  # there is a limit to how often a function is compiled, and other tests have compiled it
    graphs: list[torch.fx.GraphModule] = []
    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, options, **how: compile_(f, backend=lambda g, _: graphs.append(g) or g, **how),  # type: ignore[func-returns-value]
    )
    compiled = compiling.compiled(function, dynamic=True)
    for rows in (7, 130, 16, 8, 2, 1, 1, 3):
        arguments = [torch.randn(rows, 16), torch.randn(rows, 8)][: function.__code__.co_argcount]
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    assert len(graphs) == 2
    for graph, rows_are in zip(graphs, (torch.SymInt, int), strict=True):
        values = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
        assert [(type(rows), type(width)) for rows, width in shapes] == [
            (rows_are, int)
        ] * function.__code__.co_argcount
    torch._dynamo.reset()
