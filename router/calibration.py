"""The constant c of NormRouter (Eq. M8 of docs/method.md), estimated once before training.

Letters: N draws in a chunk, M experts, K top-k.
"""

import functools

import torch

NUM_DRAWS = 100_000
CHUNK_DRAWS = 2_000  # a chunk stays in the cache, which is three times as fast as all draws at once
SEED = 1


@functools.cache
def norm_constant(num_experts: int, top_k: int) -> float:
    """Estimate the scale with which a token's K gate values start with a 2-norm near 1 (Eq. 7 of the paper).

    c = E[1 / sqrt(sum of the K largest y_j^2)] with y = relu(x / ||x||) and x ~ N(0, I_M), from 100,000 draws with a
    fixed seed, so that every rank and every run has the same number. A draw without a positive entry would add an
    infinite term and is left out (1 draw in 256 at M = 8). Draws whose largest entry is barely positive make the
    estimate depend on the seed for M up to about 10, because the expectation diverges like a logarithm; from M = 16 on
    the effect is below 1 %.

    Args:
        num_experts: M.
        top_k: K.

    Returns:
        c, without a unit.

    Raises:
        ValueError: `top_k` is not between 1 and `num_experts`.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"router.top_k is {top_k}: it must be from 1 to the {num_experts} experts a layer sees")
    generator = torch.Generator().manual_seed(SEED)
    x_NM = torch.empty(CHUNK_DRAWS, num_experts, dtype=torch.float32)
    total, draws = 0.0, 0
    for _ in range(NUM_DRAWS // CHUNK_DRAWS):
        x_NM.normal_(generator=generator)
        norm_N = torch.linalg.vector_norm(x_NM, dim=-1)
        topk_NK = x_NM.topk(top_k, dim=-1, sorted=False).values.relu()
        topk_norm_N = torch.linalg.vector_norm(topk_NK, dim=-1)
        terms = (norm_N / topk_norm_N)[topk_norm_N > 0]
        total += terms.sum(dtype=torch.float64).item()
        draws += terms.numel()
    return total / draws
