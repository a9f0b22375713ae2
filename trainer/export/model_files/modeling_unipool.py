"""UniPool for Hugging Face transformers: all layers share one pool of expert FFNs, and each layer has its own router.

These files need only torch and transformers (5.0 or later). The method is described in arXiv:2605.06665. The backbone
and the names of its tensors are LLaMA's, and a dense model is a LLaMA. Files store the pool once:

    model.embed_tokens.weight  model.norm.weight  lm_head.weight
    model.layers.L.{input_layernorm, post_attention_layernorm}.weight
    model.layers.L.self_attn.{q_proj, k_proj, v_proj, o_proj}.weight      with qkv_bias: {q, k, v}_proj.bias
    model.layers.L.self_attn.{q_norm, k_norm}.weight                      with qk_norm
    model.layers.L.router.weight      and .sigma (norm, norm_bias), .expert_bias (norm_bias, sigmoid_bias), .bias
    model.layers.L.private_gate.weight                                    with private_gate
    model.experts.I.{gate_proj, up_proj, down_proj}.weight      I: the expert's number in the whole pool
    model.layers.L.mlp.{gate_proj, up_proj, down_proj}.weight   the FFN of a dense model, or a layer's own expert

In memory, the experts are two stacks, model.experts.gate_up_proj and model.experts.down_proj, as in the models of
transformers. from_pretrained stacks the experts, and save_pretrained splits them again.

Dimensions: B batch, S sequence, T = B * S tokens, D hidden size, F expert width, H heads, V vocabulary, M experts that
a layer can choose, K experts per token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import TransformersKwargs, can_return_tuple

from .attention_unipool import CACHE, EMBEDS, MASK_PARAMETERS, UniPoolAttention, rotary_table
from .configuration_unipool import UniPoolConfig
from .experts_unipool import UniPoolExperts, UniPoolMLP, UniPoolRouter

# Keywords that forward accepts besides its own parameters: those that transformers passes to all models (for attention,
# outputs and loss), positions in the cache (before 5.4), and arguments of attention functions (those of vLLM and SGLang
# too) and of the loss.
_KEYWORDS = frozenset(TransformersKwargs.__annotations__) | {
    "cache_position",
    "is_causal",
    "kernel_options",
    "attention_instances",
    "forward_batch",
    "block_table",
    "read_index",
    "write_index",
    "logits_indices",
    "logits_processor_args",
    "ignore_index",
    "shift_labels",
}


class UniPoolDecoderLayer(GradientCheckpointingLayer):
    """Attention, and a router (or the FFN of a dense model). The experts belong to the model."""

    def __init__(self, config: UniPoolConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = UniPoolAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.ffn == "dense":
            self.mlp = UniPoolMLP(config.hidden_size, config.intermediate_size)
        else:
            self.private = config.private_intermediate_size > 0
            if self.private:
                self.mlp = UniPoolMLP(config.hidden_size, config.private_intermediate_size)
                self.private_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.private_gate else None
            self.router = UniPoolRouter(config, layer_idx)
            group = layer_idx * config.num_expert_groups // config.num_hidden_layers
            self.first_expert = group * (config.num_experts // config.num_expert_groups)

    def forward(
        self, h_BSD: Tensor, experts: UniPoolExperts | None, **attention: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (h_BSD, the attention's weights or None, the router's logits_TM or None)."""
        y_BSD, weights = self.self_attn(self.input_layernorm(h_BSD), **attention)
        h_BSD = h_BSD + y_BSD
        x_BSD = self.post_attention_layernorm(h_BSD)
        if experts is None:
            return h_BSD + self.mlp(x_BSD), weights, None
        if self.private:
            own_BSD = self.mlp(x_BSD)
            h_BSD = h_BSD + (own_BSD if self.private_gate is None else own_BSD * self.private_gate(x_BSD).sigmoid())
        x_TD = x_BSD.flatten(0, 1)
        logits_TM, topk_scores_TK, topk_expert_ids_TK = self.router(x_TD)
        y_TD = experts(x_TD, topk_expert_ids_TK + self.first_expert, topk_scores_TK)
        return h_BSD + y_TD.view_as(h_BSD), weights, logits_TM


class UniPoolPreTrainedModel(PreTrainedModel):
    config_class = UniPoolConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict: ClassVar = ["router"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, UniPoolExperts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std)
        if isinstance(module, UniPoolRouter):
            init.normal_(module.weight, std=std)
            if module.kind in ("norm", "norm_bias"):
                init.ones_(module.sigma)
            if module.bias is not None:
                init.zeros_(module.bias)
            if module.kind in ("norm_bias", "sigmoid_bias"):
                init.zeros_(module.expert_bias)
            module.mark_foreign()


