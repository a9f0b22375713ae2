"""Tiny checkpoints of real classes, and the commands that read them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from click.testing import CliRunner, Result
from torch import Tensor

from trainer.cli import cli
from trainer.data.tokenizer import train_tokenizer

VOCAB = 300
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-4,
    "rope_theta": 1e4,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = {"num_experts_per_tok": 2, "num_experts": 5, "moe_intermediate_size": 12}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, wide heads, tied": ("Llama", {"head_dim": 10, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_experts_per_tok": 2, "num_local_experts": 4}),
    "olmoe": ("Olmoe", {"num_experts_per_tok": 3, "num_experts": 5}),
    "olmoe, renormalised": ("Olmoe", {"num_experts_per_tok": 3, "num_experts": 5, "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 14}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"head_dim": 8, "norm_topk_prob": True}),
}


@cache
def tokenizer() -> str:
    return train_tokenizer(["def main(argument):\n    return argument\n" * 20], VOCAB).to_str()


def checkpoint(family: str, folder: Path, **fields: Any) -> Any:
    """Write a checkpoint of a tiny model whose weights are so large that all of them matter; return the model."""
    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SHAPE | own | fields))
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer.json").write_text(tokenizer())
    return model


def unipool(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def refusal(*arguments: str | Path) -> str:
    done = unipool(*arguments)
    assert done.exit_code != 0 and done.exception is not None
    assert "\n" not in str(done.exception)
    return str(done.exception)


def some_tokens() -> Tensor:
    return torch.randint(1, VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
