"""What the trainer's tensors are called in an export. Fused ones are cut into rows; no number changes."""

from __future__ import annotations

from trainer.config.recipe import Recipe

Parts = dict[str, int]
"""Exported names, in order, and how many rows of the trainer's tensor each has."""


def trunk_names(recipe: Recipe) -> dict[str, Parts]:
    """The parts of every parameter and buffer of the trunk, by its name in the module."""
    m = recipe.model
    head_dim = m.hidden // m.heads
    names: dict[str, Parts] = {
        "embedding.weight": {"model.embed_tokens.weight": m.vocab},
        "head.norm.weight": {"model.norm.weight": m.hidden},
        "head.out.weight": {"lm_head.weight": m.vocab},
    }
    heads = {"q_proj": m.heads, "k_proj": m.kv_heads, "v_proj": m.kv_heads}
    for layer in range(m.layers):
        ours, name = f"blocks.{layer}", f"model.layers.{layer}"
        names[f"{ours}.attention.qkv.weight"] = {
            f"{name}.self_attn.{part}.weight": count * head_dim for part, count in heads.items()
        }
        names[f"{ours}.attention.out.weight"] = {f"{name}.self_attn.o_proj.weight": m.hidden}
        names[f"{ours}.attention_norm.weight"] = {f"{name}.input_layernorm.weight": m.hidden}
        names[f"{ours}.ffn_norm.weight"] = {f"{name}.post_attention_layernorm.weight": m.hidden}
        if m.ffn == "dense":
            names[f"{ours}.ffn.w13.weight"] = {f"{name}.mlp.{part}_proj.weight": m.ffn_hidden for part in _HALVES}
            names[f"{ours}.ffn.w2.weight"] = {f"{name}.mlp.down_proj.weight": m.hidden}
            continue
        names[f"{ours}.router.weight_MD"] = {f"{name}.router.weight": recipe.experts_per_layer}
        if recipe.router.kind == "norm":
            names[f"{ours}.router.sigma"] = {f"{name}.router.sigma": 1}
        if recipe.router.kind == "sigmoid_bias":
            names[f"{ours}.router.expert_bias_M"] = {f"{name}.router.expert_bias": recipe.experts_per_layer}
    return names


def expert_names(recipe: Recipe, expert: int) -> dict[str, Parts]:
    """The parts of an expert's weights, by the names of the stacks that they are in; `expert` is its global id."""
    m, name = recipe.model, f"model.experts.{expert}"
    return {
        "w13_e2FD": {f"{name}.{part}_proj.weight": m.ffn_hidden for part in _HALVES},
        "w2_eDF": {f"{name}.down_proj.weight": m.hidden},
    }


_HALVES = ("gate", "up")
