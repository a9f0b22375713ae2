"""What a body that is wrong may cost."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from trainer.serve.requests import Chat, Completion, invalid

MANY = 1000
CASES: list[tuple[type[Completion | Chat], str, Any]] = [
    (Completion, "prompt", [0, ""] * MANY),
    (Completion, "prompt", [[""] * MANY] * MANY),
    (Completion, "stop", [0] * MANY),
    (Completion, "logit_bias", {str(n): "" for n in range(MANY)}),
    (Chat, "messages", [0] * MANY),
    (Chat, "messages", [{"role": "user", "content": [0] * MANY}] * MANY),
    (Chat, "response_format", {str(n): "" for n in range(MANY)}),
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_many_mistakes_are_not_many_errors(kind: type[Completion | Chat], name: str, value: Any) -> None:
    """Each error takes a kilobyte, so those of all parts of a large body could take a gigabyte."""
    whole = {"model": "m", "messages": [{"role": "user", "content": "x"}]} if kind is Chat else {"model": "m"}
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(whole | {name: value})
    assert caught.value.error_count() < 10
    assert invalid(caught.value.errors()).body["error"]["param"] == name


UNKNOWN = {f"unknown {n}": "" for n in range(MANY)}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (Completion, UNKNOWN),
        (Completion, {"stream_options": UNKNOWN}),
        (Chat, {"messages": [{"role": "user", "content": "x"} | UNKNOWN]}),
        (Chat, {"messages": [UNKNOWN | {"role": "user", "content": [{"type": "text", "text": "x"} | UNKNOWN]}]}),
    ],
)
def test_many_unknown_keys_are_one_error(kind: type[Completion | Chat], more: dict[str, Any]) -> None:
    """The first is named, wherever the object is; the others cost nothing."""
    whole = {"model": "m", "messages": [{"role": "user", "content": "x"}]} if kind is Chat else {"model": "m"}
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(whole | more)
    errors = caught.value.errors()
    named = [error["loc"][-1] for error in errors if error["type"] == "extra_forbidden"]
    assert set(named) == {"unknown 0"} and len(errors) < 10
    assert invalid([error for error in errors if error["loc"][-1] == "unknown 0"]).body["error"]["param"] == "unknown 0"
