"""`unipool serve` as a process: its address, its end, and what a user gets wrong."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import openai
import pytest
from click.testing import CliRunner

from tests.distributed import TIME_LIMIT, context
from tests.trainer.export.test_transformers import model_with
from tests.trainer.serve.test_text import tokenizer
from trainer.cli import cli
from trainer.common.errors import UserError
from trainer.export.loaded_model import LoadedModel


def export(folder: Path) -> Path:
    """A small export whose answers are long enough to be interrupted."""
    model_with(seed=2, vocab_size=270, max_position_embeddings=512).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": tokenizer().decode([0])}))
    return folder


def run(arguments: list[str], log: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    from trainer.cli import main

    sys.argv[1:] = arguments
    main()


@pytest.mark.slow
def test_a_signal_ends_it_when_answers_are_complete(tmp_path: Path) -> None:
    """SIGTERM comes in the middle of a stream: the stream goes on to its end, new clients are refused, status 0."""
    log = tmp_path / "log"
    log.touch()
    options = ["--port", "0", "--batch", "2", "--device", "cpu", "--grace", "300"]
    arguments = ["serve", str(export(tmp_path / "small")), *options]
    server = context.Process(target=run, args=(arguments, log), daemon=True)
    server.start()
    try:
        deadline = time.monotonic() + TIME_LIMIT
        while not (found := re.search(r"(http://127\S+)/v1 serves small: 2 answers at once", log.read_text())):
            assert server.is_alive() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0, timeout=TIME_LIMIT)
        settings = {"model": "small", "prompt": "def size", "max_tokens": 200, "seed": 1, "extra_body": {"top_k": 9}}
        stream = iter(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
        chunks = [next(stream)]
        server.terminate()
        chunks += stream
        assert chunks[-1].usage.completion_tokens == 200 or chunks[-2].choices[0].finish_reason == "stop"
        server.join(TIME_LIMIT)
        assert server.exitcode == 0, log.read_text()
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    finally:
        server.kill()
    assert "Traceback" not in log.read_text()


def test_what_a_user_gets_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        caught = CliRunner().invoke(cli, ["serve", str(tmp_path), "--port", port]).exception
        assert isinstance(caught, UserError) and caught.status == 2
        assert str(caught) == (
            f"--port: cannot listen on port {port} of 127.0.0.1 (address already in use); choose another, or 0 for a "
            "free one"
        )
    monkeypatch.delenv("NO_KEY", raising=False)
    (tmp_path / "open.jinja").write_text("a chat\n{% if messages %}")
    (tmp_path / "refuses.jinja").write_text("{{ raise_exception('never') }}")
    for arguments, text in (
        (["--api-key", "NO_KEY"], "--api-key: the environment variable NO_KEY is not set; it must hold the key"),
        (["--host", "no.such.host.invalid", "--port", "0"], "--port: cannot listen on port 0 of no.such.host.invalid"),
        (["--chat-template", "none.jinja"], "--chat-template none.jinja: cannot be read (no such file or directory)"),
        (
            ["--chat-template", str(tmp_path / "open.jinja")],
            f"--chat-template {tmp_path / 'open.jinja'}: line 2: Unexp",
        ),
        (
            ["--chat-template", str(tmp_path / "refuses.jinja"), "--port", "0"],
            f"{tmp_path}: has no complete checkpoint",
        ),
    ):
        caught = CliRunner().invoke(cli, ["serve", str(tmp_path), *arguments]).exception
        assert isinstance(caught, UserError) and str(caught).startswith(text)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "trainer.serve.server")
    caught = CliRunner().invoke(cli, ["serve", str(tmp_path)]).exception
    assert isinstance(caught, UserError) and "requirements-serve.txt" in str(caught)


@pytest.mark.parametrize(
    ("template", "warning", "kept"),
    [
        ("{{ messages[0].content }}", "", True),
        (None, "", False),
        (
            "a chat\n{% if messages %}",
            "chats are not served, because of a mistake in the chat template (line 2: Unexp",
            False,
        ),
        (
            "{{ messages | no_such_filter }}",
            "chats are not served, because of a mistake in the chat template (line 1: ",
            False,
        ),
        (
            "{{ raise_exception('a system message is needed') }}",
            "the chat template refuses a message of a user (a system message is needed); chats may not work; "
            "completions work, and --chat-template FILE gives another template",
            True,
        ),
        ("{{ 1 / 0 }}", "the chat template refuses a message of a user (division by zero)", True),
        ({"rag": "{{ messages[0].content }}"}, "the chat template refuses a message of a user (", True),
    ],
)
def test_a_chat_template_is_tried_at_the_start(
    template: Any, warning: str, kept: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that no chat can use is named before the first client comes; the server starts nevertheless."""
    from trainer.serve import server

    chat = tokenizer()
    chat.chat_template = template
    started = Mock(side_effect=UserError("it would start now"))
    monkeypatch.setattr(server, "load_model", lambda *_: LoadedModel(Path("small"), Mock(), chat, None))
    monkeypatch.setattr(server, "Engine", started)
    with pytest.raises(UserError, match="it would start now"):
        server.serve(Path("small"), "127.0.0.1", 0, None, 1, 1, None, None, None, 1)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {warning}") and said.count("\n") == 1 if warning else not said
    assert bool(started.call_args.args[0].tokenizer.chat_template) == kept
