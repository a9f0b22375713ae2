"""`unipool init`: the file says what its keys mean, is the recipe that it was made from, and fits the devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from trainer.cli import cli
from trainer.common.errors import UserError
from trainer.common.gpus import Gpu, GpuFacts
from trainer.config.key_errors import sections_in
from trainer.config.recipe import Recipe, load_recipe, recipe_names
from trainer.config.starter import SHOWN, start_from


def written(text: str, folder: Path) -> Recipe:
    (folder / "made.yaml").write_text(text)
    return load_recipe(str(folder / "made.yaml"))


@pytest.mark.parametrize("base", recipe_names())
def test_it_is_the_recipe_that_it_was_made_from(base: str, tmp_path: Path) -> None:
    own = load_recipe(base, ["run.dir=runs/x"])
    every = own.checkpoint.every or own.train.steps // 4
    made = written(start_from(base, "runs/x", None, gpus=None, ranks=None), tmp_path)
    assert made == own.model_copy(update={"checkpoint": own.checkpoint.model_copy(update={"every": every})})


def test_every_key_stands_below_its_meaning() -> None:
    lines = start_from("quickstart", "runs/x", None, None, None).splitlines()
    assert max(map(len, lines)) <= 120
    for section, names in SHOWN.items():
        model = next(sections_in(Recipe.model_fields[section].annotation))
        place = lines.index(f"{section}:")
        for name in names:
            place = next(i for i in range(place, len(lines)) if lines[i].startswith(f"  {name}: "))
            comment, above = [], place - 1
            while lines[above].startswith("  # "):
                comment.insert(0, lines[above].removeprefix("  # "))
                above -= 1
            assert " ".join(comment) == model.model_fields[name].description


@pytest.mark.parametrize("base", ["quickstart", "small", "unipool-lock-830m", "dense-182m"])
@pytest.mark.parametrize("number", [1, 3, 8, 48])
def test_ranks_divide_the_batch(base: str, number: int, tmp_path: Path) -> None:
    own = load_recipe(base)
    made = written(start_from(base, "runs/x", None, gpus=number, ranks=None), tmp_path)
    assert (made.grid.world_size, made.grid.colocated, made.train.precision) == (number, True, "bf16")
    assert own.train.global_batch <= made.train.global_batch < own.train.global_batch + number
    assert made.train.micro_batch <= own.train.micro_batch
    on_cpu = written(start_from(base, "runs/x", None, gpus=None, ranks=number), tmp_path)
    assert (on_cpu.grid.world_size, on_cpu.train.precision) == (number, own.train.precision)


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "it's: a # text.txt").write_text("text")
    source = str(tmp_path / "it's: a # text.txt")
    assert written(start_from("small", "runs/x", source, None, None), tmp_path).data.source == source
    assert written(start_from("mid", "runs/x", None, None, None), tmp_path).data == load_recipe("mid").data
    with pytest.raises(UserError, match=r"--source .*none: there is no such file or folder"):
        start_from("small", "runs/x", str(tmp_path / "none"), None, None)


def test_recipes_are_listed_with_a_sentence_each() -> None:
    lines = CliRunner().invoke(cli, ["recipes"]).output.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert [line for line in lines if not line.endswith(".") or len(line.split()) < 5] == []
    assert len({line.partition(" ")[2] for line in lines}) == len(lines)


def init(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["init", *arguments])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = init("mine")
    assert done.exit_code == 0 and "mine.yaml: quickstart, for the CPU (" in done.output
    assert "unipool train mine.yaml " in done.output and load_recipe("mine.yaml").run.dir == "runs/mine"
    (tmp_path / "mine.yaml").write_text("precious")
    for arguments, message in (
        (["mine.yaml"], "mine.yaml: exists already"),
        (["none/mine"], "none/mine.yaml: there is no folder none"),
        (["other", "--from", "quikstart"], "did you mean: quickstart"),
        ([""], "NAME '': is no name of a file"),
        (["none/.."], "NAME 'none/..': is no name of a file"),
    ):
        failed = init(*arguments)
        assert isinstance(failed.exception, UserError) and message in str(failed.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "precious"
    gpus = tuple(Gpu("NVIDIA H200", f"GPU-{number}", str(number)) for number in range(2))
    monkeypatch.setattr("trainer.common.gpus.look", lambda: GpuFacts(gpus, torch.__version__))
    assert "for 2 GPUs" in init("mine", "--force").output
    assert load_recipe("mine.yaml").parallel.trunk_ranks == 2
