"""A run's checkpoint as an export reads it: its recipe, its weights by their exported names, and its tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from router import norm_constant
from trainer.checkpoint.format import MARKER_FILE, RECIPE_FILE, newest, read_info, read_ownership
from trainer.checkpoint.reshard import SavedCheckpoint, convert
from trainer.common.errors import UserError
from trainer.config.lock import stage_of
from trainer.config.recipe import Recipe, load_recipe
from trainer.data.prepare import prepare_for
from trainer.data.prepared_data import CHAT_FILE, TOKENIZER_FILE, PreparedData
from trainer.data.settings import TRAIN
from trainer.data.tokenizer import end_of_document_id, load_tokenizer
from trainer.export.exported_model import chat_arguments, filled_model, tokenizer_settings
from trainer.export.folder import first_line, read_object
from trainer.export.model_files.modeling_unipool import UniPoolConfig, UniPoolForCausalLM
from trainer.export.names import Parts, config_fields, expert_names, exported_shapes, trunk_names


@dataclass(frozen=True)
class SavedRun:
    """A complete checkpoint (its folder) and the recipe that it was trained with."""

    recipe: Recipe
    folder: Path

    @property
    def home(self) -> Path:
        """The folder of the run that the checkpoint is in."""
        return self.folder.resolve().parent.parent


def find_run(path: Path, or_else: str = "") -> SavedRun:
    """Find the newest checkpoint in a run's folder, or open the checkpoint folder `path` itself.

    Args:
        path: The folder.
        or_else: What else the user could have given, for messages, as in ", or an export".

    Raises:
        UserError: There is no complete checkpoint, its recipe cannot be read, or its routing was forced.
    """
    wanted = f"give a run's folder or one of its checkpoints/step_*{or_else}"
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; {wanted}")
    found = newest(path / "checkpoints")
    step = found[1] if found else path
    if not (step / MARKER_FILE).is_file():
        raise UserError(f"{path}: has no complete checkpoint; {wanted}")
    recipe = load_recipe(str(step / RECIPE_FILE))
    if recipe.router.force is not None:
        raise UserError(
            f"{path}: trained with router.force = {recipe.router.force}, so that its model has not learned to route; "
            "give a run without that key"
        )
    return SavedRun(recipe, step)


def data_of(run: SavedRun) -> PreparedData:
    """Return the data that a run was trained on, preparing it again if necessary.

    Raises:
        UserError: The data is not prepared, and its source is not available.
    """
    try:
        return prepare_for(run.recipe)
    except UserError as error:
        raise UserError(f"{run.folder}: the data of this run: {error}; or use another text with --text") from error


class Weights:
    """The weights of a checkpoint (fp32) by their exported names.

    Attributes:
        shapes: The shapes of all tensors, by name.
    """

    def __init__(self, run: SavedRun, saved: SavedCheckpoint):
        self._folder = run.folder
        self._fused: dict[str, tuple[Callable[[], Tensor], Parts]] = {}
        for ours, parts in trunk_names(run.recipe).items():
            self._fused |= dict.fromkeys(parts, (partial(saved.trunk.weight, ours), parts))
        for expert in range(run.recipe.pool.experts):
            for stack, parts in expert_names(run.recipe, expert).items():
                self._fused |= dict.fromkeys(parts, (partial(saved.expert_weight, stack, expert), parts))
        self.shapes = exported_shapes(run.recipe)

    def read(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            UserError: It cannot be read, or the recipe requires another shape.
        """
        read, parts = self._fused[name]
        with _damage_reported(self._folder):
            fused = read()
        rows = [shape[0] for shape in parts.values()]
        required = (sum(rows), *self.shapes[name][1:])
        if fused.shape != required:
            raise UserError(
                f"{self._folder}: {' + '.join(parts)}: the shape is {tuple(fused.shape)}, but {required} by the recipe"
            )
        tensor: Tensor = fused.split(rows)[list(parts).index(name)]
        return tensor


@contextmanager
def open_weights(run: SavedRun, work: Path | None = None) -> Iterator[Weights]:
    """Open the weights of a checkpoint; `work` is where the partitions of ZeRO are put together temporarily."""
    with tempfile.TemporaryDirectory(dir=work, prefix=".unipool-") as folder:
        with _damage_reported(run.folder):
            convert(run.folder, Path(folder))
            saved = SavedCheckpoint(run.folder, Path(folder))
        yield Weights(run, saved)


@contextmanager
def _damage_reported(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch, pickle, json and DeepSpeed each raise their own kinds
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{folder}: the checkpoint is damaged or from another version ({reason})") from error


def model_config(recipe: Recipe, **locked: Any) -> UniPoolConfig:
    """Return the configuration of a recipe's model; `locked` are the arguments that a lock adds."""
    constant = 1.0
    if recipe.model.ffn == "pool" and recipe.router.has_norm:
        constant = norm_constant(recipe.experts_per_layer, recipe.router.top_k)
    return UniPoolConfig(**config_fields(recipe), **locked, router_constant=constant)


def run_config(run: SavedRun) -> UniPoolConfig:
    """Return the configuration of a checkpoint's model, with the experts that each layer owns in it.

    Raises:
        UserError: They cannot be read.
    """
    record = read_ownership(run.folder) if run.recipe.lock else None
    if record is None:
        return model_config(run.recipe)
    factor = 1.0 - stage_of(run.recipe, read_info(run.folder).steps).alpha
    with _damage_reported(run.folder):
        return model_config(run.recipe, expert_owners=list(record.owners), foreign_expert_factor=factor)


def export_tokenizer(run: SavedRun) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer that the run was trained with, and arguments of `PreTrainedTokenizerFast`.

    Raises:
        UserError: The run's own tokenizer is missing.
    """
    name, own = run.recipe.data.tokenizer, run.home / TOKENIZER_FILE
    if name == TRAIN and not own.is_file():
        raise UserError(
            f"{own}: no such file, but the run was trained with it; copy it there, or export with --format safetensors"
        )
    tokenizer = load_tokenizer(str(own) if own.is_file() else name)
    end = str(tokenizer.id_to_token(end_of_document_id(tokenizer)))
    # Training adds no special tokens around a text, and a document starts after the end of another one.
    tokenizer.post_processor = None
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)
    settings = tokenizer_settings(special, run.recipe.model.seq_len)
    chat = run_chat(run)
    return tokenizer, settings | chat_arguments(chat, tokenizer) if chat else settings


def run_chat(run: SavedRun) -> dict[str, Any]:
    """Return what the run's tokenizer says about conversations (see `chat_settings`); {} without a chat template."""
    kept = run.home / CHAT_FILE
    return read_object(kept) if kept.is_file() else {}


def end_ids(chat: dict[str, Any], end: int) -> int | list[int]:
    """Return the tokens that end a generated text: the one that ends a document, and those that end an answer."""
    stored = chat.get("generation", {}).get("eos_token_id")
    more = [token for token in (stored if isinstance(stored, list) else [stored]) if type(token) is int]
    return sorted({end, *more}) if {*more} - {end} else end


def load_run(run: SavedRun) -> tuple[UniPoolForCausalLM, PreTrainedTokenizerFast]:
    """Load the model (fp32) and the tokenizer of a run's checkpoint."""
    tokenizer, settings = export_tokenizer(run)
    with open_weights(run) as weights:
        model = filled_model(run_config(run), weights.read, torch.float32)
    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    ends = end_ids(run_chat(run), loaded.eos_token_id)
    model.generation_config.update(eos_token_id=ends, pad_token_id=loaded.pad_token_id)
    return model, loaded
