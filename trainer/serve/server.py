"""A server: loads a model, and listens until it is asked to stop."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

from trainer.common.errors import UserError, os_reason
from trainer.common.format import size
from trainer.common.safe_read import Unreadable, read_text
from trainer.export.exported_model import mistake_in_template
from trainer.export.loaded_model import load_model

try:
    import uvicorn

    from trainer.serve.application import Service, application
    from trainer.serve.engine import Engine
    from trainer.serve.text import fault_of_chats
except ImportError as error:
    raise UserError(
        f"serve: {error}; it requires FastAPI, uvicorn, and transformers 5.24 or later: "
        "pip install -c constraints.txt -r requirements-serve.txt, or the extra `serve`"
    ) from None


def serve(
    source: Path,
    host: str,
    port: int,
    name: str | None,
    batch: int,
    queue: int,
    api_key: str | None,
    chat_template: Path | None,
    device: str | None,
    grace: int,
) -> None:
    """Serve a model until SIGTERM or SIGINT, then complete what has begun.

    Args:
        source: A run, a checkpoint of it, or an export of format hf.
        host: The address to listen on.
        port: The port; 0 for a free one.
        name: The name of the model for clients; by default that of the run or of the export's folder.
        batch: Largest number of answers that are computed together.
        queue: Largest number of answers that wait.
        api_key: The environment variable with the key that clients must have.
        chat_template: A file with a chat template, instead of the tokenizer's.
        device: "cpu" or "cuda"; by default cuda if it is available.
        grace: Seconds to complete answers after a signal.

    Raises:
        UserError: The source or the template cannot be read, the address is in use, or the variable is not set.
        BrokenModel: The model's logits are not finite.
    """
    key = None if api_key is None else os.environ.get(api_key)
    if api_key is not None and not key:
        raise UserError(f"--api-key: the environment variable {api_key} is not set; it must hold the key")
    template = None if chat_template is None else _read_template(chat_template)
    listener = _listener(host, port)
    loaded = load_model(source, device)
    if template is not None:
        loaded.tokenizer.chat_template = template
    if fault := fault_of_chats(loaded.tokenizer):
        other = "completions work, and --chat-template FILE gives another template"
        print(f"warning: {fault}; {other}", file=sys.stderr, flush=True)
    engine = Engine(loaded, batch, queue)
    name = name or loaded.folder.resolve().name
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    settings = uvicorn.Config(
        application(Service(engine, loaded.tokenizer, name, key)),
        log_level="warning",
        timeout_graceful_shutdown=grace,
        timeout_keep_alive=30,
    )
    engine.start()
    try:
        # uvicorn raises the signal again when all is complete, which must not end the process.
        signal.signal(signal.SIGTERM, lambda *_: None)
        if key is None and host not in ("127.0.0.1", "::1", "localhost"):
            print(f"warning: whoever can reach {address} can use the model; see --api-key", file=sys.stderr)
        print(
            f"{address}/v1 serves {name}: {batch} answers at once "
            f"(KV cache {size(engine.cache_bytes)}), {queue} may wait",
            file=sys.stderr,
            flush=True,
        )
        uvicorn.Server(settings).run(sockets=[listener])
    finally:
        engine.stop()


def _read_template(file: Path) -> str:
    """Read a chat template whose syntax is right."""
    try:
        template = read_text(file)
    except Unreadable as error:
        raise UserError(
            f"--chat-template {file}: cannot be read ({error}); give a file with a template (Jinja)"
        ) from None
    if mistake := mistake_in_template(template):
        raise UserError(f"--chat-template {file}: {mistake}")
    return template


def _listener(host: str, port: int) -> socket.socket:
    """Return a socket that has the address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # only now another process that listens on the port is noticed
    except OSError as error:
        raise UserError(
            f"--port: cannot listen on port {port} of {host} ({os_reason(error)}); choose another, or 0 for a free one"
        ) from None
    return listener
