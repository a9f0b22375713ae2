"""Progress for Kubeflow Trainer, which shows it in `status.trainerStatus` of the TrainJob.

Its controller (v2.2 and newer, feature gate `TrainJobStatus`) sets three environment variables in every container. What
is sent is described at https://www.kubeflow.org/docs/components/trainer/.
"""

from __future__ import annotations

import http.client
import math
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from trainer.common.errors import one_line
from trainer.common.safe_read import read_bytes
from trainer.common.strict_json import dumps
from trainer.telemetry.console import say

SERVER_URL, CA_CERT, TOKEN = (f"KUBEFLOW_TRAINER_SERVER_{name}" for name in ("URL", "CA_CERT", "TOKEN"))
"""Environment variables: where to send the progress, and files with the certificate and with a token, which changes."""

INTERVAL_SECONDS = 10.0
"""Time between two reports; the controller asks for at least 5 s."""

_TIMEOUT_SECONDS = 5.0


class TrainJobProgress:
    """Reports the progress of a run, in a thread of its own. Training waits for nothing, and no failure hurts it.

    Args:
        total: Optimizer steps of the whole run.
        done: Steps done before this start of the run.
    """

    def __init__(self, url: str, total: int, done: int):
        self._url, self._total = url, total
        self._first, self._start = done, time.monotonic()
        self._newest: tuple[int, Mapping[str, float]] | None = None
        self._changed, self._ended = threading.Event(), threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="TrainJob progress")
        self._thread.start()

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Note a step; what is noted last is sent."""
        self._newest = (done, metrics)
        self._changed.set()

    def close(self) -> None:
        """Send what was noted last, for at most as long as an answer may take."""
        self._ended.set()
        self._changed.set()
        self._thread.join(_TIMEOUT_SECONDS)

    def _run(self) -> None:
        while not self._ended.is_set():
            self._changed.wait()
            self._changed.clear()
            if newest := self._newest:
                self._send(*newest)
            self._ended.wait(INTERVAL_SECONDS)
        if self._changed.is_set() and self._newest:
            self._send(*self._newest)

    def _send(self, done: int, metrics: Mapping[str, float]) -> None:
        """Send a report. The first of several failures in a row is a warning."""
        try:
            token = read_bytes(Path(os.environ.get(TOKEN, ""))).decode()
            token = "".join(token.split())  # an error would quote a line break
            request = urllib.request.Request(
                self._url,
                dumps({"trainerStatus": self._status(done, metrics)}).encode(),
                {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            )
            tls = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=os.environ.get(CA_CERT)))
            # The controller is asked directly, and not through a proxy that the environment may set.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), tls)
            with opener.open(request, timeout=_TIMEOUT_SECONDS) as answer:
                answer.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not self._warned:
                say(f"warning: the progress cannot be reported to {self._url} ({one_line(error, 200)})")
            self._warned = True
        else:
            self._warned = False

    def _status(self, done: int, metrics: Mapping[str, float]) -> dict[str, object]:
        steps = done - self._first
        status: dict[str, object] = {
            "progressPercentage": 100 * done // self._total,
            "metrics": [
                {"name": name, "value": f"{number:.6g}"} for name, number in metrics.items() if math.isfinite(number)
            ],
            "lastUpdatedTime": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        }
        if steps > 0:
            left = (time.monotonic() - self._start) / steps * (self._total - done)
            status["estimatedRemainingSeconds"] = min(round(left), 2**31 - 1)
        return status


def trainjob_progress(total: int, done: int) -> TrainJobProgress | None:
    """Report to the TrainJob that this rank is part of, if there is one."""
    url = os.environ.get(SERVER_URL)
    return TrainJobProgress(url, total, done) if url else None
