"""Writing an imported or upcycled model: an export of format hf, and a recipe that trains on from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from trainer.common.atomic import atomic_folder
from trainer.common.errors import UserError
from trainer.common.safe_read import read_bytes
from trainer.common.strict_json import loads
from trainer.config.recipe import Recipe, check_recipe, parse_override, read_tree, save_recipe
from trainer.data.tokenizer import chat_settings, end_of_document_id, load_tokenizer, vocabulary
from trainer.export.exported_model import chat_arguments, tokenizer_settings
from trainer.export.initial import MAY_DIFFER
from trainer.export.names import CONFIG_KEYS, Shape, exported_shapes
from trainer.export.saved_run import model_config
from trainer.export.write import check_free, write_model_files, write_weights
from trainer.importing.source import Source
from trainer.planning.model_costs import count_parameters

RECIPE = "recipe.yaml"


@dataclass
class _Tensors:
    """The tensors of an export by their names."""

    shapes: dict[str, Shape]
    read: Callable[[str], Tensor]


def recipe_for(source: Source, out: Path, base: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe that trains on from the export `out` of a model.

    Args:
        base: The recipe that everything but the model comes from; None takes that of the run, or quickstart.
        overrides: Texts as `--set` takes them.

    Raises:
        UserError: `base` does not exist, or a key or a value is wrong or would make it another model.
    """
    whole = source.tree if source.tree and base is None else read_tree(base or "quickstart")
    tree = {name: value for name, value in whole.items() if name not in (*source.sections, "lock")}
    if source.sections["model"]["ffn"] == "dense":
        ranks = dict(tree.get("parallel") or {})
        tree["parallel"] = {key: ranks[key] for key in ranks if key not in ("pool_ranks", "layout", "expert_parallel")}
    settings: list[tuple[str, Any]] = [
        ("run.dir", str(Path("runs") / f"{out.resolve().name}-tuned")),  # not OUT itself
        ("train.init_from", str(out)),
        ("data.tokenizer", str(out)),
    ]
    fixed = {key for field, key in CONFIG_KEYS.items() if field not in MAY_DIFFER} | {"model.head_dim"}
    for key, value in map(parse_override, overrides):
        if key in {*fixed, *source.sections}:
            raise UserError(f"--set {key}: must be left out: it is what the weights in {source.path} are")
        settings.append((key, value))
    return check_recipe({**tree, **source.sections}, settings, str(source.path))


def write(source: Source, recipe: Recipe, out: Path, dtype: str | None, tokenizer: Path | None) -> dict[str, Any]:
    """Write a model; return the folder, the number of parameters, their type, and the sizes of the files.

    Args:
        source: The model.
        recipe: The recipe that trains on from it.
        out: The folder to write, which must not exist or be empty.
        dtype: "float32" or "bfloat16"; by default the type of the stored weights. Routers are always fp32.
        tokenizer: A tokenizer.json or its folder; by default the model's own.

    Raises:
        UserError: `out` is in use or cannot be written, or the tokenizer cannot be used with the model.
    """
    path = out.resolve()
    check_free(path)
    kind = dtype or source.dtype
    chat = source.chat if tokenizer is None else None
    arguments = _tokenizer(tokenizer or source.tokenizer, chat, recipe)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(path) as partial:
            write_model_files(model_config(recipe), *arguments, partial, kind)
            save_recipe(recipe, partial / RECIPE)
            write_weights(_Tensors(exported_shapes(recipe), source.read), partial, getattr(torch, kind))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
    parameters = count_parameters(recipe).total
    return {"path": str(path), "source": str(source.path), "parameters": parameters, "dtype": kind, "files": files}


def _tokenizer(
    path: Path, chat: dict[str, Any] | None, recipe: Recipe
) -> tuple[Tokenizer, dict[str, Any], dict[str, Any]]:
    """Return the tokenizer, arguments of `PreTrainedTokenizerFast`, and what it says about conversations.

    See `saved_run.export_tokenizer`.

    Args:
        chat: What it says about conversations, if that is known; None reads the files beside it.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such file; give the model's tokenizer with --tokenizer FILE")
    tokenizer = load_tokenizer(str(file))
    if vocabulary(tokenizer) > recipe.model.vocab:
        ids = vocabulary(tokenizer)
        raise UserError(f"{file}: has {ids:,} ids, but the model's vocabulary is {recipe.model.vocab:,}")
    end = str(tokenizer.id_to_token(end_of_document_id(tokenizer)))
    tokenizer.post_processor = None
    special = {"bos_token": _begin(file, tokenizer) or end, "eos_token": end, "pad_token": end}
    settings = tokenizer_settings(special, recipe.model.seq_len)
    if chat is None:
        chat = chat_settings(str(file))
    return tokenizer, settings | chat_arguments(chat, tokenizer) if chat else settings, chat


def _begin(file: Path, tokenizer: Tokenizer) -> str | None:
    """Return the token that begins a text by the file beside a tokenizer.json, or None."""
    try:
        named = loads(read_bytes(file.with_name("tokenizer_config.json"))).get("bos_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = named.get("content") if isinstance(named, dict) else named
    return token if isinstance(token, str) and tokenizer.token_to_id(token) is not None else None
