"""What a shell completes: names of recipes, keys and values of `--set`, folders of runs.

click calls these functions when the user presses Tab, in a process that ends at once: nothing here may load torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import BashComplete, CompletionItem, ZshComplete, add_completion_class, get_completion_class
from click.shell_completion import split_arg_string as split_words
from pydantic import BaseModel

from trainer.config.key_errors import sections_in
from trainer.config.recipe import Recipe, headline, recipe_names

Items = list[CompletionItem[str]]

SHELLS = ("bash", "zsh", "fish")

PROGRAM = "unipool"
VARIABLE = "_UNIPOOL_COMPLETE"
"""Environment variable that makes the program answer a shell instead of running."""

_MODEL_FILES = ("recipe.yaml", "config.json")
"""A folder with one of these is a run or an export."""

_BASH = """\
%(complete_func)s() {
    local kind value line="${COMP_LINE:0:COMP_POINT}"
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                # Bash replaces only what stands behind the last "=".
                [[ $COMP_WORDBREAKS == *=* && $value == *=?* ]] && value="${value##*=}"
                [[ $value == *[=./] ]] && compopt -o nospace
                COMPREPLY+=("$value") ;;
        esac
    done < <(env COMP_LINE="$line" %(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

_ZSH = """\
#compdef %(prog_name)s
%(complete_func)s() {
    local kind value about
    local -a answer whole begun
    answer=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT - 1)) \\
        %(complete_var)s=zsh_complete %(prog_name)s)}")
    for kind value about in $answer; do
        case $kind in
            dir) _path_files -/ ;;
            file) _path_files ;;
            plain) [[ $value == *[=./] ]] && begun+=("$value:$about") || whole+=("$value:$about") ;;
        esac
    done
    (( $#whole )) && _describe -V %(prog_name)s whole -U
    (( $#begun )) && _describe -V %(prog_name)s-begun begun -U -S ''
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""


class _Bash(BashComplete):
    """Bash splits words at "=" and ":", so this takes the line as it stands, and begun values get no space."""

    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split_words(line)[1:]
        return (words, "") if line[-1:].isspace() else (words[:-1], words[-1] if words else "")


class _Zsh(ZshComplete):
    """Begun values get no space."""

    source_template = _ZSH

    def format_completion(self, item: CompletionItem[str]) -> str:
        return f"{item.type}\n{item.value.replace(':', chr(92) + ':')}\n{item.help or ''}"


def register_shells() -> None:
    """Let click use the scripts of this module."""
    add_completion_class(_Bash)
    add_completion_class(_Zsh)


def script(root: click.Command, shell: str) -> str:
    """Return the script that makes a shell complete the commands below `root`."""
    register_shells()
    shell_class = get_completion_class(shell)
    assert shell_class
    return shell_class(root, {}, PROGRAM, VARIABLE).source()


def complete_recipe(context: click.Context, parameter: click.Parameter, begun: str) -> Items:
    """Complete a recipe: the names, and YAML files that lie where the user looks."""
    return named_or_file(recipe_names(), headline, begun)


def named_or_file(names: Iterable[str], headline: Callable[[str], str], begun: str) -> Items:
    """Complete one of some names, each with its headline as help, or a YAML file; if there are none, any file."""
    named = [CompletionItem(name, help=headline(name)) for name in names if name.startswith(begun)]
    files = [CompletionItem(file) for file in _entries(begun, _is_yaml)]
    return [*named, *files] or [CompletionItem(begun, "file")]


def complete_file(context: click.Context, parameter: click.Parameter, begun: str) -> Items:
    """Complete any file."""
    return [CompletionItem(begun, "file")]


def complete_setting(context: click.Context, parameter: click.Parameter, begun: str) -> Items:
    """Complete `section.key=value` of a recipe: sections, then keys, then values where there are few."""
    written, equals, _ = begun.partition("=")
    name, dot, key = written.partition(".")
    if not dot:
        abouts = {name: (_section(name).__doc__ or "").partition("\n")[0] for name in Recipe.model_fields}
        return matching(begun, {f"{name}.": about for name, about in abouts.items()})
    fields = _section(name).model_fields if name in Recipe.model_fields else {}
    if not equals:
        return matching(begun, {f"{name}.{key}=": field.description or "" for key, field in fields.items()})
    values = _values(fields[key].annotation) if key in fields else ()
    return matching(begun, {f"{written}={value}": "" for value in values})


class RunPath(click.Path):
    """The path of a run or an export, as an argument; a shell completes such folders before any others."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        """Complete folders of runs and exports, below runs/ too; if there are none, folders."""
        return complete_run(ctx, param, incomplete)


def complete_run(context: click.Context, parameter: click.Parameter, begun: str) -> Items:
    """See `RunPath`."""
    found = _entries(begun, _is_model)
    if "runs/".startswith(begun) and begun != "runs/":
        found += _entries("runs/", _is_model)
    return [CompletionItem(path) for path in found] or [CompletionItem(begun, "dir")]


def matching(begun: str, texts: dict[str, str]) -> Items:
    """Complete one of some texts, each with its help."""
    return [CompletionItem(text, help=about or None) for text, about in texts.items() if text.startswith(begun)]


def _section(name: str) -> type[BaseModel]:
    return next(sections_in(Recipe.model_fields[name].annotation))


def _values(annotation: Any) -> Iterator[str]:
    """The values that a key of this type can have, as YAML, if they are few."""
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif annotation is bool:
        yield from ("true", "false")
    elif annotation is type(None):
        yield "null"
    elif get_origin(annotation) is not tuple:
        for part in get_args(annotation):
            yield from _values(part)


def _entries(begun: str, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    """Entries of the folder in which `begun` is, whose names continue it."""
    folder, slash, name = begun.rpartition("/")
    try:
        with os.scandir(Path(folder + slash or ".").expanduser()) as entries:
            return sorted(folder + slash + e.name for e in entries if e.name.startswith(name) and wanted(e))
    except OSError:
        return []


def _is_yaml(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith((".yaml", ".yml")) and not entry.name.startswith(".")


def _is_model(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and any(os.path.exists(os.path.join(entry.path, file)) for file in _MODEL_FILES)
