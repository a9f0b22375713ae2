"""Files that anybody may have written, read as data: nothing in them is executed, and size and depth are limited.

JSON has a module of its own, `strict_json`.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import stat
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml

from trainer.common.errors import UserError, os_reason

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

LARGEST_TEXT = 2**20
"""Bytes of the largest text file that `read_text` accepts by default, and of the longest line of `lines`."""

LARGEST_JSON = 2**24
"""Bytes of the largest JSON file that `read_bytes` accepts by default; some models' list thousands of tokens."""

LARGEST_TOKENIZER = 2**28
"""Bytes of the largest tokenizer.json. Those of 260,000 tokens have 35 MB."""

LARGEST_ARRAY = 2**30
"""Bytes of the largest array of `read_array`."""

_TEXTS = (".json", ".jinja", ".txt", ".model")
_MORE_TEXTS = "additional_chat_templates"

YAML_VALUES = 100_000
"""The most values a YAML text may have, counting what aliases repeat."""

YAML_DEPTH = 50
"""The most collections that a YAML text may nest."""


class Unreadable(Exception):
    """A file that cannot be read as text. The message gives the reason in a few words."""


class NotYaml(Exception):
    """A text that is not YAML, or that nobody writes on purpose. The message says where, without quoting the line."""


def open_file(path: Path | str) -> BufferedReader:
    """Open a regular file for reading. Anything else is refused: opening a pipe would wait, and a device never ends.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
        ValueError: The path has a null byte, or cannot be encoded.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_special(os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_special(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")


def read_bytes(path: Path, largest: int = LARGEST_JSON) -> bytes:
    """Read a file that is no larger than `largest` bytes.

    Raises:
        OSError: It cannot be read, is not a regular file, or is larger.
        ValueError: The path has a null byte, or cannot be encoded.
    """
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size <= largest:  # that of some files is 0, whatever they hold
            content = file.read(largest + 1)
            if len(content) <= largest:
                return content
    raise OSError(f"larger than {largest // 2**20} MiB")


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """Read a small UTF-8 file, such as a recipe or a hostfile; a byte-order mark is dropped.

    Args:
        largest: The most bytes it may have.

    Raises:
        Unreadable: The file is missing, not a regular file, too large, or not UTF-8.
    """
    try:
        content = read_bytes(path, largest)
    except OSError as error:
        raise Unreadable(os_reason(error)) from error
    except ValueError:
        raise Unreadable("not a valid path") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("not UTF-8 text") from None


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of an open file. One that is longer than `LARGEST_TEXT` comes in pieces."""
    return iter(partial(file.readline, LARGEST_TEXT), b"")


def refuse_unreadable(folder: Path) -> None:
    """Check a model's folder before a library reads its files: it would wait for pipes, and read texts of any size.

    Raises:
        UserError: One is neither a regular file nor a folder, or a text is larger than `LARGEST_TOKENIZER`.
    """
    for path in (*folder.glob("*"), *folder.glob(f"{_MORE_TEXTS}/*")):
        try:
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                continue
            _refuse_special(status)
            if path.suffix in _TEXTS and status.st_size > LARGEST_TOKENIZER:
                raise OSError(f"larger than {LARGEST_TOKENIZER // 2**20} MiB")
        except FileNotFoundError:
            continue  # a broken link is a missing file
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({os_reason(error)}); remove it, or fetch the model again"
            ) from None


def read_array(path: Path) -> NDArray[Any]:
    """Read the array of numbers in a .npy file.

    The file is mapped first, so a header that promises more than the file holds costs no memory.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file does not hold one array of numbers.
    """
    import numpy as np

    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > LARGEST_ARRAY:
        raise ValueError(f"larger than {LARGEST_ARRAY // 2**30} GiB")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy's parser of headers raises a dozen kinds
        raise ValueError(f"not a .npy file of numbers: {error}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays, where one .npy file is expected")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"it holds {array.dtype}, not numbers")
    return np.array(array)


def read_tensors(path: Path | str, device: str | torch.device | None = "cpu", mmap: bool = False) -> Any:
    """Read a file that `torch.save` wrote.

    Args:
        device: Where tensors are put, as torch's `map_location`.
        mmap: Whether to map the tensors, so that only what is used of them is read.

    Raises:
        UserError: The file holds more than tensors, plain values and the few types that checkpoints have, or is not a
            regular file.
    """
    import torch

    try:
        _refuse_special(os.stat(path))
    except FileNotFoundError:
        pass  # torch says so
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)}); use another checkpoint") from None
    try:
        return torch.load(path, map_location=device, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {found[1]}" if found else "it holds objects"
        raise UserError(
            f"{path}: refused, and nothing in it was executed: {what}, which no checkpoint of this version has; the "
            "file may have been tampered with or come from another version"
        ) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string because it lacks a dot; people write learning rates like that."""

    def fetch_more_tokens(self) -> None:
        if self.flow_level + len(self.indents) > YAML_DEPTH:  # checked here, as scanning on would take minutes
            raise NotYaml("nested too deeply")
        super().fetch_more_tokens()


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """Return the value of the one document in a YAML text.

    Raises:
        NotYaml: The text is not YAML, has a key twice, nests deeper than `YAML_DEPTH`, or has aliases that stand for
            more than `YAML_VALUES` values.
    """
    loader = None
    try:
        loader = _Loader(text)  # already reads the first characters
        node = loader.get_single_node()
        if node is None:
            return None
        _check_yaml(node, {})
        return loader.construct_document(node)
    except NotYaml:
        raise
    except yaml.YAMLError as error:
        raise NotYaml(_yaml_problem(error)) from None
    except RecursionError:
        raise NotYaml("nested too deeply, or within itself") from None
    except Exception as error:  # Python's own, where a value does not fit its tag, such as the date 2026-99-99
        raise NotYaml(f"a value cannot be read ({type(error).__name__})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_yaml(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of values in a node, aliases written out; `sizes` holds those of nodes already visited."""
    if id(node) in sizes:
        return sizes[id(node)]
    size = 1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        size += sum(_check_yaml(part, sizes) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check_yaml(part, sizes) for part in node.value)
    if size > YAML_VALUES:
        raise NotYaml(f"line {node.start_mark.line + 1}: more than {YAML_VALUES:,} values, aliases written out")
    sizes[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # the constructor refuses it
        if (key.tag, key.value) in seen:
            raise NotYaml(f"{_yaml_place(key.start_mark)}: this key is given twice")
        seen.add((key.tag, key.value))


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Where and what, without the line itself, which may hold a credential."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{_yaml_place(error.problem_mark)}: {error.problem}"
    return " ".join(str(error).split())


def _yaml_place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def texts_of(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in a tree of mappings and lists, keys included, with its key as in "data.source"."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            name = f"{path}.{key}" if path else str(key)
            yield name, str(key)
            yield from texts_of(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from texts_of(value, path)
    elif isinstance(tree, str):
        yield path, tree
