"""JSON as this project writes it: standard JSON, which has neither NaN nor infinity."""

from __future__ import annotations

import json
import math
from typing import Any

NOT_FINITE = "not_finite"
"""The key under which an object lists those of its keys that are null because the number was NaN or infinite."""


def dumps(tree: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return the tree as JSON text, with null for floats that are NaN or infinite."""
    return json.dumps(json_safe(tree), indent=indent, sort_keys=sort_keys, allow_nan=False)


def loads(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: The text is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_safe(tree: Any) -> Any:
    """Return the same tree with None for floats that are NaN or infinite; tuples become lists."""
    if isinstance(tree, dict):
        return {key: json_safe(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [json_safe(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def name_not_finite(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with the names of its NaN and infinite numbers under `NOT_FINITE`, if it has any."""
    names = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    return record | {NOT_FINITE: names} if names else record
