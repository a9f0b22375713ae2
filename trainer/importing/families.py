"""Which Hugging Face models the backbone can be: their settings as a recipe has them, and their tensors' names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from trainer.common.errors import UserError
from trainer.common.safe_read import refuse_unreadable
from trainer.export.folder import first_line, read_object
from trainer.export.loaded_model import prepare_libraries

Sections = dict[str, dict[str, Any]]

DENSE = ("llama", "mistral", "qwen2", "qwen3")
MOE = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")

_LATENT = ("kv_lora_rank", "latent attention (MLA) is not")
_UNSUPPORTED = {"deepseek_v2": _LATENT, "deepseek_v3": _LATENT}
"""A field of other families that says why not, and the reason."""


def read_config(folder: Path) -> PretrainedConfig:
    """Read config.json of a checkpoint, with the family's own values for what it leaves out. No code of it is run.

    Raises:
        UserError: It cannot be read, or is of a family that the backbone cannot be.
    """
    file = folder / "config.json"
    stored = read_object(file)
    kind = stored.get("model_type")
    if kind in _UNSUPPORTED:
        field, reason = _UNSUPPORTED[kind]
        raise UserError(f"{file}: {field} = {stored.get(field)!r} (model_type = {kind!r}): {reason} in the backbone")
    if kind not in (*DENSE, *MOE):
        raise UserError(f"{file}: model_type = {kind!r}: must be one of {', '.join((*DENSE, *MOE))}")
    refuse_unreadable(folder)
    prepare_libraries()
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and huggingface_hub each raise their own kinds
        raise UserError(f"{file}: is not a configuration of {kind} ({first_line(error)})") from None
    return config


def sections_of(config: PretrainedConfig, file: Path, seq_len: int | None = None) -> Sections:
    """Return the sections `model`, `router`, `pool` and `balance` of a recipe for the model.

    Args:
        config: The model's configuration, of a family in `DENSE` or `MOE`.
        file: Where it was read from, for messages.
        seq_len: Tokens per sequence; by default the largest number that the model was made for.

    Raises:
        UserError: The model has something that the backbone has not; the message names the field of config.json.
    """
    c, kind = config, config.model_type
    seq_len = seq_len or c.max_position_embeddings
    _check(config, file, seq_len)
    model = {
        "layers": c.num_hidden_layers,
        "hidden": c.hidden_size,
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads,
        "ffn_hidden": c.moe_intermediate_size if kind.startswith("qwen") and kind in MOE else c.intermediate_size,
        "vocab": c.vocab_size,
        "seq_len": seq_len,
        "ffn": "dense",
        "init_std": float(c.initializer_range),
        "rope_base": float(c.rope_parameters["rope_theta"]),
        "norm_eps": float(c.rms_norm_eps),
        "head_dim": getattr(c, "head_dim", None),
    }
    if kind in ("qwen3", "qwen3_moe", "olmoe"):
        model["qk_norm"] = "all" if kind == "olmoe" else "head"
    if kind == "qwen2" or (kind == "qwen2_moe" and c.qkv_bias):
        model["qkv_bias"] = True
    if kind in DENSE:
        return {"model": model, "router": {}, "pool": {}, "balance": {}}
    if kind == "qwen2_moe":
        model |= {"private_ffn": c.shared_expert_intermediate_size, "private_gate": True}
    model |= {"ffn": "pool", "groups": c.num_hidden_layers}
    renormalize = True if kind == "mixtral" else c.norm_topk_prob
    router = {"kind": "softmax", "top_k": c.num_experts_per_tok, "renormalize": renormalize}
    experts = c.num_local_experts if kind == "mixtral" else c.num_experts
    return {
        "model": model,
        "router": router,
        "pool": {"experts": c.num_hidden_layers * experts},
        "balance": {"layer": float(c.router_aux_loss_coef)},
    }


def _check(c: PretrainedConfig, file: Path, seq_len: int) -> None:
    """Raise UserError if the model has something that the backbone has not."""
    rope = c.rope_parameters or {}
    for field, value, allowed in (
        ("hidden_act", c.hidden_act, "silu"),
        ("attention_bias", getattr(c, "attention_bias", False), False),
        ("mlp_bias", getattr(c, "mlp_bias", False), False),
        ("clip_qkv", getattr(c, "clip_qkv", None), None),
        ("rope_scaling (rope_parameters.rope_type)", rope.get("rope_type", "default"), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
        ("decoder_sparse_step", getattr(c, "decoder_sparse_step", 1), 1),
        ("mlp_only_layers", getattr(c, "mlp_only_layers", None) or [], []),
    ):
        if value != allowed:
            raise UserError(f"{file}: {field} = {value!r}: the backbone has only {allowed!r}")
    window = getattr(c, "sliding_window", None) or None
    if window is not None and seq_len > window:
        raise UserError(
            f"{file}: sliding_window = {window}: the backbone has no attention in windows; import with --seq-len "
            f"{window} or less, where it makes no difference"
        )
    if seq_len > c.max_position_embeddings:
        raise UserError(f"--seq-len {seq_len}: must be at most max_position_embeddings ({c.max_position_embeddings})")


def their_name(name: str, config: PretrainedConfig) -> str:
    """Return what the checkpoint calls a tensor that an export calls `name`."""
    kind = config.model_type
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "model.embed_tokens.weight"
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    if found := re.fullmatch(r"model\.experts\.(\d+)\.(\w+)_proj\.weight", name):
        experts = config.num_local_experts if kind == "mixtral" else config.num_experts
        layer, expert = divmod(int(found[1]), experts)
        part = {"gate": "w1", "up": "w3", "down": "w2"}[found[2]] if kind == "mixtral" else f"{found[2]}_proj"
        return f"model.layers.{layer}.{block}.experts.{expert}.{part}.weight"
    if kind in MOE:
        name = name.replace(".router.weight", f".{block}.gate.weight")
        name = name.replace(".private_gate.", ".mlp.shared_expert_gate.")
        name = re.sub(r"\.mlp\.(gate|up|down)_proj\.", r".mlp.shared_expert.\1_proj.", name)
    return name
