"""`export` and `generate` on the command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.config.completion import RunPath
from trainer.config.options import count_option, json_option, seed_option

if TYPE_CHECKING:
    from trainer.export.write import Format


def _size(_context: click.Context, _option: click.Parameter, text: str) -> str:
    """Check a size as huggingface_hub reads it, without loading it."""
    if not re.fullmatch(r"0*[1-9]\d*(\.\d+)?\s*[KMGT]B", text.strip(), re.IGNORECASE):
        raise UserError(f"--shard-size {text}: is not a size; allowed is a number with KB, MB, GB or TB, such as 5GB")
    return text.strip()


@click.command(short_help="Write a model for Hugging Face transformers.")
@click.argument("run", type=RunPath())
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["hf", "llama", "safetensors"]),
    default="hf",
    show_default=True,
    help="hf: a folder for transformers, with model code and tokenizer. llama: the same for a dense model, as a LLaMA "
    "that needs no code. safetensors: the weights and the recipe.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the weights; routers are always float32.",
)
@click.option(
    "--shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    callback=_size,
    help="Size up to which tensors share a file; one file at a time is in memory.",
)
@click.option(
    "--push-to-hub", "repo", metavar="OWNER/NAME", help="Upload the export to this repository of models on the hub."
)
@click.option("--private", is_flag=True, help="Make a new repository that only its owner may see.")
@json_option
def export(
    run: Path, out: Path, form: Format, dtype: str, shard_size: str, repo: str | None, private: bool, as_json: bool
) -> None:
    """Export a run's newest checkpoint, or the checkpoint RUN (checkpoints/step_*), to the folder OUT.

    An export of format hf is loaded by transformers without this trainer: AutoModelForCausalLM.from_pretrained(OUT,
    trust_remote_code=True). All formats contain the same tensors, which are named as in LLaMA. The pool is stored
    once, as model.experts.I.{gate,up,down}_proj.weight. Exports of formats hf and llama also have a model card,
    README.md, with the run's facts.

    \b
    Examples:
      unipool export runs/quickstart --format hf runs/quickstart-hf
      unipool export runs/quickstart/checkpoints/step_00000240 weights --format safetensors --dtype bfloat16
      unipool export runs/quickstart runs/quickstart-hf --shard-size 1GB --push-to-hub OWNER/NAME --private
    """
    if private and repo is None:
        raise UserError("--private: applies to an upload; give --push-to-hub OWNER/NAME as well, or leave it out")
    if repo is not None and form == "safetensors":
        raise UserError(f"--push-to-hub {repo}: takes an export that transformers reads; leave out --format {form}")
    from trainer.export.hub.push import check_push, push
    from trainer.export.write import export as write

    if repo is not None:
        check_push(repo)
    exported = write(run, out, form, dtype, shard_size)
    if repo is not None:
        exported["pushed_to"] = push(out, repo, private, f"Export of {Path(exported['checkpoint']).name}")
    if as_json:
        print(dumps(exported))
        return
    print("{path}: {checkpoint}, {parameters:,} parameters, {dtype}".format(**exported))
    for name, size in exported["files"].items():
        print(f"{size:>16,} bytes  {name}")
    if "pushed_to" in exported:
        print(f"pushed to {exported['pushed_to']}")


@click.command(short_help="Continue a text.")
@click.argument("source", type=RunPath())
@click.option("--prompt", required=True, help="Text to continue; - reads it from stdin.")
@count_option("--tokens", "Maximum new tokens.", 128)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.8,
    show_default=True,
    help="Temperature of sampling; 0 takes the most likely token.",
)
@count_option("--top-k", "Sample from the K most likely tokens.  [default: all]", metavar="K")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the smallest set of tokens with this total probability.",
)
@seed_option
@json_option
def generate(source: Path, prompt: str, as_json: bool, **sampling: float) -> None:
    """Continue a text with SOURCE: a run, a checkpoint of it, or an export of format hf.

    The prompt and its continuation are printed while they are generated. Generation stops at the end of the document,
    after --tokens, or when the model's window (model.seq_len of its recipe) is full. A prompt that fills the window is
    refused.

    \b
    Examples:
      unipool generate runs/quickstart --prompt "def main("
      unipool generate runs/quickstart-hf --prompt - --temperature 0 < prompt.txt
    """
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()  # fails for an argument that is not UTF-8
    except UnicodeError:
        raise UserError("--prompt: is not UTF-8") from None
    from trainer.export.generate import generate as run_model

    made = run_model(source, text, stream=not as_json, **sampling)  # type: ignore[arg-type]
    if as_json:
        print(dumps(made))
        return
    print(f"{made['tokens']} tokens, {made['tokens'] / made['seconds']:,.0f} tokens/s", file=sys.stderr)
