"""A run's checkpoint as an export sees it: the model's configuration, weights by their exported names, the tokenizer.

The names are those of `trainer/export/modeling_unipool.py`. Fused tensors of the trainer are cut into their rows; no
number changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from router import norm_constant
from trainer.checkpoint.format import MARKER_FILE, RECIPE_FILE, newest
from trainer.checkpoint.reshard import SavedCheckpoint, convert
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe, load_recipe
from trainer.data.prepare import prepare_for
from trainer.data.prepared_data import PreparedData
from trainer.data.settings import TRAIN
from trainer.data.tokenizer import end_of_document_id, load_tokenizer
from trainer.export.folder import first_line, tokenizer_settings
from trainer.export.modeling_unipool import UniPoolConfig, UniPoolForCausalLM
from trainer.export.names import Parts, expert_names, trunk_names
from trainer.telemetry.run_folder import TOKENIZER_FILE


@dataclass(frozen=True)
class SavedRun:
    """A complete checkpoint and the recipe that it is of."""

    recipe: Recipe
    folder: Path


def find_run(path: Path) -> SavedRun:
    """The newest checkpoint of a run's folder, or one of its folders checkpoints/step_*.

    Raises:
        UserError: nothing of that kind is there, or its recipe cannot be read.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run's folder or one of its checkpoints/step_*")
    found = newest(path / "checkpoints")
    step = found[1] if found else path
    if not (step / MARKER_FILE).is_file():
        raise UserError(
            f"{path}: has no complete checkpoint; give a run's folder that has one, or one of its checkpoints/step_*"
        )
    return SavedRun(load_recipe(str(step / RECIPE_FILE)), step)


def data_of(run: SavedRun) -> PreparedData:
    """The data that a run was trained on.

    Raises:
        UserError: they are neither prepared nor to be had any more.
    """
    try:
        return prepare_for(run.recipe)
    except UserError as error:
        raise UserError(f"{run.folder}: the data of this run: {error}; or give other text by --text") from error


