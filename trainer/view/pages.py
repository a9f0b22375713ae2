"""The ranks' /metrics pages: where they are, and what they say now."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from trainer.common.errors import UserError
from trainer.common.strict_json import loads
from trainer.telemetry.prometheus import parse

TARGETS_FILE = "targets.json"
TIMEOUT_SECONDS = 2.0
"""Longest wait for a page's next bytes."""

_LARGEST_PAGE = 16 * 2**20
_CONNECTIONS = 32
_ADDRESS = re.compile(r"([\w.-]+|\[[\da-fA-F:.]+\]):\d{1,5}")
# A proxy is for the world outside; ranks are asked directly, as Prometheus does.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Samples = dict[str, list[tuple[dict[str, str], float]]]
"""(labels, value) by sample name."""


@dataclass(frozen=True)
class Page:
    """A rank's page at a moment.

    Attributes:
        samples: empty where it did not answer.
        error: why it did not; empty if it did.
        seconds: when it was asked, Unix time.
    """

    url: str
    samples: Samples = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


def page_url(text: str) -> str:
    """The URL of a page from a URL or from `host:port`; without a path it is /metrics.

    Raises:
        UserError: it is neither.
    """
    url = f"http://{text}" if _ADDRESS.match(text) and "://" not in text else text
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 80) > 0
    except ValueError:
        good = False
    if not good or " " in text or not text.isprintable():
        raise UserError(f"{text}: neither a run's folder nor a page, as in http://host:9400/metrics or host:9400")
    return url if parts.path not in ("", "/") else f"{parts.scheme}://{parts.netloc}/metrics"


def targets(run: Path) -> tuple[list[str], str]:
    """URLs of the pages of a run that goes on or has crashed, in rank order, and its name; none once it has ended."""
    try:
        (group,) = loads((run / TARGETS_FILE).read_text())
        return [page_url(address) for address in group["targets"]], str(group["labels"]["run"])
    except (OSError, ValueError, TypeError, KeyError, UserError):
        return [], ""


def fetch(urls: Sequence[str]) -> list[Page]:
    """All pages at once, in this order. A page that does not answer in time has its reason instead of samples."""
    if not urls:
        return []
    with ThreadPoolExecutor(min(len(urls), _CONNECTIONS)) as threads:
        return list(threads.map(_fetch_one, urls))


def _fetch_one(url: str) -> Page:
    now = time.time()
    try:
        with _opener.open(url, timeout=TIMEOUT_SECONDS) as answer:
            samples = parse(answer.read(_LARGEST_PAGE).decode())
        if not any(name.startswith("unipool_") for name in samples):
            return Page(url, error="has metrics of something else", seconds=now)
        return Page(url, samples, seconds=now)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Page(url, error=_reason(error), seconds=now)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"answers {error.code}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer in {TIMEOUT_SECONDS:g} s"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror.lower()
    return "no page of metrics" if isinstance(cause, ValueError) else str(cause).lower() or type(cause).__name__
