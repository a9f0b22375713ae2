"""UniPool for Hugging Face transformers: all layers share one pool of expert FFNs, each layer has its own router.

This file needs torch and transformers only. Source of the method: arXiv:2605.06665. The backbone is LLaMA's, tensors
have LLaMA's names, and a dense model's tensors are those of a LLaMA. The pool is stored once:

    model.embed_tokens.weight  model.norm.weight  lm_head.weight
    model.layers.L.{input_layernorm, post_attention_layernorm}.weight
    model.layers.L.self_attn.{q_proj, k_proj, v_proj, o_proj}.weight
    model.layers.L.router.weight              and .sigma (norm) or .expert_bias (sigmoid_bias)
    model.experts.I.{gate_proj, up_proj, down_proj}.weight      I: the expert's number in the whole pool
    model.layers.L.mlp.{gate_proj, up_proj, down_proj}.weight   a dense model's FFN

Letters: B batch, S sequence, N positions with those in the cache, T = B * S tokens, D hidden, H heads, M experts that a
layer sees, K experts a token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

EPS = 1e-8  # eq. 7


class UniPoolConfig(PretrainedConfig):
    """What a UniPool model is, beside the usual fields of a LLaMA.

    ffn: "pool", or "dense": one FFN a layer, and nothing below has a meaning.
    num_experts: of the whole pool. num_experts_per_tok: K.
    num_expert_groups: 1 is UniPool; with G groups each num_hidden_layers / G adjacent layers share num_experts / G
        experts, and G = num_hidden_layers is a vanilla mixture of experts.
    router: "norm" (eq. 7), "softmax", or "sigmoid_bias" (arXiv:2408.15664).
    router_constant: c of eq. 7. router_constant_factor: what c is multiplied by; 1 is the paper's.
    """

    model_type = "unipool"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

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
        ffn: str = "pool",
        num_experts: int = 96,
        num_expert_groups: int = 1,
        num_experts_per_tok: int = 1,
        router: str = "norm",
        router_constant: float = 1.0,
        router_constant_factor: float = 1.0,
        initializer_range: float = 0.01,
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
        self.num_experts = num_experts
        self.num_expert_groups = num_expert_groups
        self.num_experts_per_tok = num_experts_per_tok
        self.router = router
        self.router_constant = router_constant
        self.router_constant_factor = router_constant_factor
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.hidden_act = "silu"
        self.head_dim = hidden_size // num_attention_heads
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)


class UniPoolAttention(nn.Module):
    """Causal grouped-query attention with rotary embeddings, without biases."""

    def __init__(self, config: UniPoolConfig, layer: int):
        super().__init__()
        hidden, self.head_dim, self.layer = config.hidden_size, config.head_dim, layer
        self.grouped = config.num_attention_heads != config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor | None, cache: Cache | None
    ) -> Tensor:
        q, k, v = (
            project(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, rope), _rotate(k, rope)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        causal = visible is None and q.shape[-2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def _rotary_table(positions_BS: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and frequency, (B, 1, S, head_dim / 2), fp32. Source: arXiv:2104.09864."""
    device = positions_BS.device
    exact = "cpu" if device.type == "mps" else device  # MPS has no float64, and fp32 angles are not exact enough
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=exact) / head_dim)
    angles = positions_BS.to(exact, torch.float64)[:, None, :, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _visible(mask: Tensor | None, queries: int, past: int, device: torch.device) -> Tensor | None:
    """Which positions each query sees, bool, (B or 1, 1, S, N). None: all up to its own, with S = N or S = 1.

    mask: (B, N), 0 for padding; or made for a static cache already, (B, 1, S, N).
    """
    if mask is not None and mask.ndim == 4:
        return mask
    padded = mask is not None and not bool(mask.all())
    if not padded and (past == 0 or queries == 1):
        return None
    seen_SN = torch.ones(queries, past + queries, dtype=torch.bool, device=device).tril(past)
    if mask is None or not padded:
        return seen_SN[None, None]
    # Padding sees itself: a row that sees nothing is not a number.
    return seen_SN & (mask[:, None, None, :].bool() | seen_SN.triu(past))


class UniPoolMLP(nn.Module):
    """One SwiGLU FFN: an expert, or the FFN of a dense layer."""

    def __init__(self, config: UniPoolConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class UniPoolExperts(nn.ModuleList):
    """The pool. Every layer calls it with the numbers, in the whole pool, of the experts that it chose."""

    def forward(self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor) -> Tensor:
        """sum_i g_i(x) e_i(x) over the chosen experts, summed in fp32."""
        top_k = topk_expert_ids_TK.shape[1]
        assigned = topk_expert_ids_TK.flatten()
        order = assigned.argsort(stable=True)
        counts = torch.bincount(assigned, minlength=len(self)).tolist()
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert, places in zip(self, order.split(counts), strict=True):
            if len(places):
                tokens = places // top_k
                gates_N1 = topk_scores_TK.flatten()[places, None]
                y_TD = y_TD.index_add(0, tokens, gates_N1 * expert(x_TD[tokens]).float())
        return y_TD.to(x_TD.dtype)


class UniPoolRouter(nn.Module):
    """From a token to its K experts, numbered within what the layer sees, and their gate values; computed in fp32."""

    expert_bias: Tensor

    def __init__(self, config: UniPoolConfig):
        super().__init__()
        self.kind, self.top_k = config.router, config.num_experts_per_tok
        self.constant = config.router_constant * config.router_constant_factor
        experts = config.num_experts // config.num_expert_groups
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        if self.kind == "norm":
            self.sigma = nn.Parameter(torch.ones(1))
        elif self.kind == "sigmoid_bias":
            self.register_buffer("expert_bias", torch.zeros(experts))
        elif self.kind != "softmax":
            raise ValueError(f"router is {self.kind!r}: it must be norm, softmax or sigmoid_bias")

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(topk_scores_TK, fp32; topk_expert_ids_TK)"""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TM = F.linear(x_TD.float(), self.weight.float())
            if self.kind == "norm":  # eq. 7; a token's norm and the scale do not change the order of its experts
                winners_TK, ids_TK = logits_TM.topk(self.top_k, dim=-1)
                norm_T1 = torch.linalg.vector_norm(logits_TM, dim=-1, keepdim=True)
                return winners_TK.relu() * (self.sigma.float() * self.constant / (norm_T1 + EPS)), ids_TK
            if self.kind == "softmax":
                scores_TM = preference_TM = logits_TM.softmax(dim=-1)
            else:  # the bias chooses, and is no part of the gate values
                scores_TM = logits_TM.sigmoid()
                preference_TM = scores_TM + self.expert_bias.float()
            ids_TK = preference_TM.topk(self.top_k, dim=-1).indices
            return scores_TM.gather(-1, ids_TK), ids_TK


class UniPoolDecoderLayer(nn.Module):
    """Attention, and a router of its own (or the dense FFN); the experts are the model's."""

    def __init__(self, config: UniPoolConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = UniPoolAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.ffn == "dense":
            self.mlp = UniPoolMLP(config)
        else:
            self.router = UniPoolRouter(config)
            group = layer * config.num_expert_groups // config.num_hidden_layers
            self.first_expert = group * (config.num_experts // config.num_expert_groups)

    def forward(
        self,
        h_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cache: Cache | None,
        experts: UniPoolExperts | None,
    ) -> Tensor:
        h_BSD = h_BSD + self.self_attn(self.input_layernorm(h_BSD), rope, visible, cache)
        x_BSD = self.post_attention_layernorm(h_BSD)
        if experts is None:
            return h_BSD + self.mlp(x_BSD)
        x_TD = x_BSD.flatten(0, 1)
        topk_scores_TK, topk_expert_ids_TK = self.router(x_TD)
        return h_BSD + experts(x_TD, topk_scores_TK, topk_expert_ids_TK + self.first_expert).view_as(h_BSD)


class UniPoolPreTrainedModel(PreTrainedModel):
    config_class = UniPoolConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _keep_in_fp32_modules_strict: ClassVar = ["router"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, UniPoolRouter):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.kind == "norm":
                nn.init.ones_(module.sigma)
            if module.kind == "sigmoid_bias":
                nn.init.zeros_(module.expert_bias)


class UniPoolModel(UniPoolPreTrainedModel):
    """Embedding, layers, the pool, and the final norm."""

    def __init__(self, config: UniPoolConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(UniPoolDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.experts = None
        if config.ffn == "pool":
            self.experts = UniPoolExperts(UniPoolMLP(config) for _ in range(config.num_experts))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_others: Any,
    ) -> BaseModelOutputWithPast:
        h_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        queries = h_BSD.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + queries, device=h_BSD.device)[None]
            if attention_mask is not None and attention_mask.ndim == 2:  # padding on the left does not count
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -queries:]
        rope = _rotary_table(position_ids, self.config.head_dim, self.config.rope_theta)
        visible = _visible(attention_mask, queries, past, h_BSD.device)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = []
        for layer in self.layers:
            if keep:
                states.append(h_BSD)
            h_BSD = layer(h_BSD, rope, visible, past_key_values, self.experts)
        h_BSD = self.norm(h_BSD)
        return BaseModelOutputWithPast(
            last_hidden_state=h_BSD,
            past_key_values=past_key_values,
            hidden_states=(*states, h_BSD) if keep else None,
        )


class UniPoolForCausalLM(UniPoolPreTrainedModel, GenerationMixin):
    """The language model. With `labels` it returns the mean cross-entropy in nats, without balance losses."""

    def __init__(self, config: UniPoolConfig):
        super().__init__(config)
        self.model = UniPoolModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """labels: as input_ids; position s is compared with label s + 1, and -100 is left out.

        logits_to_keep: only the last so many positions (0: all), or the positions' indices.
        """
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, vocab_size=self.config.vocab_size, **others)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits_BSV, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
