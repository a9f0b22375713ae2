"""The ranks' /metrics pages: their addresses and their current values."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from trainer.common.errors import UserError, one_line, os_reason
from trainer.common.safe_read import read_bytes
from trainer.common.strict_json import loads
from trainer.telemetry.prometheus import parse

TARGETS_FILE = "targets.json"
TIMEOUT_SECONDS = 2.0
"""Time to wait for the next bytes of a page."""

_LARGEST_PAGE = 16 * 2**20
_CONNECTIONS = 32
# Ranks are asked directly, as Prometheus does, and not through a proxy that the environment may set.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Samples = dict[str, list[tuple[dict[str, str], float]]]
"""(labels, value) by sample name."""


@dataclass(frozen=True)
class Page:
    """A rank's page at a moment, in Unix seconds; it has either samples or the reason why it did not answer."""

    url: str
    samples: Samples = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


def page_url(text: str) -> str:
    """Return the URL of a page from a URL or from `host:port`; the default path is /metrics.

    Raises:
        UserError: The text is neither.
    """
    bare = "://" not in text
    try:
        parts = urlsplit(f"http://{text}" if bare else text)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or not bare)
    except ValueError:
        good = False
    if not good or " " in text or not text.isprintable():
        raise UserError(
            f"{text}: neither the folder of a run nor the address of a page, such as host:9400 or http://host:9400/metrics"
        )
    return parts.geturl() if parts.path not in ("", "/") else f"{parts.scheme}://{parts.netloc}/metrics"


def targets(run: Path) -> tuple[list[str], str]:
    """Return the URLs of a run's pages in rank order, and the run's name; no URLs if it has ended regularly."""
    try:
        (group,) = loads(read_bytes(run / TARGETS_FILE))
        return [page_url(address) for address in group["targets"]], str(group["labels"]["run"])
    except (OSError, ValueError, TypeError, KeyError, UserError):
        return [], ""


def value(samples: Samples, name: str) -> float:
    """Return the first sample of a name; 0 if there is none."""
    return next((number for _, number in samples.get(name, ())), 0.0)


def fetch(urls: Sequence[str]) -> list[Page]:
    """Fetch all pages at once and return them in this order; a page that does not answer has an error."""
    with ThreadPoolExecutor(_CONNECTIONS) as threads:
        return list(threads.map(_fetch_one, urls))


def _fetch_one(url: str) -> Page:
    now = time.time()
    try:
        with _opener.open(url, timeout=TIMEOUT_SECONDS) as answer:
            samples = parse(answer.read(_LARGEST_PAGE).decode())
        if not any(name.startswith("unipool_") for name in samples):
            return Page(url, error="metrics of another program", seconds=now)
        return Page(url, samples, seconds=now)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Page(url, error=_reason(error), seconds=now)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"timed out after {TIMEOUT_SECONDS:g} s"
    if isinstance(cause, OSError):
        return os_reason(cause)
    return "not a page of metrics" if isinstance(cause, ValueError) else one_line(cause).lower()
