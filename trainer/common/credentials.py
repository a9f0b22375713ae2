"""Passwords and tokens: no recipe may hold one, and no line that is shown repeats one.

A recipe goes, whole or in parts, into the run's folder, checkpoints, exports, prepared data and logs. Credentials
belong into the environment (HF_TOKEN, WANDB_API_KEY) or the login files of the programs that want them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"

_KNOWN = re.compile(
    r"(?<=://)[^\s'\"]+(?=@)"  # of a URL, user:password or a token alone
    r"|(?<=[?&])[\w.-]*(?:token|secret|password|signature|sig|key)=[^&#\s'\"]+"
    r"|\bhf_[A-Za-z0-9]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"(?:TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD)$")
_SHORTEST = 8
"""Characters of an environment variable's value that may be a secret: `..._TOKEN=1` is a switch."""


def redacted(text: str) -> str:
    """`text` with *** for whatever looks like a credential, or is one of this process's environment."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    return _KNOWN.sub(HIDDEN, text)


def keys_with_credentials(tree: Any, path: str = "") -> Iterator[str]:
    """Keys, as "data.source", of those texts in a tree of mappings and lists that hold a credential."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from keys_with_credentials(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from keys_with_credentials(value, path)
    elif isinstance(tree, str) and redacted(tree) != tree:
        yield path
