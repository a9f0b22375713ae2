"""The trunk: the whole model except its experts, in the style of LLaMA as in the paper.

Letters: B batch, S sequence, T = B * S tokens, D hidden, H heads, V vocabulary, L layers, M experts that a layer sees.
"""

from __future__ import annotations

import math
import zlib
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from router import Reach, Routing, build_router, norm_constant
from trainer.config.recipe import Recipe
from trainer.config.sections import Model
from trainer.model.document_mask import as_bias, document_mask
from trainer.model.loss import OutputProjection
from trainer.model.segments import EAGER, Segments, Surroundings, autocast, compiled_segments, compiles


class QKNorm(nn.Module):
    """RMSNorm of queries and keys before their rotation, in fp32: of each head, or of all heads as one vector."""

    def __init__(self, m: Model):
        super().__init__()
        per_head = m.qk_norm == "head"
        self.q = nn.RMSNorm(m.head_size if per_head else m.heads * m.head_size, eps=m.norm_eps)
        self.k = nn.RMSNorm(m.head_size if per_head else m.kv_heads * m.head_size, eps=m.norm_eps)
        self._rows = (m.heads * m.head_size, m.kv_heads * m.head_size, m.kv_heads * m.head_size)

    def forward(self, qkv_BSR: Tensor) -> Tensor:
        """Return queries, keys and values of all heads, the first two normed."""
        q_BSR, k_BSR, v_BSR = qkv_BSR.split(self._rows, dim=-1)
        return torch.cat((_normed(self.q, q_BSR), _normed(self.k, k_BSR), v_BSR), dim=-1)


def _normed(norm: nn.RMSNorm, x_BSR: Tensor) -> Tensor:
    return norm(x_BSR.float().unflatten(-1, (-1, *norm.normalized_shape))).flatten(-2).to(x_BSR.dtype)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Causal grouped-query attention with rotary embeddings; without biases or norms unless the recipe has them."""

    def __init__(self, m: Model):
        super().__init__()
        self.head_dim = m.head_size
        self.qkv = nn.Linear(m.hidden, (m.heads + 2 * m.kv_heads) * m.head_size, bias=m.qkv_bias)
        self.qk_norm = QKNorm(m) if m.qk_norm != "none" else None
        self.out = nn.Linear(m.heads * m.head_size, m.hidden, bias=False)
        self.heads, self.kv_heads = m.heads, m.kv_heads

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], bias_B1SS: Tensor | None = None) -> Tensor:
        """Attend to all keys up to the query's position, or if there is bias_B1SS, as that allows; see `as_bias`."""
        qkv = self.qkv(x_BSD)
        if self.qk_norm is not None:
            qkv = self.qk_norm(qkv)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k, v = (heads.transpose(1, 2) for heads in (_rotate(q, rope), _rotate(k, rope), v))
        if bias_B1SS is None:
            grouped = self.heads != self.kv_heads
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            # On CUDA only the kernel that keeps all S x S weights takes a mask and grouped heads at once.
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B1SS)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def rotary_table(seq_len: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos (S, 1, head_dim / 2) of every position and frequency, and -sin and sin (S, 2, head_dim / 2), in fp32.

    Source: arXiv:2104.09864, with the halves of a head in place of even and odd channels.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequencies)
    cos, sin = angles.cos().unsqueeze(1), angles.sin()
    return cos.float().to(device), torch.stack((-sin, sin), dim=1).float().to(device)