class UniPoolModel(UniPoolPreTrainedModel):
    """The embedding, the layers, the pool and the final norm."""

    def __init__(self, config: UniPoolConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(UniPoolDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.experts = UniPoolExperts(config) if config.ffn == "pool" else None
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run all layers.

        Args:
            attention_mask: (B, positions), 0 for padding; or a mask of four dimensions for the attention function.
            position_ids: (B or 1, S). By default they continue from the cache, and padding on the left does not count.
                They may exceed `max_position_embeddings`.
            past_key_values: The KV cache, as transformers calls it before version 5.24.
            cache: The KV cache, as transformers calls it since version 5.24.
        """
        _check_keywords(self, kwargs)
        cache = _one_cache(past_key_values, cache, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        h_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recompute and cache is not None:
            raise ValueError(f"{CACHE} cannot be used with gradient checkpointing, which computes layers twice")
        # The mask must not know of a cache that is created here: only without one do restarting positions separate
        # packed sequences.
        causal = {"config": self.config, EMBEDS: h_BSD, "attention_mask": attention_mask, CACHE: cache}
        if cache is None and not recompute and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        cache_position = kwargs.pop("cache_position", None)
        # A paged cache does not know its length; its caller passes positions.
        if cache_position is None and (position_ids is None or "cache_position" in MASK_PARAMETERS):
            past = 0 if cache is None else cache.get_seq_length()
            cache_position = torch.arange(h_BSD.shape[1], device=h_BSD.device) + past
        if "cache_position" in MASK_PARAMETERS:
            causal["cache_position"] = cache_position
        mask = create_causal_mask(**causal, position_ids=position_ids)
        if position_ids is None:
            position_ids = cache_position[None]
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -h_BSD.shape[1] :]
        config = self.config
        keep_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_weights = config.output_attentions if output_attentions is None else output_attentions
        keep_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        states, weights, logits = [], [], []  # only what was requested, to save memory
        attention = {
            "rope": rotary_table(position_ids, config.head_dim, config.rope_theta),
            "attention_mask": mask,
            "cache": cache,
            "cache_position": cache_position,
            "position_ids": position_ids,
            "output_attentions": keep_weights,
            **kwargs,
        }
        for layer in self.layers:
            if keep_states:
                states.append(h_BSD)
            outputs = layer(h_BSD, experts=self.experts, **attention)
            # Pipeline parallelism replaces layers of other ranks by the identity, which returns h_BSD alone.
            h_BSD, weights_of_layer, logits_TM = outputs if isinstance(outputs, tuple) else (outputs, None, None)
            if keep_weights and weights_of_layer is not None:
                weights.append(weights_of_layer)
            if keep_logits and logits_TM is not None:
                logits.append(logits_TM)
        h_BSD = self.norm(h_BSD)
        return MoeModelOutputWithPast(
            last_hidden_state=h_BSD,
            hidden_states=(*states, h_BSD) if keep_states else None,
            attentions=tuple(weights) or None,
            router_logits=tuple(logits) or None,
            **{CACHE: cache},
        )


def _check_keywords(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse unknown keywords: a cache under another version's name would otherwise be ignored silently."""
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in _KEYWORDS)
    if unknown:
        raise TypeError(f"{type(model).__name__}.forward() got an unexpected keyword argument {', '.join(unknown)}")


def _one_cache(past_key_values: Cache | None, cache: Any, kwargs: dict[str, Any]) -> Cache | None:
    """Return the KV cache, which has either of its names."""
    if CACHE != "cache" and cache is not None and not isinstance(cache, Cache):
        kwargs["cache"] = cache  # before 5.24, paged attention passes its own cache under this name
        return past_key_values
    if past_key_values is not None and cache is not None:
        raise TypeError("past_key_values and cache are the same; give one of them")
    return cache if past_key_values is None else past_key_values


class UniPoolForCausalLM(UniPoolPreTrainedModel, GenerationMixin):
    """The causal language model.

    It computes no balance losses, and `aux_loss` is None; `router_logits` has a tensor (T, M) of each layer.
    """

    _tp_plan: ClassVar = {"lm_head": "colwise_rep"}
    _pp_plan: ClassVar = {"lm_head": (["hidden_states"], ["logits"])}
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Compute logits and, if there are labels, the mean cross-entropy in nats.

        Args:
            labels: (B, S), as input_ids: position s predicts label s + 1, and labels of -100 are ignored.
            logits_to_keep: Number of last positions to compute logits for (0 for all), or indices of positions.

        The other arguments are those of `UniPoolModel.forward` and keywords that transformers passes to its models.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            output_router_logits,
            cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=out.router_logits,
            **{CACHE: getattr(out, CACHE)},
        )
