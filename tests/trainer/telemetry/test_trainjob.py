"""Progress for Kubeflow Trainer: what its controller receives, and that nothing it does hurts training."""

from __future__ import annotations

import json
import math
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.tools import need
from trainer.telemetry import trainjob
from trainer.telemetry.trainjob import TrainJobProgress, trainjob_progress

PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/unipool/status"


class Controller(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[tuple[str, str, Any]] = []
        self.status = 200


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body, status = self.rfile.read(int(self.headers["Content-Length"])), server.status
        server.received.append((self.path, self.headers["Authorization"], json.loads(body)))
        self.send_response(status)  # of the time before others could know that it has been received
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    """Kubeflow's status server, with a certificate of its own, as the environment describes it."""
    key, certificate = tmp_path / "tls.key", tmp_path / "ca.crt"
    subprocess.run(
        [
            *(need("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    server = Controller()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    (tmp_path / "token").write_text("first\n")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"https://localhost:{server.server_port}{PATH}")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_CA_CERT", str(certificate))
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(trainjob, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(trainjob, "_TIMEOUT_SECONDS", 60.0)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_the_controller_receives(controller: Controller, tmp_path: Path) -> None:
    """As its type TrainerStatus has it: whole numbers, texts of metrics, a time of RFC 3339; with the newest token."""
    progress = trainjob_progress(400, 100)
    assert progress
    progress.step(100, {"loss": 3.25, "broken": math.nan})
    until(lambda: controller.received)
    (tmp_path / "token").write_text("second")
    progress.step(399, {"loss": 3.0})
    until(lambda: len(controller.received) > 1)
    progress.step(400, {"loss": 2.5})
    progress.close()
    (path, token, first), (_, newer, second), *_, (_, _, last) = controller.received
    assert (path, token, newer) == (PATH, "Bearer first", "Bearer second")
    status = first["trainerStatus"]
    assert status.pop("lastUpdatedTime").endswith("Z")
    assert status == {"progressPercentage": 25, "metrics": [{"name": "loss", "value": "3.25"}]}
    assert second["trainerStatus"]["progressPercentage"] == 99
    assert isinstance(second["trainerStatus"]["estimatedRemainingSeconds"], int)
    assert last["trainerStatus"]["progressPercentage"] == 100, "what was noted before the end is sent"
    assert last["trainerStatus"]["estimatedRemainingSeconds"] == 0


def test_a_failure_is_one_warning(controller: Controller, capfd: pytest.CaptureFixture[str]) -> None:
    """However often it fails; and again after a report that succeeded."""
    progress = trainjob_progress(400, 0)
    assert progress
    for status in (403, 403, 200, 500, 200):
        controller.status = status
        before = len(controller.received)
        progress.step(before, {})
        until(lambda before=before: len(controller.received) > before)
    progress.close()
    said = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(said) == 2
    assert re.fullmatch(
        r"warning: the progress cannot be reported to https://localhost:\d+/.* \(HTTP Error 403.*", said[0]
    )
    assert "HTTP Error 500" in said[1]


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    assert trainjob_progress(400, 0) is None
    (tmp_path / "token").write_text("x")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    progress = TrainJobProgress("http://127.0.0.1:9/status", 400, 0)
    progress.step(1, {})
    progress.close()
    assert "cannot be reported to http://127.0.0.1:9/status" in capfd.readouterr().err