def _rotate(x_BSHD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    # Without joining the halves: the compiled backward pass would write them once more for each join.
    cos, sin = (table[: x_BSHD.shape[1], None] for table in rope)
    halves = x_BSHD.float().unflatten(-1, (2, -1))
    return (halves * cos + halves.flip(-2) * sin).flatten(-2).to(x_BSHD.dtype)  # type: ignore[no-any-return]


class DenseFFN(nn.Module):
    """A SwiGLU FFN of a layer's own, for every token: that of the dense baseline, or one beside the pool."""

    def __init__(self, hidden: int, ffn_hidden: int):
        super().__init__()
        self.w13 = nn.Linear(hidden, 2 * ffn_hidden, bias=False)
        self.w2 = nn.Linear(ffn_hidden, hidden, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        a, b = self.w13(x_BSD).chunk(2, dim=-1)
        return self.w2(F.silu(a) * b)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer up to its experts: attention, and its own router (or the dense FFN).

    Attributes:
        private_ffn: The layer's own expert beside the pool, if the recipe has one.
        private_gate: The logit of its gate value, which is 1 without it.
    """

    def __init__(self, recipe: Recipe, constant: float):
        super().__init__()
        m = recipe.model
        self.attention_norm = nn.RMSNorm(m.hidden, eps=m.norm_eps)
        self.attention = Attention(m)
        self.ffn_norm = nn.RMSNorm(m.hidden, eps=m.norm_eps)
        self.private_ffn = DenseFFN(m.hidden, m.private_ffn) if m.private_ffn else None
        self.private_gate = nn.Linear(m.hidden, 1, bias=False) if m.private_gate else None
        if m.ffn == "dense":
            self.ffn = DenseFFN(m.hidden, m.ffn_hidden)
        else:
            self.router = build_router(
                recipe.router.kind,
                m.hidden,
                recipe.experts_per_layer,
                recipe.router.top_k,
                recipe.balance.scores,
                recipe.router.z_loss > 0,
                constant,
                recipe.router.renormalize,
                recipe.router.logit_bias,
            )

    def attend(self, h_BSD: Tensor, rope: tuple[Tensor, Tensor], bias_B1SS: Tensor | None = None) -> Tensor:
        """Return the residual stream after attention."""
        return h_BSD + self.attention(self.attention_norm(h_BSD), rope, bias_B1SS)  # type: ignore[no-any-return]

    def route(self, h_BSD: Tensor, reach: Reach | None = None) -> tuple[Tensor, Routing]:
        """Return the normed tokens x_TD for the experts, and their routing."""
        x_TD = self.ffn_norm(h_BSD).flatten(0, 1)
        return x_TD, self.router(x_TD, reach=reach)  # by name: ZeRO-3's hooks would wrap its tensors otherwise

    def private(self, x_TD: Tensor) -> Tensor | None:
        """Return what the layer's own expert adds for each token; None if it has none."""
        if self.private_ffn is None:
            return None
        y_TD = self.private_ffn(x_TD)
        return y_TD if self.private_gate is None else y_TD * self.private_gate(x_TD).sigmoid()  # type: ignore[no-any-return]

    def dense(self, h_BSD: Tensor) -> Tensor:
        """Return the residual stream after the dense FFN."""
        return h_BSD + self.ffn(self.ffn_norm(h_BSD))  # type: ignore[no-any-return]


class Head(nn.Module):
    """Final norm and output projection, not tied to the embedding."""

    def __init__(self, recipe: Recipe, compiled: bool):
        super().__init__()
        m = recipe.model
        self.norm = nn.RMSNorm(m.hidden, eps=m.norm_eps)
        self.out = OutputProjection(m.hidden, m.vocab, recipe.train.loss_chunk, compute_dtype(recipe), compiled)

    def forward(self, h_BSD: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """Return the logits (B, S, V); with targets, the mean cross-entropy in nats, fp32."""
        return self.out(self.norm(h_BSD), targets_BS)  # type: ignore[no-any-return]


class Trunk(nn.Module):
    """Embedding, L blocks, head. Parameters are fp32; `precision: bf16` computes under autocast.

    There is no forward of the whole: the coroutines of `trainer.model.micro_batch` call its parts.

    Args:
        document_end: Id of the token that ends a document, if attention stays within documents, else None.

    Attributes:
        compiled: Whether training runs compiled segments (`train.compile`).
    """

    def __init__(self, recipe: Recipe, device: torch.device, document_end: int | None = None):
        super().__init__()
        self.document_end = document_end
        m = recipe.model
        self.compute_dtype = compute_dtype(recipe)
        constant = 1.0
        if m.ffn == "pool" and recipe.router.has_norm:
            constant = norm_constant(recipe.experts_per_layer, recipe.router.top_k) * recipe.router.constant_factor
        self.embedding = nn.Embedding(m.vocab, m.hidden)
        self.blocks = nn.ModuleList(Block(recipe, constant) for _ in range(m.layers))
        self.compiled = compiles(recipe, device)
        self.head = Head(recipe, self.compiled)
        self._reset_parameters(recipe)
        self.to(device)
        self.rope = rotary_table(m.seq_len, m.head_size, m.rope_base, device)

    @property
    def device(self) -> torch.device:
        return self.rope[0].device

    @cached_property
    def segments(self) -> Segments:
        """The functions that run the training's segments."""
        return compiled_segments() if self.compiled else EAGER

    def autocast(self) -> torch.autocast:
        """Return the context in which segments run."""
        return autocast(self.device, self.compute_dtype)

    def surroundings(self, tokens_BS: Tensor, position_M: Tensor | None) -> Surroundings:
        """Return what the segments of a micro-batch have in common."""
        bias_B1SS = None
        if self.document_end is not None:
            bias_B1SS = as_bias(document_mask(tokens_BS, self.document_end), self.compute_dtype)
        return Surroundings(self.rope, bias_B1SS, position_M, self.compute_dtype)

    def loss(self, h_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats, fp32."""
        return self.head(h_BSD, targets_BS)  # type: ignore[no-any-return]

    def _reset_parameters(self, recipe: Recipe) -> None:
        """Draw weights from N(0, init_std), output projections from N(0, init_std / sqrt(2 L)), by (seed, name)."""
        std, output_std = init_stds(recipe)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                # torch's CPU generator uses 32 bits of a seed, which must depend on both.
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), recipe.run.seed))
                if name.endswith((".attention.out.weight", "ffn.w2.weight")):
                    parameter.normal_(0.0, output_std, generator=generator)
                elif parameter.ndim > 1:
                    parameter.normal_(0.0, std, generator=generator)
                else:  # biases; norms, and sigma of the routers
                    parameter.fill_(0.0 if "bias" in name else 1.0)


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype of matrix products, and of tokens on the wire."""
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32


def init_stds(recipe: Recipe) -> tuple[float, float]:
    """Return the standard deviations of weights and of output projections, as in Megatron-LM."""
    std = recipe.model.init_std
    return std, std / math.sqrt(2 * recipe.model.layers)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return parameter groups with weight decay on matrices, and none on norms, scales and other vectors."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    groups = [(matrices, weight_decay), (vectors, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]
