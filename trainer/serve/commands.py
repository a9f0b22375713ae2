"""`serve` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trainer.config.completion import RunPath
from trainer.config.options import count_option, device_option


@click.command(short_help="Serve a model over HTTP, as the OpenAI API does.")
@click.argument("source", type=RunPath())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all of them.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0: a free one.")
@click.option("--name", help="Name of the model for clients.  [default: the run's or the export's folder]")
@count_option("--batch", "Answers that are computed together; the KV cache holds a full window for each.", 8)
@click.option(
    "--queue", type=click.IntRange(0), default=64, show_default=True, help="Answers that may wait; more get status 503."
)
@click.option("--api-key", metavar="VARIABLE", help="Require the key that this environment variable holds.")
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A chat template (Jinja), instead of the tokenizer's.",
)
@device_option
@click.option(
    "--grace", type=click.IntRange(0), default=30, show_default=True, help="Seconds to complete answers after SIGTERM."
)
def serve(source: Path, **settings: Any) -> None:
    """Serve SOURCE, a run, a checkpoint of it, or an export of format hf, to clients of the OpenAI API.

    It answers /v1/completions, /v1/chat/completions (with a chat template), /v1/models, /health and /metrics. Requests
    are computed together by transformers' continuous batching; streaming, stop sequences and seeds work. SIGTERM
    completes what has begun. It needs the extra `serve`.

    \b
    Examples:
      unipool serve runs/quickstart
      unipool serve runs/quickstart-hf --port 8080 --batch 16 --api-key UNIPOOL_API_KEY
    """
    from trainer.serve.server import serve as run

    run(source, **settings)
