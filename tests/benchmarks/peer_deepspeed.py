"""Peer: a transformer with DeepSpeed's own MoE layer, without dropped tokens. It runs in the peers' environment.

It uses ZeRO 0, experts split over all ranks (`ep_size`), which talk over gloo, torch's AdamW, and with `compile`
DeepSpeed's own call of torch.compile. The rest of the block is
standard: RMSNorm, rotary attention by scaled_dot_product_attention, SwiGLU experts. bf16 is autocast over fp32
parameters.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from peer_protocol import pin, serve, take_stdout
from torch import Tensor, nn


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, ffn_hidden: int):
        super().__init__()
        self.w13 = nn.Linear(hidden, 2 * ffn_hidden, bias=False)
        self.w2 = nn.Linear(ffn_hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(a) * b)


class Block(nn.Module):
    def __init__(self, s: dict[str, Any]):
        from deepspeed.moe.layer import MoE

        super().__init__()
        hidden = s["hidden"]
        self.heads, self.kv_heads, self.head_dim = s["heads"], s["kv_heads"], hidden // s["heads"]
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.moe = MoE(
            hidden,
            SwiGLU(hidden, s["ffn_hidden"]),
            num_experts=s["experts"],
            ep_size=int(os.environ["WORLD_SIZE"]),
            k=1,
            drop_tokens=False,
            use_rts=False,
        )

    def forward(self, h_BSD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        qkv = self.qkv(self.attention_norm(h_BSD)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        h_BSD = h_BSD + self.out(y.transpose(1, 2).flatten(2))
        experts_BSD, balance_loss, _ = self.moe(self.ffn_norm(h_BSD))
        return h_BSD + experts_BSD, balance_loss


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Model(nn.Module):
    def __init__(self, s: dict[str, Any]):
        super().__init__()
        self.embedding = nn.Embedding(s["vocab"], s["hidden"])
        self.blocks = nn.ModuleList(Block(s) for _ in range(s["layers"]))
        self.norm = nn.RMSNorm(s["hidden"], eps=1e-5)
        self.head = nn.Linear(s["hidden"], s["vocab"], bias=False)
        half = s["hidden"] // s["heads"] // 2
        angles = torch.outer(torch.arange(s["seq_len"]), 1e6 ** (-torch.arange(half) / half))
        self.rope = angles.cos(), angles.sin()
        self.bf16 = s["dtype"] == "bfloat16"
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            h_BSD = self.embedding(ids)
            balance = torch.zeros(())
            for block in self.blocks:
                h_BSD, balance_loss = block(h_BSD, *self.rope)
                balance = balance + balance_loss
            logits_BSV = self.head(self.norm(h_BSD))
        return F.cross_entropy(logits_BSV.float().flatten(0, 1), targets.flatten()) + 0.01 * balance


def training_step(s: dict[str, Any]) -> Callable[..., None]:
    """Return a function that takes optimizer steps on this rank's share of a global batch."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split_groups

    # Otherwise the first start compiles an extension for a minute, and its lock survives a killed process.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed("gloo", timeout=timedelta(minutes=10))
    torch.manual_seed(0)
    model = Model(s)
    groups = split_groups([{"params": list(model.parameters()), "name": "all"}])
    micro_batches = s["micro_batches"] // ranks
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
        config={
            "train_micro_batch_size_per_gpu": s["sequences"],
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 0},
        },
    )
    if s["compile"]:
        engine.compile()
    if ranks > 1:
        pin(rank)
    torch.manual_seed(1 + rank)

    def step(steps: int) -> None:
        for _ in range(steps * micro_batches):
            ids = torch.randint(0, s["vocab"], (s["sequences"], s["seq_len"] + 1))
            engine.backward(engine(ids[:, :-1], ids[:, 1:]))
            engine.step()

    return step


if __name__ == "__main__":
    answer = take_stdout()
    serve(answer, training_step(json.loads(sys.argv[1])))
