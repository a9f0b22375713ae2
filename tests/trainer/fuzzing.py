"""Inputs for the fuzz tests of all rooms: whatever a person may write, and damaged files.

Fixed examples and the few that hypothesis makes of a fixed seed run always; UNIPOOL_FUZZ=10 makes ten times as many, of
another seed each time. `-o faulthandler_timeout=0` lets a test take more than 15 minutes.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from typing import Any, get_args

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from trainer.common.errors import UserError
from trainer.config.recipe import Recipe

TIMES = int(os.environ.get("UNIPOOL_FUZZ", "0"))


def fuzz(examples: int) -> Callable[[Any], Any]:
    """So many examples; no time limit for one, as machines differ."""
    return settings(
        max_examples=examples * max(1, TIMES),
        derandomize=not TIMES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def user_error(act: Callable[[], Any]) -> str | None:
    """The one line of the UserError that `act` raises, or None; any other exception fails the test."""
    try:
        act()
    except UserError as error:
        text = str(error)
        assert text and text.isprintable() and len(text) <= 2000
        return text
    return None


SECTIONS = [(name, get_args(field.annotation) or [field.annotation]) for name, field in Recipe.model_fields.items()]
KEYS = [f"{name}.{key}" for name, (section, *_) in SECTIONS for key in section.model_fields]
_ODD = [
    "",
    " ",
    "\n",
    "\0",
    "\x7f",
    "\ud800",
    "\u2028",
    "x" * 5000,
    "a/b",
    "~",
    "null",
    "nan",
    "1e400",
    ".inf",
    "0x10",
    "é🙂",
]
odd_text = st.one_of(st.sampled_from(_ODD), st.text(max_size=8))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 10**30, 10**400]),
    st.sampled_from([0.0, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, 0.5, -1.5]),
    st.integers(-5, 5000),
    odd_text,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(odd_text, inner, max_size=3)),
    max_leaves=5,
)
keys = st.one_of(st.sampled_from(KEYS), st.sampled_from(list(Recipe.model_fields)), odd_text)


YAML = {
    "deep": "[" * 100_000,
    "deep mappings": "{a: " * 20_000,
    "indented": "".join(" " * i + "a:\n" for i in range(45)),
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "merged laughs": "a: &a {x: 1}\n"
    + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "in itself": "a: &a [*a]",
    "twice": "run: {dir: a}\nrun: {dir: b}",
    "twice inside": "run: {dir: a, dir: b}",
    "two documents": "a: 1\n---\nb: 2",
    "a date": "run: {dir: 2026-13-45}",
    "a tag": "run: !!python/object/apply:os.system [ls]",
    "a tag that does not fit": "train: {steps: !!int many}",
    "a bool that is none": "train: {steps: !!bool many}",
    "digits": f"train: {{steps: {'9' * 5000}}}",
    "list as key": "? [1, 2]\n: 3",
    "mapping as key": "? {a: 1}\n: 3",
    "number as key": "1: 2",
    "null as key": "~: 2",
    "no alias": "a: *b",
    "a half": 'run: {dir: "\\ud800"}',
    "null byte": 'run: {dir: "a\\0b"}',
    "control": "a: \x01",
    "tabs": "a:\n\t- b",
    "empty": "",
    "only a comment": "# nothing",
    "a scalar": "train",
    "a list": "- run",
}


json_values = st.recursive(
    st.one_of(scalars, st.sampled_from([1e-300, 1e300, 10**300])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(odd_text, inner, max_size=3)),
    max_leaves=4,
)


def changed(tree: Any, chosen: random.Random, value: Any) -> Any:
    """The tree with one value, somewhere, replaced or left out."""
    if not isinstance(tree, dict | list) or not tree or chosen.random() < 0.2:
        return value
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    place = chosen.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    if chosen.random() < 0.15:
        del copy[place]
    else:
        copy[place] = changed(tree[place], chosen, value)
    return copy


JSON_TEXTS = [
    "",
    "[",
    "null",
    "3",
    "[]",
    "{}",
    "NaN",
    '{"a": NaN}',
    "[" * 100_000,
    '{"a":' * 50_000,
    "9" * 5000,
    "\ud800",
    '"',
]
