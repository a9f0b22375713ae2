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
from trainer.checkpoint import newest, read_placement
from trainer.config import Recipe, load_recipe
from trainer.data.tokenizer import end_of_document_id
from trainer.errors import UserError
from trainer.export.modeling_unipool import UniPoolConfig, UniPoolForCausalLM
from trainer.prepare import tokenizer_for
from trainer.reshape import SavedCheckpoint, convert


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
    if not (step / "layout.json").is_file():
        raise UserError(
            f"{path}: has no checkpoint; give a run's folder that has one, or one of its checkpoints/step_*"
        )
    beside = [step / "recipe.yaml", step.resolve().parent.parent / "recipe.yaml"]
    recipe = next((file for file in beside if file.is_file()), None)
    if recipe is None:
        raise UserError(f"{step}: has no recipe.yaml, neither of its own nor in the run's folder")
    return SavedRun(load_recipe(str(recipe)), step)


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
        model = empty_model(run.recipe)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.expected: dict[str, Tensor] = model.state_dict()
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
            saved = SavedCheckpoint(run.folder, read_placement(run.folder), Path(folder))
        yield Weights(run, saved)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch, pickle, json and deepspeed each have their own
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{folder}: a damaged checkpoint, or of another version ({reason})") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message; may be empty."""
    return str(error).partition("\n")[0]


def _readers(recipe: Recipe, saved: SavedCheckpoint) -> dict[str, Callable[[], Tensor]]:
    """How to read each tensor, by its exported name."""
    m = recipe.model
    found: dict[str, Callable[[], Tensor]] = {}

    def whole(name: str, ours: str) -> None:
        found[name] = partial(saved.trunk.weight, ours)

    def rows(read: Callable[[], Tensor], parts: dict[str, int]) -> None:
        """Cut into parts of so many rows, in their order."""
        start = 0
        for name, count in parts.items():
            found[name] = partial(_rows, read, start, start + count)
            start += count

    whole("model.embed_tokens.weight", "embedding.weight")
    whole("model.norm.weight", "head.norm.weight")
    whole("lm_head.weight", "head.out.weight")
    head_dim = m.hidden // m.heads
    heads = {"q_proj": m.heads, "k_proj": m.kv_heads, "v_proj": m.kv_heads}
    for layer in range(m.layers):
        name, ours = f"model.layers.{layer}", f"blocks.{layer}"
        qkv = partial(saved.trunk.weight, f"{ours}.attention.qkv.weight")
        rows(qkv, {f"{name}.self_attn.{part}.weight": count * head_dim for part, count in heads.items()})
        whole(f"{name}.self_attn.o_proj.weight", f"{ours}.attention.out.weight")
        whole(f"{name}.input_layernorm.weight", f"{ours}.attention_norm.weight")
        whole(f"{name}.post_attention_layernorm.weight", f"{ours}.ffn_norm.weight")
        if m.ffn == "dense":
            w13 = partial(saved.trunk.weight, f"{ours}.ffn.w13.weight")
            rows(w13, {f"{name}.mlp.{part}_proj.weight": m.ffn_hidden for part in ("gate", "up")})
            whole(f"{name}.mlp.down_proj.weight", f"{ours}.ffn.w2.weight")
            continue
        whole(f"{name}.router.weight", f"{ours}.router.weight_MD")
        if recipe.router.kind == "norm":
            whole(f"{name}.router.sigma", f"{ours}.router.sigma")
        if recipe.router.kind == "sigmoid_bias":
            found[f"{name}.router.expert_bias"] = partial(_buffer, saved, f"{ours}.router.expert_bias_M")
    for expert in range(recipe.pool.experts):
        name = f"model.experts.{expert}"
        w13 = partial(saved.expert_weight, "w13_e2FD", expert)
        rows(w13, {f"{name}.{part}_proj.weight": m.ffn_hidden for part in ("gate", "up")})
        found[f"{name}.down_proj.weight"] = partial(saved.expert_weight, "w2_eDF", expert)
    return found


def _rows(read: Callable[[], Tensor], start: int, stop: int) -> Tensor:
    return read()[start:stop]


def _buffer(saved: SavedCheckpoint, name: str) -> Tensor:
    return saved.trunk.buffers[name]


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
        initializer_range=m.init_std,
    )


def empty_model(recipe: Recipe) -> UniPoolForCausalLM:
    """A recipe's model without memory for its weights (on torch's meta device)."""
    config = model_config(recipe)
    with torch.device("meta"):
        return UniPoolForCausalLM(config)


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


def export_tokenizer(recipe: Recipe) -> ExportedTokenizer:
    """The tokenizer that the run was trained with."""
    tokenizer = tokenizer_for(recipe)
    end_id = end_of_document_id(tokenizer)
    # Training adds no special tokens round a text.
    tokenizer.post_processor = None
    end = tokenizer.id_to_token(end_id)
    settings = {
        # A document begins behind the end of another one.
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",
        "model_max_length": recipe.model.seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    return ExportedTokenizer(tokenizer.to_str(pretty=True), settings, end_id)