class Weights(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their exported names, fp32, each read when it is asked for.

    Attributes:
        parameters: how many numbers were learned.
        expected: tensors without memory, of the right shapes.

    Raises:
        UserError: a tensor cannot be read, or has another shape than the recipe says.
    """

    def __init__(self, run: SavedRun, saved: SavedCheckpoint):
        self._folder = run.folder
        self._readers = _readers(run.recipe, saved)
        model = empty_model(model_config(run.recipe))
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.expected = stored_tensors(model)
        assert self.expected.keys() == self._readers.keys(), self.expected.keys() ^ self._readers.keys()

    def __getitem__(self, name: str) -> Tensor:
        with _readable(self._folder):
            tensor = self._readers[name]()
        if tensor.shape != self.expected[name].shape:
            raise UserError(
                f"{self._folder}: {name} is {tuple(tensor.shape)}, by the recipe {tuple(self.expected[name].shape)}"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@contextmanager
def open_weights(run: SavedRun, work: Path | None = None) -> Iterator[Weights]:
    """The weights of a run's checkpoint.

    Args:
        work: where a partitioned checkpoint (ZeRO 1 to 3) is put together for the time; default: the system's folder.
    """
    with tempfile.TemporaryDirectory(dir=work, prefix=".unipool-") as folder:
        with _readable(run.folder):
            convert(run.folder, Path(folder))
            saved = SavedCheckpoint(run.folder, Path(folder))
        yield Weights(run, saved)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch, pickle, json and deepspeed each have their own
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{folder}: a damaged checkpoint, or of another version ({reason})") from error


def _readers(recipe: Recipe, saved: SavedCheckpoint) -> dict[str, Callable[[], Tensor]]:
    """How to read each tensor, by its exported name."""
    found: dict[str, Callable[[], Tensor]] = {}

    def add(read: Callable[[], Tensor], parts: Parts) -> None:
        start = 0
        for name, rows in parts.items():
            found[name] = partial(_rows, read, start, start + rows) if len(parts) > 1 else read
            start += rows

    for ours, parts in trunk_names(recipe).items():
        add(partial(saved.trunk.weight, ours), parts)
    for expert in range(recipe.pool.experts):
        for stack, parts in expert_names(recipe, expert).items():
            add(partial(saved.expert_weight, stack, expert), parts)
    return found


def _rows(read: Callable[[], Tensor], start: int, stop: int) -> Tensor:
    return read()[start:stop]


def model_config(recipe: Recipe) -> UniPoolConfig:
    """The configuration of a recipe's model."""
    m, r = recipe.model, recipe.router
    constant = 1.0
    if m.ffn == "pool" and r.kind == "norm":
        constant = norm_constant(recipe.experts_per_layer, r.top_k)
    return UniPoolConfig(
        vocab_size=m.vocab,
        hidden_size=m.hidden,
        intermediate_size=m.ffn_hidden,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        max_position_embeddings=m.seq_len,
        rms_norm_eps=m.norm_eps,
        rope_theta=m.rope_base,
        ffn=m.ffn,
        num_experts=recipe.pool.experts,
        num_expert_groups=m.groups,
        num_experts_per_tok=r.top_k,
        router=r.kind,
        router_constant=constant,
        router_constant_factor=r.constant_factor,
        initializer_range=m.init_std,
    )


def empty_model(config: UniPoolConfig) -> UniPoolForCausalLM:
    """A model without memory for its weights (on torch's meta device)."""
    with torch.device("meta"):
        return UniPoolForCausalLM(config)


def stored_tensors(model: UniPoolForCausalLM) -> dict[str, Tensor]:
    """A model's tensors by their exported names; those of single experts are views of the model's stacks."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "model.experts.gate_up_proj":
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                found |= {f"model.experts.{expert}.{part}_proj.weight": t for part, t in (("gate", gate), ("up", up))}
        elif name == "model.experts.down_proj":
            found |= {f"model.experts.{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def filled_model(config: UniPoolConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> UniPoolForCausalLM:
    """A model with weights of the given type (routers: fp32), which are read one at a time.

    Args:
        weights: by their exported names.
    """
    model = empty_model(config)
    model.to(dtype)
    for layer in model.model.layers:
        if config.ffn == "pool":
            layer.router.float()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in stored_tensors(model).items():
            tensor.copy_(weights[name])
    return model


@dataclass(frozen=True)
class ExportedTokenizer:
    """A run's tokenizer for transformers.

    Attributes:
        json: the content of tokenizer.json.
        settings: arguments of `PreTrainedTokenizerFast`, and the content of tokenizer_config.json.
        end_id: the token between documents.
    """

    json: str
    settings: dict[str, Any]
    end_id: int

    def load(self) -> PreTrainedTokenizerFast:
        from tokenizers import Tokenizer

        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(self.json), **self.settings)


def export_tokenizer(run: SavedRun) -> ExportedTokenizer:
    """The tokenizer that the run was trained with: the run's folder has it, or its recipe names it.

    Raises:
        UserError: neither.
    """
    name, own = run.recipe.data.tokenizer, run.folder.resolve().parent.parent / TOKENIZER_FILE
    if name == TRAIN and not own.is_file():
        raise UserError(
            f"{own}: no such file; copy it from the run, whose tokenizer it is, or use --format safetensors"
        )
    tokenizer = load_tokenizer(str(own) if own.is_file() else name)
    end_id = end_of_document_id(tokenizer)
    # Training adds no special tokens round a text.
    tokenizer.post_processor = None
    end = tokenizer.id_to_token(end_id)
    # A document begins behind the end of another one.
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), str(end))
    settings = tokenizer_settings(special, run.recipe.model.seq_len)
    return ExportedTokenizer(tokenizer.to_str(pretty=True), settings, end_id)
