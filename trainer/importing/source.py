"""A model to import or to upcycle: a Hugging Face checkpoint, a run, or an export of this trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.common.errors import UserError
from trainer.config.recipe import Recipe
from trainer.export.folder import StoredTensors, is_export, read_object
from trainer.export.model_files.configuration_unipool import UniPoolConfig
from trainer.export.names import CONFIG_KEYS, exported_shapes
from trainer.export.saved_run import find_run, open_weights, run_chat
from trainer.importing.families import Sections, read_config, sections_of, their_name

TOKENIZER = "tokenizer.json"
SECTIONS = ("model", "router", "pool", "balance")
"""The sections of a recipe that say what the model is."""


@dataclass(frozen=True)
class Source:
    """A model by its sections of a recipe and its weights.

    Attributes:
        path: The path that the user gave.
        sections: `model`, `router`, `pool` and, if known, `balance` of its recipe.
        read: Reads a tensor by its exported name.
        check: Raises UserError unless the tensors are those of the recipe's model.
        dtype: The type of the stored weights, as `export --dtype` calls it.
        tokenizer: The folder or file of its tokenizer.
        tree: The whole recipe of a run; None for others.
        chat: What a run's tokenizer says about conversations; None for others, where files beside it say so.
    """

    path: Path
    sections: Sections
    read: Callable[[str], Tensor]
    check: Callable[[Recipe], None]
    dtype: str
    tokenizer: Path
    tree: dict[str, Any] | None = None
    chat: dict[str, Any] | None = None


@contextmanager
def opened(path: Path, seq_len: int | None = None) -> Iterator[Source]:
    """Open a model.

    Args:
        path: Its folder.
        seq_len: Tokens per sequence, if not those that a Hugging Face model was made for.

    Raises:
        UserError: It is none of the three, is of a family that the backbone cannot be, or is incomplete.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a Hugging Face checkpoint, a run or an export")
    if not is_export(path):
        run = find_run(path, ", an export or a Hugging Face checkpoint")
        if run.recipe.lock:
            raise UserError(f"{path}: the layers of this run own their experts; give a run without a section lock")
        own = run.home / TOKENIZER
        tokenizer = own if own.is_file() else Path(run.recipe.data.tokenizer)
        tree = run.recipe.model_dump(mode="json")
        with open_weights(run) as weights:
            sections = {name: tree[name] for name in SECTIONS}
            # The weights of a checkpoint are checked when they are read.
            yield Source(path, sections, weights.read, lambda _: None, "float32", tokenizer, tree, run_chat(run))
        return
    stored = read_object(path / "config.json")
    if stored.get("model_type") == UniPoolConfig.model_type:
        yield _of_export(path, stored)
    else:
        yield _of_checkpoint(path, seq_len)


def _of_export(path: Path, stored: dict[str, Any]) -> Source:
    if stored.get("expert_owners") is not None:
        raise UserError(f"{path}: the layers of this model own their experts; give a model without expert_owners")
    sections: Sections = {name: {} for name in SECTIONS}
    for name, key in CONFIG_KEYS.items():
        section, _, leaf = key.partition(".")
        if name in stored:
            sections[section][leaf] = stored[name]
    model = sections["model"]
    model["head_dim"] = stored.get("head_dim")
    if model.get("ffn") == "dense":
        sections |= {"router": {}, "pool": {}}
    del sections["balance"]  # config.json does not say
    tensors = StoredTensors(path)

    def check(recipe: Recipe) -> None:
        tensors.check(exported_shapes(recipe), "its config.json")

    return Source(path, sections, tensors.read, check, _stored_type(tensors), path)


def _of_checkpoint(path: Path, seq_len: int | None) -> Source:
    config = read_config(path)
    sections = sections_of(config, path / "config.json", seq_len)
    if not any(path.glob("model*.safetensors")):
        raise UserError(f"{path}: has no model*.safetensors; weights in other formats are not read")
    tensors = StoredTensors(path)

    def read(name: str) -> Tensor:
        return tensors.read(their_name(name, config))

    def check(recipe: Recipe) -> None:
        needed = {their_name(name, config): shape for name, shape in exported_shapes(recipe).items()}
        # A tied output projection may be stored twice; frequencies of rotary embeddings are no weights.
        ignored = {name for name in tensors.shapes if name.endswith("rotary_emb.inv_freq")} | {"lm_head.weight"}
        for name in sorted(needed.keys() | (tensors.shapes.keys() - ignored)):
            found, shape = tensors.shapes.get(name, "missing"), needed.get(name, "unknown")
            if found != shape:
                raise UserError(f"{path}: the shape of the tensor {name} is {found}, but {shape} by config.json")

    return Source(path, sections, read, check, _stored_type(tensors), path)


def _stored_type(tensors: StoredTensors) -> str:
    return "bfloat16" if set(tensors.types.values()) - {"F32"} == {"BF16"} else "float32"
