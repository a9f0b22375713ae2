"""One-line error messages about the keys of a YAML file."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from trainer.config.constraints import show


def first_line(error: ValidationError, root: type[BaseModel]) -> str:
    """Describe the first error in a YAML file: key, value and what is allowed.

    Args:
        error: What pydantic found.
        root: The model of the whole file.
    """
    first, *more = error.errors()
    *sections, last = first["loc"] or ("",)
    # Locations contain the tags of unions as well; the last part of an unknown key is what the user wrote.
    location = tuple(part for part in sections if not str(part).startswith("<"))
    if first["type"] == "extra_forbidden" or not str(last).startswith("<"):
        location += (last,)
    key = ".".join(str(part) for part in location)
    if first["type"] == "value_error":
        line = str(first["ctx"]["error"])
    elif first["type"] == "extra_forbidden":
        line = f"{key}: unknown key; {_allowed_keys(location, root)}"
    elif first["type"] == "missing":
        line = f"{key}: missing"
    else:
        message = re.sub(r"^\w+ should (be|have)", r"must \1", first["msg"])
        message = re.sub(r"\d{20,}", lambda number: f"{float(number[0]):g}", message)  # a bound of floats
        message = message.replace("a valid tuple", "a list").replace(" after validation", "")
        message = re.sub(r"a valid dictionary or instance of \w+", "a mapping, as in {key: value}", message)
        line = f"{key} = {show(first['input'])}: {message[0].lower()}{message[1:]}"
    return line + (f" (and {len(more)} more)" if more else "")


def _allowed_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    model = root
    for part in location[:-1]:
        if isinstance(part, str):  # a number is an index into a list of sections
            model = next(sections_in(model.model_fields[part].annotation))
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(known)}"


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Sections in a type: the type itself, or parts of a list or a union."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections_in(part)
