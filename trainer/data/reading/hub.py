"""The Hugging Face hub: whether it can be reached, and the records of a data set on it, streamed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from trainer.common.errors import Unavailable, UserError, short_line
from trainer.data.reading.records import Found, text_of
from trainer.data.reading.sources import HUB_PREFIX, shown
from trainer.data.status import tell

_SNAPSHOT_RECORDS = 1000
_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_ANSWER_SECONDS = 30.0
"""Longest wait for an answer; without one the library would wait for ever."""
_TRIES = 8
"""Attempts to go on where the hub was lost, each of which `datasets` itself repeats for a while."""


@cache
def can_connect() -> bool:
    """Return whether a connection to the hub can be made; without one its library would try for 23 s for each file.

    A connection that is slow is one. With HF_HUB_OFFLINE no request is made, and the library knows that too.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, httpx

    for pause in (_PAUSE_SECONDS, 0.0):
        try:
            get_session().head(constants.ENDPOINT, timeout=_ANSWER_SECONDS)
        except httpx.ConnectError:  # refused, no route, no such name; a time-out is another class
            time.sleep(pause)
        except Exception:
            return True  # the library's own request will say why
        else:
            return True
    return False


def read_hub(source: str, text_field: str, at: list[Any] | None) -> Found:
    """Read the split "train" of "hub:NAME" or "hub:NAME:CONFIG".

    A position is the row, the number of rows since the last snapshot, that snapshot of the data set's own position,
    which is too slow to take for every record, and the commit of the data set that is read.

    Raises:
        Unavailable: The hub cannot be reached, or was lost and has been out of reach for minutes.
    """
    failed = _TRIES  # until it has been reached
    while True:
        try:
            for found in _read_from(source, text_field, at):
                _, at = found
                failed = 0
                yield found
            return
        except Unavailable as error:
            if failed == _TRIES:
                raise
            failed += 1
            pause = min(_PAUSE_SECONDS * 2**failed, _LONGEST_PAUSE_SECONDS)
            tell(f"{error}; trying again in {pause:.0f} s")
            time.sleep(pause)


def _read_from(source: str, text_field: str, at: list[Any] | None) -> Found:
    from datasets import load_dataset

    name, _, config = source.removeprefix(HUB_PREFIX).partition(":")
    row, since, snapshot, commit = at or [0, 0, None, _newest_commit(name)]
    options = {"revision": commit} if commit else {}
    with _reported_errors(HUB_PREFIX + name):
        records = load_dataset(name, config or None, split="train", streaming=True, **options)
        if snapshot:
            records.load_state_dict(snapshot)
        for number, record in enumerate(records):
            if at and number < at[1]:
                continue
            row += 1
            since += 1
            if since == _SNAPSHOT_RECORDS:
                snapshot, since = records.state_dict(), 0
            yield text_of(record, text_field, f"row {row}"), [row, since, snapshot, commit]


@cache
def _newest_commit(name: str) -> str | None:
    """Return the data set's newest commit, so that a resumed preparation reads the same one; None if it is unknown."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=_ANSWER_SECONDS).sha if can_connect() else None
    except Exception:  # reading it will say what is wrong
        return None


@contextmanager
def _reported_errors(source: str) -> Iterator[None]:
    from datasets.exceptions import DatasetNotFoundError, FileNotFoundDatasetsError
    from huggingface_hub.utils import httpx  # the HTTP client that this version of the hub's library uses

    where = f"data.source {shown(source)}"
    try:
        yield
    except DatasetNotFoundError as error:
        raise UserError(f"{where}: the hub has no such data set, or it is private") from error
    except FileNotFoundDatasetsError as error:  # an OSError too
        raise UserError(f"{where}: {short_line(error)}; set it to the path of a local copy") from error
    except (OSError, httpx.HTTPError) as error:
        raise Unavailable(
            f"{where}: the Hugging Face hub cannot be reached ({type(error).__name__}); "
            "try again, or set it to the path of a local copy"
        ) from error
    except Exception as error:  # an unknown config or split, files that `datasets` cannot read: the message says which
        reason = short_line(error)
        raise UserError(f"{where}: {reason}; fix the name, or set it to the path of a local copy") from error
