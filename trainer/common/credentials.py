"""Passwords and tokens: no recipe may hold one, and no line that is shown repeats one.

A recipe, or parts of it, is copied into the run's folder, checkpoints, exports, prepared data and logs. Credentials
belong in the environment (HF_TOKEN, WANDB_API_KEY) or in the login files of the programs that need them.
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"

_KNOWN = re.compile(
    r"(?<=://)[^\s'\"]+(?=@)"  # in a URL: user:password, or a token alone
    r"|(?<=[?&])[\w.-]*(?:token|secret|password|signature|sig|key)=[^&#\s'\"]+"
    r"|\bhf_[A-Za-z0-9]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"(?:TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD)$")
_SHORTEST = 8
"""Characters of the shortest value of an environment variable that is a secret: `..._TOKEN=1` is a switch."""


def redacted(text: str) -> str:
    """Return `text` with *** for what looks like a credential, or is the value of a secret environment variable."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    return _KNOWN.sub(HIDDEN, text)
