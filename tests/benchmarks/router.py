"""The router and the permutation, forward and backward, compared with the router's matrix products alone.

A router's FLOPs are three products of T x D x M: the logits, the gradient of the hidden states, and that of the
weight. At 4,096 experts, each router is compared with these products ("router_over_products_..."; 1 would be the
bound). How the costs grow with the experts M and the choices K of a token is reported in milliseconds. Letters as in
`router.routers`.

python -m tests.benchmarks.router [--rounds 8] [--json]
"""

from __future__ import annotations

from collections.abc import Callable

import click
import torch
from torch import Tensor

from pool.permute import combine, permutation, permute
from router import Router, build_router
from router.routers import RouterKind
from tests.benchmarks.experts import time_rounds
from tests.benchmarks.report import print_report, ratios

TOKENS, HIDDEN = 2048, 1024
EXPERTS = (96, 384, 1024, 4096)
TOP_K = (1, 2, 4, 8)
COMPARED: list[tuple[RouterKind, int]] = [("norm", 1), ("norm", 2), ("softmax", 1), ("softmax", 2)]


def products(experts: int, tokens: int = TOKENS, hidden: int = HIDDEN) -> Callable[[], None]:
    """Return the products of a router alone."""
    x_TD, weight_MD, logits_TM = torch.randn(tokens, hidden), torch.randn(experts, hidden), torch.randn(tokens, experts)

    def run() -> None:
        torch.mm(x_TD, weight_MD.t())
        torch.mm(logits_TM, weight_MD)
        torch.mm(logits_TM.t(), x_TD)

    return run


def routing(router: Router, x_TD: Tensor) -> Callable[[], None]:
    """Return a router's forward and backward, with the gradients of its gate values and mean scores."""
    d_topk_TK, d_mean_M = torch.randn(len(x_TD), router.top_k), torch.randn(len(router.weight_MD))

    def run() -> None:
        router.zero_grad(set_to_none=True)
        x_TD.grad = None
        routed = router(x_TD)
        torch.autograd.backward([routed.topk_scores_TK, routed.mean_scores_M], [d_topk_TK, d_mean_M])

    return run


def permuting(experts: int, top_k: int, tokens: int = TOKENS, hidden: int = HIDDEN) -> Callable[[], None]:
    """Return the way of the tokens to experts and back, without the experts, forward and backward."""
    scores_TK = torch.randn(tokens, top_k).requires_grad_()
    ids_TK = torch.rand(tokens, experts).topk(top_k).indices
    x_TD, dy_TD = torch.randn(tokens, hidden).requires_grad_(), torch.randn(tokens, hidden)
    position_M = torch.arange(experts)

    def run() -> None:
        x_TD.grad = scores_TK.grad = None
        p = permutation(ids_TK, position_M)
        combine(permute(x_TD, p), scores_TK, p).backward(dy_TD)

    return run


def make_router(kind: RouterKind, experts: int, top_k: int, hidden: int = HIDDEN) -> Router:
    """Build a router with drawn weights."""
    router = build_router(kind, hidden, experts, top_k, "raw", z_loss=False, constant=1.0)
    router.reset_parameters(0.02, torch.Generator().manual_seed(0))
    return router


def kept_bytes(router: Router, x_TD: Tensor) -> int:
    """Return the bytes that a forward keeps for its backward, without the weight and the hidden states."""
    outside = {t.untyped_storage().data_ptr() for t in (*router.parameters(), x_TD)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        router(x_TD)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in outside)


def router_results(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the named ratios at the most experts, and the milliseconds of everything else."""
    most = seconds[f"products_{max(EXPERTS)}_experts"]
    named = {f"router_over_products_{k}_top_{n}": ratios(most, seconds[f"{k}_top_{n}"]) for k, n in COMPARED}
    compared = {f"{kind}_top_{top_k}" for kind, top_k in COMPARED}
    return named | {f"{name}_ms": [1e3 * s for s in times] for name, times in seconds.items() if name not in compared}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="Also print one JSON object at the end.")
def main(rounds: int, as_json: bool) -> None:
    """Compare the routers with their products on one thread of a CPU, in fp32."""
    x_TD, most = torch.randn(TOKENS, HIDDEN).requires_grad_(), max(EXPERTS)
    contenders: dict[str, Callable[[], None]] = {}
    notes = []
    for kind, top_k in COMPARED:
        router = make_router(kind, most, top_k)
        contenders[f"{kind}_top_{top_k}"] = routing(router, x_TD)
        matrices = kept_bytes(router, x_TD) / (4 * TOKENS * most)
        notes.append(f"{kind}, top-{top_k}: keeps {matrices:.2f} fp32 matrices of tokens x experts for its backward")
    for experts in EXPERTS:
        contenders[f"products_{experts}_experts"] = products(experts)
        for top_k in TOP_K:
            contenders[f"norm_{experts}_experts_top_{top_k}"] = routing(make_router("norm", experts, top_k), x_TD)
            contenders[f"permutation_{experts}_experts_top_{top_k}"] = permuting(experts, top_k)
    seconds = time_rounds(contenders, rounds, torch.device("cpu"), "fp32")
    title = f"Routers: {TOKENS:,} tokens, D={HIDDEN}, compared at M={most}, fp32, one thread"
    print_report(title, "python -m tests.benchmarks.router", router_results(seconds), notes, as_json)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
