"""Commands in documents and help texts: they parse, their recipes are valid, and the cheap ones are run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.docs.markdown import DOCUMENTS, ROOT, shell_lines, trainer_commands
from tests.trainer.made_up import write_run
from trainer.cli import cli
from trainer.config.recipe import load_recipe, recipe_names
from trainer.sweep.spec import load_sweep

PLACEHOLDER = re.compile(r"[A-Z_]+(\.\w+)?|my\.yaml|([\w-]+/)*recipe\.yaml")
"""Recipes, numbers and the like that a reader replaces."""


def _leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from _leaves(child, (*path, name))
    else:
        yield path, command


def _help_examples() -> Iterator[tuple[str, list[str]]]:
    for path, command in _leaves(cli):
        for line in (command.help or "").splitlines():
            if line.strip().startswith(("unipool ", "deepspeed ", "torchrun ")):
                for arguments in trainer_commands(line):
                    yield f"unipool {' '.join(path)} --help", arguments


def _documented() -> Iterator[tuple[str, list[str]]]:
    for document in DOCUMENTS:
        for line in shell_lines(document):
            for arguments in trainer_commands(line):
                yield document, arguments


COMMANDS = [*_documented(), *_help_examples()]
RUN = [arguments for _, arguments in COMMANDS if arguments[0] in ("recipes", "plan", "report", "own")]
RUN = [arguments for arguments in RUN if not {"h100.json", "--loads"} & {*arguments}]  # need a profile, a checkpoint
RUN += [arguments for _, arguments in COMMANDS if arguments[0] == "watch" and ":" not in arguments[1]]
RUN += [arguments for _, arguments in COMMANDS if {"--list", "--write-recipes"} & {*arguments}]
RUN = [list(unique) for unique in dict.fromkeys(map(tuple, RUN)) if not any(map(PLACEHOLDER.fullmatch, unique[1:]))]


def parsed(arguments: list[str]) -> tuple[click.Command, dict[str, object]]:
    """The command that the arguments name and the values of its parameters; files need not exist.

    Raises:
        click.UsageError: The command, an option or a value does not exist, or an argument is missing.
    """
    command: click.Command = cli
    context = click.Context(cli, info_name="unipool")
    while isinstance(command, click.Group):
        if not arguments:
            raise click.UsageError("a command is missing", context)
        name, command, arguments = command.resolve_command(context, arguments)
        assert command is not None
        context = click.Context(command, info_name=name, parent=context)
    values, rest, _ = command.make_parser(context).parse_args(args=list(arguments))
    assert not rest, rest
    for parameter in command.params:
        given = [value for value in _as_list(values.get(parameter.name or "")) if isinstance(value, str)]
        if parameter.required and not given:
            raise click.MissingParameter(ctx=context, param=parameter)
        if not isinstance(parameter.type, click.Path):
            for value in given:
                if not PLACEHOLDER.fullmatch(value):
                    parameter.type.convert(value, parameter, context)
    return command, values


def _as_list(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize(("where", "arguments"), COMMANDS, ids=[" ".join(arguments)[:80] for _, arguments in COMMANDS])
def test_a_command_parses(where: str, arguments: list[str]) -> None:
    _, values = parsed(arguments)
    recipe, sweep = values.get("recipe"), values.get("sweep")
    if isinstance(recipe, str) and not PLACEHOLDER.fullmatch(recipe):
        assert recipe in recipe_names()
        load_recipe(recipe, [text for text in _as_list(values.get("overrides")) if isinstance(text, str)])
    if isinstance(sweep, str) and "/" not in sweep:
        load_sweep(sweep)


def test_there_are_commands_to_check() -> None:
    """All commands stand in the documents, in README's table, and have an example in their help."""
    documented = {arguments[0] for _, arguments in _documented()}
    in_help = {arguments[0] for _, arguments in _help_examples()}
    table = set(re.findall(r"^\| `unipool (\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert documented == in_help == table == set(cli.commands)


@pytest.mark.parametrize(
    "wrong", ["train", "train quickstart --sett a=1", "probe", "trane quickstart", "watch --interval x y"]
)
def test_wrong_commands_are_found(wrong: str) -> None:
    with pytest.raises(click.UsageError):
        parsed(wrong.split())


@pytest.mark.parametrize("arguments", RUN, ids=" ".join)
def test_cheap_commands_run(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "unipool-182m"):
        write_run(tmp_path / "runs" / name)
    done = CliRunner().invoke(cli, arguments)
    assert (done.exit_code, done.exception) == (0, None)


def test_make_targets_exist_and_ci_runs_the_readmes() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        word
        for document in DOCUMENTS
        for line in shell_lines(document)
        for word in re.findall(r"^make ([a-z]+)", line.removeprefix("$ "))
    }
    assert named and named <= targets
    in_readme = set(re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text()))
    in_ci = set(re.findall(r"^make ([a-z]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert in_readme & targets <= in_ci
