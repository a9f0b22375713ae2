"""YAML that people write, read as data: what a parser lets through and nobody means is an error with its line."""

from __future__ import annotations

import re
from typing import Any

import yaml

LARGEST = 100_000
"""Values of a file at most, those that aliases repeat included."""

DEEPEST = 50
"""Collections within each other at most."""


class NotYaml(Exception):
    """A text that is not YAML, or not what anybody means; the message says where and what, without the line itself."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string for want of a dot; people write learning rates so."""

    def fetch_more_tokens(self) -> None:
        if self.flow_level + len(self.indents) > DEEPEST:  # here, for scanning on would take minutes
            raise NotYaml("nested too deeply")
        super().fetch_more_tokens()


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse(text: str) -> Any:
    """The value of the one document in a text.

    Raises:
        NotYaml: see there. So are keys that are there twice, and aliases that stand for more than LARGEST values.
    """
    loader = None
    try:
        loader = _Loader(text)  # reads the first characters already
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except NotYaml:
        raise
    except yaml.YAMLError as error:
        raise NotYaml(_problem(error)) from None
    except RecursionError:
        raise NotYaml("nested too deeply, or within itself") from None
    except Exception as error:  # what Python says of a value that its tag does not fit, as of the date 2026-99-99
        raise NotYaml(f"a value cannot be read ({type(error).__name__})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node with all aliases written out. An alias costs nothing until somebody walks through the values."""
    if id(node) in known:
        return known[id(node)]
    size = 1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        size += sum(_size(part, known) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_size(part, known) for part in node.value)
    if size > LARGEST:
        raise NotYaml(f"line {node.start_mark.line + 1}: more than {LARGEST:,} values, aliases written out")
    known[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # the constructor refuses it
        if (key.tag, key.value) in seen:
            mark = key.start_mark
            raise NotYaml(f"line {mark.line + 1}, column {mark.column + 1}: a key is there twice")
        seen.add((key.tag, key.value))


def _problem(error: yaml.YAMLError) -> str:
    """Where and what, without the line itself, which may hold a credential."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())
