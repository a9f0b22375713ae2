"""JSON as everything here writes it: standard JSON, which has neither NaN nor infinity."""

from __future__ import annotations

import json
import math
from typing import Any

NOT_FINITE = "not_finite"
"""Key under which an object names its own keys that are null because the number was NaN or infinite."""


def dumps(tree: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """The tree as JSON text. A float that is NaN or infinite becomes null; see `finite`."""
    return json.dumps(finite(tree), indent=indent, sort_keys=sort_keys, allow_nan=False)


def finite(tree: Any) -> Any:
    """The same tree with null where a float is NaN or infinite; tuples become lists."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def marked(record: dict[str, Any]) -> dict[str, Any]:
    """The record, and under `not_finite` the names of its numbers that are none: a reader of null wants to know why."""
    names = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    return record | {NOT_FINITE: names} if names else record


def has_not_finite(tree: Any) -> bool:
    """Whether some float in the tree is NaN or infinite."""
    if isinstance(tree, dict):
        return any(map(has_not_finite, tree.values()))
    if isinstance(tree, list | tuple):
        return any(map(has_not_finite, tree))
    return isinstance(tree, float) and not math.isfinite(tree)


def loads(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
