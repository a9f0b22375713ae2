"""The example for Alertmanager is valid, pages for what is critical, and sends one message per run."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.observability import DEPLOY, rules
from tests.distributed import TIME_LIMIT
from tests.tools import need
from trainer.cluster.launch import free_port

EXAMPLE = DEPLOY / "alertmanager" / "alertmanager.yml"
ALERTS = {rule["alert"]: rule["labels"]["severity"] for rule in rules("alert")}


def amtool(*arguments: str) -> str:
    command = [need("amtool", "prometheus-alertmanager"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_valid_and_names_alerts_that_exist() -> None:
    amtool("check-config", str(EXAMPLE))
    assert set(re.findall(r"Unipool\w+", EXAMPLE.read_text())) <= set(ALERTS)


@pytest.mark.parametrize(("severity", "receiver"), [("critical", "on-call"), ("warning", "team")])
def test_what_is_critical_pages(severity: str, receiver: str) -> None:
    alert = next(name for name, own in ALERTS.items() if own == severity)
    labels = (f"alertname={alert}", f"severity={severity}", "run=a/unipool")
    amtool("config", "routes", "test", f"--config.file={EXAMPLE}", f"--verify.receivers={receiver}", *labels)


class Receiver(BaseHTTPRequestHandler):
    """Keeps the messages that Alertmanager posts."""

    messages: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def alertmanager(folder: Path, webhook: int) -> Iterator[str]:
    """The example as it is, except that it waits less and posts to `webhook`. Yields where it takes alerts."""
    config = yaml.safe_load(EXAMPLE.read_text())
    config["route"]["group_wait"] = "2s"
    for receiver in config["receivers"]:
        receiver["webhook_configs"] = [{"url": f"http://127.0.0.1:{webhook}/"}]
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        need("prometheus-alertmanager", "prometheus-alertmanager"),
        f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with (folder / "alertmanager.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}/api/v2/alerts"
    finally:
        process.kill()
        process.wait()


def post(url: str, alerts: list[dict[str, Any]]) -> None:
    """Send alerts as Prometheus does, as soon as it is listened to."""
    request = urllib.request.Request(url, json.dumps(alerts).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + TIME_LIMIT
    while True:
        try:
            urllib.request.urlopen(request, timeout=60).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_one_message_per_run(tmp_path: Path) -> None:
    """Of a dead node with eight ranks, and not what follows from it; a run of the same name elsewhere has its own."""
    silent = [("UnipoolRankSilent", "a/unipool", f"10.0.0.1:{9400 + slot}") for slot in range(8)]
    others = [("UnipoolRanksMissing", "a/unipool", ""), ("UnipoolLossSpikes", "b/unipool", "")]
    alerts = [
        {"labels": {"alertname": name, "run": run, "instance": instance, "severity": ALERTS[name]}}
        for name, run, instance in silent + others
    ]
    Receiver.messages = []
    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with alertmanager(tmp_path, server.server_port) as url:
            post(url, alerts)
            deadline = time.monotonic() + TIME_LIMIT
            while len(Receiver.messages) < 2:
                assert time.monotonic() < deadline, (tmp_path / "alertmanager.log").read_text()
                time.sleep(0.1)
    finally:
        server.shutdown()
        server.server_close()
    told = {}
    for message in Receiver.messages:
        names = [alert["labels"]["alertname"] for alert in message["alerts"]]
        told[message["receiver"], message["groupLabels"]["run"]] = names
    assert told == {("on-call", "a/unipool"): ["UnipoolRankSilent"] * 8, ("team", "b/unipool"): ["UnipoolLossSpikes"]}
