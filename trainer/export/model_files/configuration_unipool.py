"""The configuration of a UniPool model for Hugging Face transformers."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from transformers import PretrainedConfig

# The version of these files, stored in config.json. Files of version 1, where it is missing, cannot generate with
# transformers 5.24.
EXPORT_VERSION = 2


class UniPoolConfig(PretrainedConfig):
    """Configuration of a UniPool model. Arguments that are not listed have the same meaning as for LLaMA.

    Args:
        ffn: "pool", or "dense" for one FFN per layer. A dense model does not use the arguments below.
        head_dim: Width of an attention head; by default hidden_size / num_attention_heads.
        qk_norm: "none", or an RMSNorm of queries and keys: "head" as in Qwen3, "all" (all heads at once) as in OLMoE.
        qkv_bias: Whether the query, key and value projections have biases.
        private_intermediate_size: Width of an expert of each layer's own beside the pool; 0: none.
        private_gate: Whether a sigmoid gate of the token multiplies the output of that expert.
        num_experts: Number of experts in the whole pool.
        num_expert_groups: 1 is UniPool. With G groups, num_hidden_layers / G adjacent layers share num_experts / G
            experts; G = num_hidden_layers is a vanilla mixture of experts.
        num_experts_per_tok: Number of experts per token, K.
        router: "norm" (Eq. 7 of the paper), "norm_bias" (the same with a bias of the selection), "softmax", or
            "sigmoid_bias" (arXiv:2408.15664).
        norm_topk_prob: Whether the softmax router divides a token's gate values by their sum.
        router_bias: Whether the logits of the softmax router have biases.
        router_constant: The constant c of Eq. 7.
        router_constant_factor: Factor of c; 1 in the paper.
        expert_owners: The layer that owns each expert (UniPool-lock): each layer chooses only from its own, but their
            scores are still divided by the norm over all logits. None if all layers use the whole pool.
        foreign_expert_factor: Factor of the scores of experts that a layer does not own, which it can still choose;
            above 0 only in a model that was saved while its lock was being annealed.
    """

    model_type = "unipool"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "cache"]
    # config.json names these only if a model has them, so that the others' does not change.
    qk_norm = "none"
    qkv_bias = False
    private_intermediate_size = 0
    private_gate = False
    norm_topk_prob = False
    router_bias = False
    expert_owners = cast("list[int] | None", None)
    foreign_expert_factor = 0.0

    def __init__(
        self,
        vocab_size: int = 51200,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int = 4,
        max_position_embeddings: int = 1024,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 1e6,
        head_dim: int | None = None,
        qk_norm: str = "none",
        qkv_bias: bool = False,
        ffn: str = "pool",
        private_intermediate_size: int = 0,
        private_gate: bool = False,
        num_experts: int = 96,
        num_expert_groups: int = 1,
        num_experts_per_tok: int = 1,
        router: str = "norm",
        norm_topk_prob: bool = False,
        router_bias: bool = False,
        router_constant: float = 1.0,
        router_constant_factor: float = 1.0,
        expert_owners: list[int] | None = None,
        foreign_expert_factor: float = 0.0,
        initializer_range: float = 0.01,
        output_router_logits: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **others: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.ffn = ffn
        for name, value in (
            ("qk_norm", qk_norm),
            ("qkv_bias", qkv_bias),
            ("private_intermediate_size", private_intermediate_size),
            ("private_gate", private_gate),
            ("norm_topk_prob", norm_topk_prob),
            ("router_bias", router_bias),
        ):
            if value != getattr(type(self), name):
                setattr(self, name, value)
        self.num_experts = num_experts
        self.num_expert_groups = num_expert_groups
        self.num_experts_per_tok = num_experts_per_tok
        self.router = router
        self.router_constant = router_constant
        self.router_constant_factor = router_constant_factor
        if expert_owners is not None:
            self.expert_owners = expert_owners
            self.foreign_expert_factor = foreign_expert_factor
        self.initializer_range = initializer_range
        self.output_router_logits = output_router_logits
        self.use_cache = use_cache
        self.hidden_act = "silu"
        self.export_version = EXPORT_VERSION
        others.pop("export_version", None)
        self._check_model(head_dim)
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits the model's modules: heads, and the width of every FFN and expert."""
        column, row = "colwise", "rowwise"
        # A norm of all heads at once needs them together, as in transformers' OLMoE.
        heads, out = ("colwise_gather_output", "rowwise_split_input") if self.qk_norm == "all" else (column, row)
        plan = {f"layers.*.self_attn.{name}": heads for name in ("q_proj", "k_proj", "v_proj")}
        plan["layers.*.self_attn.o_proj"] = out
        if self.ffn == "dense" or self.private_intermediate_size:
            plan |= {"layers.*.mlp.gate_proj": column, "layers.*.mlp.up_proj": column, "layers.*.mlp.down_proj": row}
        if self.ffn == "pool":
            plan |= {"experts.gate_up_proj": "packed_colwise", "experts.down_proj": row, "experts": "moe_tp_experts"}
        return plan

    @property
    def base_model_pp_plan(self) -> dict[str, tuple[list[str], list[str]]]:
        """What pipeline parallelism divides; the pool, which all layers need, stays whole on every rank."""
        hidden = ["hidden_states"]
        return {
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            "layers": (["hidden_states", "attention_mask"], hidden),
            "norm": (hidden, hidden),
        }

    def _check_model(self, head_dim: int | None) -> None:
        """Raise ValueError if no model can have this configuration."""
        if self.ffn not in ("pool", "dense"):
            raise ValueError(f"ffn is {self.ffn!r}: it must be pool or dense")
        if self.router not in ("norm", "norm_bias", "softmax", "sigmoid_bias"):
            raise ValueError(f"router is {self.router!r}: it must be norm, norm_bias, softmax or sigmoid_bias")
        counts = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        counts += ["num_key_value_heads", "max_position_embeddings"]
        multiples = [("num_attention_heads", "num_key_value_heads")]
        if head_dim is None:
            multiples.insert(0, ("hidden_size", "num_attention_heads"))
        if self.ffn == "pool":
            counts += ["num_experts", "num_expert_groups", "num_experts_per_tok"]
            multiples += [("num_experts", "num_expert_groups"), ("num_hidden_layers", "num_expert_groups")]
        for name in counts:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}: it must be a whole number of at least 1")
        private = self.private_intermediate_size
        if type(private) is not int or private < 0:
            raise ValueError(f"private_intermediate_size is {private!r}: it must be a whole number of at least 0")
        for name in ("rms_norm_eps", "rope_theta", "router_constant", "router_constant_factor", "initializer_range"):
            value = getattr(self, name)
            finite = type(value) in (int, float) and 0 <= value < float("inf")
            if not finite or (name == "rope_theta" and value == 0):
                raise ValueError(f"{name} is {value!r}: it must be a positive number")
        for name, divisor in multiples:
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(f"{name} is {getattr(self, name)}: it must be a multiple of {divisor}")
        if self.ffn == "pool" and self.num_experts_per_tok > self.num_experts // self.num_expert_groups:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}: a layer has fewer experts")
        if self.expert_owners is not None:
            self._check_owners()
        size = self.hidden_size // self.num_attention_heads if head_dim is None else head_dim
        if type(size) is not int or size < 2 or size % 2:
            raise ValueError(f"head_dim (by default hidden_size / num_attention_heads) is {size!r}: it must be even")
        if self.qk_norm not in ("none", "head", "all"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}: it must be none, head or all")
        for name in ("qkv_bias", "private_gate", "norm_topk_prob", "router_bias"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be true or false")
        if self.router != "softmax" and (self.norm_topk_prob or self.router_bias):
            raise ValueError(f"router is {self.router!r}: it must be softmax with norm_topk_prob or router_bias")

    def _check_owners(self) -> None:
        """Raise ValueError if the layers cannot own their experts."""
        layers, experts, owners = self.num_hidden_layers, self.num_experts, self.expert_owners
        for name, value, needed in (
            ("ffn", self.ffn, "pool"),
            ("router", self.router, "norm"),
            ("num_expert_groups", self.num_expert_groups, 1),
        ):
            if value != needed:
                raise ValueError(f"{name} is {value!r}: it must be {needed} with expert_owners")
        equally = [layer for layer in range(layers) for _ in range(experts // layers)]
        if not isinstance(owners, list) or {type(owner) for owner in owners} != {int} or sorted(owners) != equally:
            raise ValueError(f"expert_owners must name each of the {layers} layers for equally many experts")
        if self.num_experts_per_tok > experts // layers:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}: a layer owns fewer experts")
        factor = self.foreign_expert_factor
        if type(factor) not in (int, float) or not 0 <= factor <= 1:
            raise ValueError(f"foreign_expert_factor is {factor!r}: it must be from 0 to 1")
