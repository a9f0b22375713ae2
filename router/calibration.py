"""The constant c of NormRouter (eq. 7), estimated once before training.

Letters: N draws in a chunk, M experts, K top-k.
"""

import functools

import torch

NUM_DRAWS = 100_000
CHUNK_DRAWS = 2_000  # a chunk of draws stays in cache: three times as fast as all draws at once
SEED = 1


@functools.cache
def norm_constant(num_experts: int, top_k: int) -> float:
    """The scale that gives a token's k gate values a 2-norm near 1 when training starts.

    c = E[1 / sqrt(sum of the k largest y_j^2)], y = relu(x / ||x||), x ~ N(0, I_M), from 1e5 draws of a private
    generator with a fixed seed, so that every rank and every run has the same number. A draw without a positive
    entry has an infinite term (1 draw in 256 at M = 8): it is left out. Draws whose largest entry is barely positive
    still make the estimate depend on the seed up to M of about 10 (the expectation diverges like a logarithm), by
    less than 1 % from M = 16 on.

    Returns: c, without unit.
    Errors: ValueError unless 1 <= top_k <= num_experts.
    Source: arXiv:2605.06665, eq. 7.
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
