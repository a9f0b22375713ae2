"""Compare an export on two ranks, divided by its tensor-parallel plan, with the same export on one.

Usage: torchrun --nproc-per-node 2 -m tests.trainer.export.tensor_parallel EXPORT

It runs the code in the folder, and needs transformers 5.24 or later.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def main(folder: str) -> None:
    """Print the largest relative difference of the logits, and the shapes that a rank holds of the pool."""
    dist.init_process_group("gloo")
    config = DistributedConfig(tp_size=dist.get_world_size())
    divided = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, distributed_config=config
    )
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        logits = divided(tokens).logits
        if dist.get_rank() == 0:
            whole = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
            expected = whole(tokens).logits
            difference = float((logits - expected).abs().max() / expected.abs().max())
            pool = {n: tuple(p.to_local().shape) for n, p in divided.named_parameters() if "experts" in n}
            print(f"{difference:.1e}", pool)
            assert difference < 1e-5
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
