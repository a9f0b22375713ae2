"""The Hugging Face hub: whether it can be reached, and the records of a data set on it, streamed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from trainer.common.errors import UserError, short_line
from trainer.data.reading.records import Found, text_of
from trainer.data.reading.sources import HUB_PREFIX, shown

_SNAPSHOT_RECORDS = 1000
_PAUSE_SECONDS = 1.0


@cache
def can_connect() -> bool:
    """Return whether a connection to the hub can be made; without one its library would try for 23 s for each file.

    A connection that is slow is one. With HF_HUB_OFFLINE no request is made, and the library knows that too.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, httpx

    for pause in (_PAUSE_SECONDS, 0.0):
        try:
            get_session().head(constants.ENDPOINT)
        except httpx.ConnectError:  # refused, no route, no such name; a time-out is another class
            time.sleep(pause)
        except Exception:
            return True  # the library's own request will say why
        else:
            return True
    return False


def read_hub(source: str, text_field: str, at: list[Any] | None) -> Found:
    """Read the split "train" of "hub:NAME" or "hub:NAME:CONFIG".

    A position is the row, the number of rows since the last snapshot, and that snapshot of the data set's own position,
    which is too slow to take for every record.
    """
    from datasets import load_dataset

    name, _, config = source.removeprefix(HUB_PREFIX).partition(":")
    row, since, snapshot = at or [0, 0, None]
    with _reported_errors(HUB_PREFIX + name):
        records = load_dataset(name, config or None, split="train", streaming=True)
        if snapshot:
            records.load_state_dict(snapshot)
        for number, record in enumerate(records):
            if at and number < at[1]:
                continue
            row += 1
            since += 1
            if since == _SNAPSHOT_RECORDS:
                snapshot, since = records.state_dict(), 0
            yield text_of(record, text_field, f"row {row}"), [row, since, snapshot]


@contextmanager
def _reported_errors(source: str) -> Iterator[None]:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.utils import httpx  # the HTTP client that this version of the hub's library uses

    where = f"data.source {shown(source)}"
    try:
        yield
    except DatasetNotFoundError as error:
        raise UserError(f"{where}: the hub has no such data set, or it is private") from error
    except (OSError, httpx.HTTPError) as error:
        raise UserError(
            f"{where}: the Hugging Face hub cannot be reached ({type(error).__name__}); "
            "try again, or set it to the path of a local copy"
        ) from error
    except Exception as error:  # an unknown config or split, files that `datasets` cannot read: the message says which
        reason = short_line(error)
        raise UserError(f"{where}: {reason}; fix the name, or set it to the path of a local copy") from error
