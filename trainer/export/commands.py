"""`export` and `generate` of the command line."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps

if TYPE_CHECKING:
    from trainer.export.write import Format


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["hf", "safetensors"]),
    default="hf",
    show_default=True,
    help="hf: a folder for transformers, with model code and tokenizer; safetensors: the weights and the recipe.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the weights; routers stay float32.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export(run: Path, out: Path, form: Format, dtype: str, as_json: bool) -> None:
    """Write the newest checkpoint of RUN, or the checkpoint RUN (checkpoints/step_*), to the folder OUT.

    With --format hf transformers loads OUT without this trainer: AutoModelForCausalLM.from_pretrained(OUT,
    trust_remote_code=True). Both formats have the same tensors, named as in a LLaMA; the pool is there once, as
    model.experts.I.{gate,up,down}_proj.weight.

    \b
    Examples:
      unipool export runs/quickstart --format hf runs/quickstart-hf
      unipool export runs/quickstart/checkpoints/step_00000240 weights --format safetensors --dtype bfloat16
    """
    from trainer.export.write import export as write

    exported = write(run, out, form, dtype)
    if as_json:
        print(dumps(asdict(exported)))
        return
    print(f"{exported.path}: {exported.checkpoint}, {exported.parameters:,} parameters, {exported.dtype}")
    for name, size in exported.files.items():
        print(f"{size:>16,} bytes  {name}")


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue; - reads it from stdin.")
@click.option("--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="New tokens at most.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0 takes the likeliest token."
)
@click.option("--top-k", type=click.IntRange(min=1), help="Choose among the K likeliest tokens; default: all.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Choose among the fewest tokens that have this probability together.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same one, the same text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of the text.")
def generate(
    source: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    as_json: bool,
) -> None:
    """Continue a text with SOURCE: a run, a checkpoint of it, or an export of format hf.

    Prints prompt and continuation as they are made. It ends with the document, after --tokens, or where the model's
    window (its recipe's model.seq_len) is full; a prompt that fills the window is refused.

    \b
    Examples:
      unipool generate runs/quickstart --prompt "def main("
      unipool generate runs/quickstart-hf --prompt - --temperature 0 < prompt.txt
    """
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()  # an argument that is no UTF-8 is found here
    except UnicodeError:
        raise UserError("--prompt: is not UTF-8") from None
    from trainer.export.generate import Sampling
    from trainer.export.generate import generate as run_model

    made = run_model(source, text, tokens, Sampling(temperature, top_k, top_p, seed), stream=not as_json)
    if as_json:
        print(dumps(asdict(made)))
        return
    print(f"{made.tokens} tokens, {made.tokens / made.seconds:,.0f} a second", file=sys.stderr)
