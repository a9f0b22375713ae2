"""What a person writes: small text files (recipes, sweeps, hostfiles, profiles), and the texts in them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.common.errors import unprintable

LARGEST = 2**20
"""Bytes of such a file at most."""


class Unreadable(Exception):
    """A file that cannot be read as text; the message says why in a few words."""


def read_text(path: Path, largest: int = LARGEST) -> str:
    """The text of a file in UTF-8, without a byte-order mark.

    Args:
        largest: bytes that it may have.

    Raises:
        Unreadable: it is not there, no regular file (a pipe would never end), too large, or not UTF-8.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else opening a pipe waits for its writer
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Unreadable("no regular file")
            content = file.read(largest + 1)
    except OSError as error:
        raise Unreadable(reason(error)) from None
    except ValueError:  # of a path with a null byte, or one that cannot be encoded
        raise Unreadable("no such path can exist") from None
    if len(content) > largest:
        raise Unreadable(f"larger than {largest // 2**20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("not UTF-8 text") from None


def reason(error: OSError) -> str:
    """Why a file cannot be read or written, in a few words."""
    return (error.strerror or type(error).__name__).lower()


def keys_with_odd_text(tree: Any, path: str = "") -> Iterator[str]:
    """Keys of a tree of mappings and lists whose text, or that themselves, no terminal and no file's name can have."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            name = f"{path}.{key}" if path else str(key)
            if any(map(unprintable, str(key))):
                yield name
            yield from keys_with_odd_text(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from keys_with_odd_text(value, path)
    elif isinstance(tree, str) and any(map(unprintable, tree)):
        yield path
