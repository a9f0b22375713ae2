"""constraints.txt: one exact version of everything that is installed, within what the requirements allow."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.locked import LOCK, NOT_LOCKED, locked, ranges


@pytest.mark.parametrize("required", ranges(), ids=str)
def test_every_requirement_is_locked_in_its_range(required: Requirement) -> None:
    assert required.specifier.contains(locked()[canonicalize_name(required.name)])


def test_the_lock_suits_every_machine() -> None:
    """Nothing but versions: no place where packages come from, and nothing that only some machines can install."""
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    pinned = re.compile(r"[a-z0-9-]+==[a-z0-9.]+( ; [a-z0-9_'!=<>. ]+)?", re.IGNORECASE)
    assert [line for line in lines if not pinned.fullmatch(line)] == []
    assert [name for name in locked() if NOT_LOCKED.fullmatch(name)] == []
