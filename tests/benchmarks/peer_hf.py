"""Peer: Hugging Face transformers' Qwen3-MoE with random weights. It runs in the peers' environment.

`kind: step` trains the whole model with AdamW, gradient accumulation and clipping, and with DDP over gloo on two ranks;
with `compile` by torch.compile.
`kind: experts` only runs the sparse blocks of 8 layers: 8 separate blocks, or one block called 8 times.

Experts use grouped_mm, because on a CPU transformers' own loop makes a gradient of the whole stack for every expert. In
bf16, parameters and optimizer are bf16: this is less exact than fp32 master weights but faster, because under autocast
grouped_mm stays in fp32.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

from peer_protocol import pin, serve, take_stdout


def config(s: dict[str, Any], experts: int) -> Any:
    """Make a Qwen3-MoE config of the benchmark's shape."""
    from transformers import Qwen3MoeConfig

    made = Qwen3MoeConfig(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        head_dim=s["hidden"] // s["heads"],
        moe_intermediate_size=s["ffn_hidden"],
        num_experts=experts,
        num_experts_per_tok=1,
        max_position_embeddings=s["seq_len"],
        use_cache=False,
        output_router_logits=True,  # for the balance loss, which all contenders have
        router_aux_loss_coef=0.01,
    )
    made._attn_implementation = "sdpa"
    made._experts_implementation = "grouped_mm"
    return made


def training_step(s: dict[str, Any]) -> Callable[..., None]:
    """Return a function that takes optimizer steps of the whole model on this rank's share of a global batch."""
    import torch
    import torch.distributed as dist
    from transformers import Qwen3MoeForCausalLM

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    model: Any = Qwen3MoeForCausalLM(config(s, s["experts"])).to(getattr(torch, s["dtype"])).train()
    if ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        pin(rank)
    if s["compile"]:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    micro_batches = s["micro_batches"] // ranks
    torch.manual_seed(1 + rank)

    def step(steps: int) -> None:
        for _ in range(steps):
            for number in range(micro_batches):
                ids = torch.randint(0, s["vocab"], (s["sequences"], s["seq_len"]))
                last = number == micro_batches - 1
                with nullcontext() if last or ranks == 1 else model.no_sync():
                    (model(input_ids=ids, labels=ids).loss / micro_batches).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def sparse_blocks(s: dict[str, Any]) -> Callable[..., None]:
    """Return a function that runs forward and backward of every layer's sparse block on every micro-batch."""
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    dtype = getattr(torch, s["dtype"])
    torch.manual_seed(0)

    def block(experts: int) -> Any:
        made = Qwen3MoeSparseMoeBlock(config(s, experts))
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        return made.to(dtype).train()

    models = {
        "shared": [block(s["experts"])] * s["layers"],
        "private": [block(s["experts"] // s["layers"]) for _ in range(s["layers"])],
    }
    tokens = (1, s["sequences"] * s["seq_len"], s["hidden"])
    inputs = [torch.randn(tokens, dtype=dtype, requires_grad=True) for _ in range(s["micro_batches"])]
    gradient = torch.randn(tokens, dtype=dtype)

    def layers(model: str) -> None:
        for x in inputs:
            h = x
            for layer in models[model]:
                h = h + layer(h)
            h.backward(gradient)
        for tensor in [*inputs, *(p for layer in models[model] for p in layer.parameters())]:
            tensor.grad = None

    return layers


if __name__ == "__main__":
    answer = take_stdout()
    settings = json.loads(sys.argv[1])
    serve(answer, training_step(settings) if settings["kind"] == "step" else sparse_blocks(settings))
