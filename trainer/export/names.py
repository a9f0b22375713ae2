"""How an export describes a recipe's model: the names and shapes of its tensors, and the fields of config.json.

Tensors that the trainer stores fused are split along their rows; no value changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from trainer.config.recipe import Recipe

Shape = tuple[int, ...]
Parts = dict[str, Shape]
"""Exported name and shape of each part of one of the trainer's tensors, in the order of its rows."""

CONFIG_KEYS = {
    "vocab_size": "model.vocab",
    "hidden_size": "model.hidden",
    "intermediate_size": "model.ffn_hidden",
    "private_intermediate_size": "model.private_ffn",
    "num_hidden_layers": "model.layers",
    "num_attention_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads",
    "max_position_embeddings": "model.seq_len",
    "rms_norm_eps": "model.norm_eps",
    "rope_theta": "model.rope_base",
    "ffn": "model.ffn",
    "num_experts": "pool.experts",
    "num_expert_groups": "model.groups",
    "num_experts_per_tok": "router.top_k",
    "router": "router.kind",
    "router_constant_factor": "router.constant_factor",
    "qk_norm": "model.qk_norm",
    "qkv_bias": "model.qkv_bias",
    "private_gate": "model.private_gate",
    "norm_topk_prob": "router.renormalize",
    "router_bias": "router.logit_bias",
    "initializer_range": "model.init_std",
}
"""Keys of the recipe by the names of their fields in config.json."""

OPTIONAL = {"qk_norm": "none", "qkv_bias": False, "private_gate": False, "norm_topk_prob": False, "router_bias": False}
"""Fields that config.json names only if they have another value than this."""


def config_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of config.json that come from the recipe."""
    head_dim = {} if recipe.model.head_dim is None else {"head_dim": recipe.model.head_dim}
    return {field: attrgetter(key)(recipe) for field, key in CONFIG_KEYS.items()} | head_dim


def trunk_names(recipe: Recipe) -> dict[str, Parts]:
    """Return the exported parts of each parameter and buffer of the trunk, by its name in the module."""
    m = recipe.model
    D, head_dim = m.hidden, m.head_size
    names: dict[str, Parts] = {
        "embedding.weight": {"model.embed_tokens.weight": (m.vocab, D)},
        "head.norm.weight": {"model.norm.weight": (D,)},
        "head.out.weight": {"lm_head.weight": (m.vocab, D)},
    }
    heads = {"q_proj": m.heads, "k_proj": m.kv_heads, "v_proj": m.kv_heads}
    for layer in range(m.layers):
        ours, name = f"blocks.{layer}", f"model.layers.{layer}"
        names[f"{ours}.attention.qkv.weight"] = {
            f"{name}.self_attn.{part}.weight": (count * head_dim, D) for part, count in heads.items()
        }
        if m.qkv_bias:
            names[f"{ours}.attention.qkv.bias"] = {
                f"{name}.self_attn.{part}.bias": (count * head_dim,) for part, count in heads.items()
            }
        if m.qk_norm != "none":
            for part in ("q", "k"):
                width = head_dim if m.qk_norm == "head" else heads[f"{part}_proj"] * head_dim
                names[f"{ours}.attention.qk_norm.{part}.weight"] = {f"{name}.self_attn.{part}_norm.weight": (width,)}
        names[f"{ours}.attention.out.weight"] = {f"{name}.self_attn.o_proj.weight": (D, m.heads * head_dim)}
        names[f"{ours}.attention_norm.weight"] = {f"{name}.input_layernorm.weight": (D,)}
        names[f"{ours}.ffn_norm.weight"] = {f"{name}.post_attention_layernorm.weight": (D,)}
        if m.ffn == "dense":
            gate_up, down = _ffn(f"{name}.mlp", D, m.ffn_hidden)
            names |= {f"{ours}.ffn.w13.weight": gate_up, f"{ours}.ffn.w2.weight": down}
            continue
        if m.private_ffn:
            gate_up, down = _ffn(f"{name}.mlp", D, m.private_ffn)
            names |= {f"{ours}.private_ffn.w13.weight": gate_up, f"{ours}.private_ffn.w2.weight": down}
        if m.private_gate:
            names[f"{ours}.private_gate.weight"] = {f"{name}.private_gate.weight": (1, D)}
        names[f"{ours}.router.weight_MD"] = {f"{name}.router.weight": (recipe.experts_per_layer, D)}
        if recipe.router.has_norm:
            names[f"{ours}.router.sigma"] = {f"{name}.router.sigma": (1,)}
        if recipe.router.logit_bias:
            names[f"{ours}.router.bias_M"] = {f"{name}.router.bias": (recipe.experts_per_layer,)}
        if recipe.router.kind.endswith("_bias"):
            names[f"{ours}.router.expert_bias_M"] = {f"{name}.router.expert_bias": (recipe.experts_per_layer,)}
    return names


def expert_names(recipe: Recipe, expert: int) -> dict[str, Parts]:
    """Return the exported parts of an expert's weights, by the name of the stack that holds them.

    Args:
        recipe: The recipe of the model.
        expert: The expert's number in the whole pool.
    """
    gate_up, down = _ffn(f"model.experts.{expert}", recipe.model.hidden, recipe.model.ffn_hidden)
    return {"w13_e2FD": gate_up, "w2_eDF": down}


def exported_shapes(recipe: Recipe) -> dict[str, Shape]:
    """Return the names and shapes of all tensors in an export of the recipe's model."""
    return {name: shape for parts in _all_parts(recipe) for name, shape in parts.items()}


def _all_parts(recipe: Recipe) -> Iterator[Parts]:
    yield from trunk_names(recipe).values()
    for expert in range(recipe.pool.experts):
        yield from expert_names(recipe, expert).values()


def _ffn(name: str, D: int, F: int) -> tuple[Parts, Parts]:
    gate_up: Parts = {f"{name}.{part}_proj.weight": (F, D) for part in ("gate", "up")}
    return gate_up, {f"{name}.down_proj.weight": (D, F)}
