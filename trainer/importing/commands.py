"""`import`, `upcycle` and `resize` on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.config.completion import RunPath, complete_recipe
from trainer.config.options import Decorator, count_option, json_option, seed_option, set_option

_WRITES: tuple[Decorator, ...] = (
    click.argument("source", type=RunPath()),
    click.argument("out", type=click.Path(path_type=Path)),
    click.option(
        "--recipe",
        "base",
        metavar="RECIPE",
        shell_complete=complete_recipe,
        help="Recipe of which OUT/recipe.yaml has all but the model.  [default: that of a run SOURCE, or quickstart]",
    ),
    set_option,
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        help="Type of the weights; routers are always float32.  [default: that of the weights in SOURCE]",
    ),
    click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        help="A tokenizer.json, or its folder.  [default: that of SOURCE]",
    ),
    json_option,
)
"""Arguments and options of all three commands."""


def _writes(command: Any) -> Any:
    for decorate in reversed(_WRITES):
        command = decorate(command)
    return command


def _show(written: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(dumps(written))
        return
    if "resized" in written:
        print(written["resized"])
    print("{path}: {parameters:,} parameters, {dtype}".format(**written))
    for name, size in written["files"].items():
        print(f"{size:>16,} bytes  {name}")


@click.command("import", short_help="Convert a Hugging Face checkpoint to an export to start from.")
@_writes
@count_option("--seq-len", "Tokens per sequence.  [default: max_position_embeddings in SOURCE]", metavar="N")
def import_(
    source: Path,
    out: Path,
    base: str | None,
    overrides: tuple[str, ...],
    dtype: str | None,
    tokenizer: Path | None,
    as_json: bool,
    seq_len: int | None,
) -> None:
    """Write the Hugging Face checkpoint SOURCE, a folder with config.json and safetensors, as an export to OUT.

    LLaMA, Mistral, Qwen2 and Qwen3 become dense models; Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE become vanilla ones, in
    which each layer has its own experts. The logits stay the same. What the model's backbone does not have is refused.
    OUT is an export of format hf, with a recipe.yaml that trains on from it.

    \b
    Examples:
      unipool import downloads/OLMoE-1B-7B runs/olmoe --seq-len 1024
      unipool train runs/olmoe/recipe.yaml --set train.lr=1e-5
    """
    from trainer.importing.source import opened
    from trainer.importing.write import recipe_for, write

    with opened(source, seq_len) as model:
        recipe = recipe_for(model, out, base, overrides)
        model.check(recipe)
        _show(write(model, recipe, out, dtype, tokenizer), as_json)


def _refuse(names: Iterable[str], why: str) -> None:
    """Refuse options that a command has no use for.

    Raises:
        UserError: One of them was given.
    """
    for name in names:
        if click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UserError(f"--{name}: {why}; leave it out".replace("_", "-", 1))


_noise_option = click.option(
    "--noise",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Standard deviation of the noise on copies and on new rows of routers, relative to that of the weights.",
)
_distance_option = click.option(
    "--distance",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="How far below the others a softmax router begins with experts that no token shall choose yet, in nats.",
)


@click.command(short_help="Turn a dense or vanilla model into one with a pool that computes the same.")
@_writes
@count_option("--experts", "Experts of the pool, for a dense model.  [default: two for each layer]", metavar="M")
@count_option("--top-k", "Experts per token, for a dense model.", 2, metavar="K")
@click.option(
    "--router",
    type=click.Choice(["softmax", "norm"]),
    default="softmax",
    show_default=True,
    help="Router, for a dense model; norm needs two experts for each layer and top-1.",
)
@_noise_option
@_distance_option
@seed_option
def upcycle(
    source: Path,
    out: Path,
    base: str | None,
    overrides: tuple[str, ...],
    dtype: str | None,
    tokenizer: Path | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Turn SOURCE into a model whose layers share one pool, and write it as an export to OUT, as `import` does.

    SOURCE is a run, an export, or a Hugging Face checkpoint that `import` accepts. If it is dense, the pool has copies
    of each layer's FFN. If its layers have their own experts, the pool has all of them. Each layer's router starts at
    the layer's own experts, so that with --noise 0 the logits stay the same; from there, training decides.

    \b
    Examples:
      unipool upcycle runs/dense runs/upcycled --experts 32 --noise 0.01
      unipool upcycle downloads/OLMoE-1B-7B runs/olmoe-pool --distance 5
    """
    from trainer.importing.source import opened
    from trainer.importing.upcycle import How, upcycled
    from trainer.importing.write import recipe_for, write

    with opened(source) as model:
        if model.sections["model"]["ffn"] != "dense":
            _refuse(("router", "top_k"), "SOURCE has experts and routers of its own")
        model.check(recipe_for(model, out, None))
        made = upcycled(model, How(**how))
        _show(write(made, recipe_for(made, out, base, overrides), out, dtype, tokenizer), as_json)


@click.command(short_help="Split the busiest experts of a model, or remove those that add least.")
@_writes
@count_option("--experts", "Experts of the new model, at most twice as many.  [required]", metavar="M")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="File on which the use of experts is measured.  [default: a run's last steps to grow, held-out text to prune]",
)
@click.option("--merge", is_flag=True, help="Prune by merging the experts that are most alike on --text.")
@_noise_option
@_distance_option
@seed_option
def resize(
    source: Path,
    out: Path,
    base: str | None,
    overrides: tuple[str, ...],
    dtype: str | None,
    tokenizer: Path | None,
    as_json: bool,
    experts: int | None,
    text: Path | None,
    merge: bool,
    **how: Any,
) -> None:
    """Give SOURCE more or fewer experts, and write it as an export to OUT, as `import` does.

    SOURCE is a run, an export, or a Hugging Face checkpoint that `import` accepts. With more experts, the busiest are
    split in two, so that with --noise 0 the logits stay the same; noise lets the halves become different. With fewer,
    those that add least are removed, or, with --merge, those that `probe redundancy` finds most alike become one.

    \b
    Examples:
      unipool resize runs/quickstart runs/larger --experts 128 --noise 0.01
      unipool resize runs/quickstart runs/smaller --experts 48
      unipool resize runs/olmoe-pool runs/olmoe-half --experts 512 --merge --text corpus.txt
    """
    from trainer.export.write import check_free
    from trainer.importing.resize import check_experts, measured, recorded, resized
    from trainer.importing.source import opened
    from trainer.importing.upcycle import How
    from trainer.importing.write import recipe_for, write

    check_free(out.resolve())
    if experts is None:
        raise UserError("--experts: must be given, the number of experts of the new model")
    with opened(source) as model:
        model.check(recipe_for(model, out, None))
        grows = check_experts(model, experts)
        if not grows or merge:
            _refuse(("noise", "distance"), "no expert is split")
        if merge:
            if text is None:
                raise UserError("--merge: needs --text, a file on whose tokens the experts are compared")
            from trainer.importing.merge import merged

            made, said = merged(model, experts, text, how["seed"]), {}
        else:
            usage = recorded(model) if grows and text is None else measured(model, text)
            made, summary = resized(model, experts, usage, How(**how))
            said = {"resized": summary}
        recipe = recipe_for(made, out, base, overrides)
        if grows and recipe.train.freeze != "none":
            raise UserError(
                f"train.freeze = {recipe.train.freeze}: the halves of a split expert could not become different; "
                "add --set train.freeze=none"
            )
        _show(write(made, recipe, out, dtype, tokenizer) | said, as_json)
