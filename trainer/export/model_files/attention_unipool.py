"""The attention of a UniPool model, and what differs between versions of transformers.

Dimensions: B batch, S sequence, D hidden size, H heads.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_unipool import UniPoolConfig

MASK_PARAMETERS = inspect.signature(create_causal_mask).parameters
# The KV cache is called `past_key_values` in transformers before 5.24, and `cache` from then on.
CACHE = "cache" if "cache" in MASK_PARAMETERS else "past_key_values"
# The embeddings are called `input_embeds` before 5.2.
EMBEDS = "inputs_embeds" if "inputs_embeds" in MASK_PARAMETERS else "input_embeds"


def eager_attention_forward(
    module: UniPoolAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights. The mask is boolean (True: attend) or added to the scores."""
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    weights = query @ key.mT * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    elif attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    attended = F.dropout(weights, dropout, module.training) @ value
    return attended.transpose(1, 2).contiguous(), weights


class UniPoolAttention(nn.Module):
    """Causal grouped-query attention with rotary embeddings, and what `qk_norm` and `qkv_bias` add."""

    def __init__(self, config: UniPoolConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        # Attention functions of transformers read these attributes.
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        q_size, kv_size = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            sizes = (self.head_dim, self.head_dim) if config.qk_norm == "head" else (q_size, kv_size)
            self.q_norm, self.k_norm = (nn.RMSNorm(size, eps=config.rms_norm_eps) for size in sizes)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None,
        cache_position: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, if the attention function provides them, its weights (B, H, S, positions)."""
        q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        q, k = _rotate(q, rope), _rotate(k, rope)
        if cache is not None:
            k, v = _update(cache, k, v, self.layer_idx, cache_position, kwargs)
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        y, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        # Back ends of servers return one row per token, without a batch.
        return self.o_proj(y.reshape(*x_BSD.shape[:2], -1)), weights


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Norm each head, or all heads as one vector, in fp32."""
    rows = x.float().unflatten(-1, (-1, *norm.normalized_shape))
    return F.rms_norm(rows, norm.normalized_shape, norm.weight.float(), norm.eps).flatten(-2).to(x.dtype)


def _update(
    cache: Cache, k: Tensor, v: Tensor, layer_idx: int, cache_position: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Append keys and values to a cache, and return all that it contains."""
    if CACHE == "cache":
        return cache.update(k, v, layer_idx, kwargs=kwargs)  # a paged cache reads its indices from kwargs
    return cache.update(k, v, layer_idx, {"cache_position": cache_position})


def rotary_table(positions_BS: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position and frequency (arXiv:2104.09864), fp32, (B, 1, S, head_dim / 2)."""
    device = positions_BS.device
    exact = "cpu" if device.type == "mps" else device  # MPS has no float64, and fp32 angles are not exact enough
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=exact) / head_dim)
    angles = positions_BS.to(exact, torch.float64)[:, None, :, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
