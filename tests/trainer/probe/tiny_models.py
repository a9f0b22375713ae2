"""Tiny random models of every supported family, and what their routers should do, token by token."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trainer.export.loaded_model import LoadedModel
from trainer.export.model_files.modeling_unipool import UniPoolConfig, UniPoolForCausalLM
from trainer.probe.adapters import MoEModel, adapt
from trainer.probe.text import Text

VOCAB = 300
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
}
QWEN = SHAPE | {"moe_intermediate_size": 8, "num_experts": 6, "decoder_sparse_step": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
GROUPS = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 1}
DEEPSEEK = SHAPE | LATENT | GROUPS | {"moe_intermediate_size": 8, "n_routed_experts": 8, "num_key_value_heads": 4}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, QWEN | {"shared_expert_intermediate_size": 12}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, QWEN | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, SHAPE | {"num_experts": 5}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, SHAPE | {"num_local_experts": 4}),
    "deepseek_v2": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        DEEPSEEK | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        DEEPSEEK | {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
    ),
    "unipool": (UniPoolConfig, UniPoolForCausalLM, SHAPE | {"num_experts": 6}),
    "sub-pools": (UniPoolConfig, UniPoolForCausalLM, SHAPE | {"num_experts": 6, "num_expert_groups": 3}),
}
FAMILIES = [name for name, (config, _, _) in MODELS.items() if config is not UniPoolConfig]


@cache
def built(name: str) -> Any:
    """Return a model with weights so large that every choice matters. All tests share it, so do not change it."""
    return fresh(name)


def fresh(name: str, **settings: Any) -> Any:
    """Return a new model, which may be changed."""
    config, model_class, shape = MODELS[name]
    model = model_class(config(**(shape | settings)))
    generator = torch.Generator().manual_seed(3)
    for parameter in (*model.parameters(), *(b for n, b in model.named_buffers() if "correction_bias" in n)):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.eval()


def adapted(model: Any, name: str = "x") -> MoEModel:
    return adapt(LoadedModel(Path(name), model, None, None))


def tiny(name: str) -> MoEModel:
    return adapted(built(name), name)


def some_text(rows: int = 5, length: int = 12) -> Text:
    return Text("made up", torch.randint(VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(1)))


def gates(name: str, router: Any, x_D: Tensor) -> dict[int, float]:
    """Return the experts of a token and their gate values, computed as in the family's paper."""
    settings = MODELS[name][2]
    logits = (router.weight.double() @ x_D.double()).tolist()
    scores = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    allowed = set(range(len(scores)))
    preference = scores
    if name == "deepseek_v3":
        scores = torch.tensor(logits, dtype=torch.float64).sigmoid().tolist()
        preference = [s + b for s, b in zip(scores, router.e_score_correction_bias.tolist(), strict=True)]
    if name.startswith("deepseek"):
        size = len(scores) // settings["n_group"]
        groups = [range(start, start + size) for start in range(0, len(scores), size)]
        counted = 2 if name == "deepseek_v3" else 1
        strength = [sum(sorted((preference[e] for e in group), reverse=True)[:counted]) for group in groups]
        best = sorted(range(len(groups)), key=lambda g: -strength[g])[: settings["topk_group"]]
        allowed = {expert for group in best for expert in groups[group]}
    chosen = sorted(allowed, key=lambda e: -preference[e])[: settings["num_experts_per_tok"]]
    total = sum(scores[e] for e in chosen) if name in ("mixtral", "qwen3_moe", "deepseek_v3") else 1.0
    return {e: scores[e] / total * settings.get("routed_scaling_factor", 1.0) for e in chosen}


def expert_by_hand(model: Any, layer: int, expert: int, x_D: Tensor) -> Tensor:
    """Return the output of a layer's own expert, or of an expert of our pool by its global id."""
    shared = isinstance(model, UniPoolForCausalLM)
    stack = model.model.experts if shared else model.model.layers[layer].mlp.experts
    (w1, w3), w2 = stack.gate_up_proj[expert].chunk(2), stack.down_proj[expert]
    read = w1.double() @ x_D.double()
    return w2.double() @ (read / (1 + (-read).exp()) * (w3.double() @ x_D.double()))
