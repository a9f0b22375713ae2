"""What JSON cannot say."""

from __future__ import annotations

import math
from typing import Any


def finite(tree: Any) -> Any:
    """The same tree with null where a float is NaN or infinite, which JSON does not have; tuples are lists."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
