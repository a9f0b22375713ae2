"""The experts of a pool rank, forward and both backward passes, compared with dense products of equally many FLOPs.

The work is that of a pool in one step: 8 layers, 4 micro-batches of 2,048 tokens, top-1, random routing with a mildly
uneven load. It is served as in the trainer: requests one by one, or those of 2 or 4 lanes merged; input gradients at
once, weight gradients deferred; the cast to the compute dtype is included.

"Dense" is the products alone, as large as those of a dense model: torch.mm on all 2,048 tokens of a micro-batch.
"Dense FFN" is what a dense model does with them: SwiGLU between the products, and weight gradients added in fp32. On a
CPU, `transformers` runs its Qwen3-MoE sparse block on as much work, with router and autograd: 8 blocks of M / 8 experts
each (vanilla), or one block of all M experts that is called 8 times (a naively shared pool). On a GPU, a loop over the
experts takes its place.

python -m tests.benchmarks.experts [--rounds 8] [--json] [--device cuda --shape 182m]
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pool import grouped_experts, loop_experts
from pool.counts import Counts
from pool.shard import ExpertServer, ExpertShard
from tests.benchmarks.contenders import Contender, end_in_order
from tests.benchmarks.peers import peers_python
from tests.benchmarks.report import print_report, ratios

TOKENS = 2048
LAYERS = 8
MICRO_BATCHES = 4
LANES = (1, 2, 4)
UNEVEN = 0.3
"""Standard deviation of the logarithm of an expert's popularity: max / mean is about 2 over 64 experts."""


@dataclass(frozen=True)
class Shape:
    """Sizes: hidden D, ffn_hidden F, experts M."""

    hidden: int
    ffn_hidden: int
    experts: int

    @property
    def flops(self) -> int:
        """FLOPs of a step: per token 3 products of D x F, each forward, for input and for weight gradients."""
        return LAYERS * MICRO_BATCHES * TOKENS * 18 * self.hidden * self.ffn_hidden


SHAPES = {"quick": Shape(256, 1024, 64), "182m": Shape(768, 3072, 96), "978m": Shape(1536, 6144, 192)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """Tokens x_TD and output gradients dy_TD by micro-batch; tokens per expert by micro-batch and layer."""

    x: list[Tensor]
    dy: list[Tensor]
    counts: list[list[Counts]]


def make_work(shape: Shape, dtype: torch.dtype, device: torch.device) -> Work:
    """Make the work, which is the same for every contender."""
    generator = torch.Generator().manual_seed(0)

    def rows() -> list[Tensor]:
        drawn = [torch.randn(TOKENS, shape.hidden, generator=generator) for _ in range(MICRO_BATCHES)]
        return [x.to(device, dtype) for x in drawn]

    def counts() -> Counts:
        popularity_M = (torch.randn(shape.experts, generator=generator) * UNEVEN).exp()
        ids_T = torch.multinomial(popularity_M, TOKENS, replacement=True, generator=generator)
        return Counts.of(torch.bincount(ids_T, minlength=shape.experts).tolist(), device)

    return Work(rows(), rows(), [[counts() for _ in range(LAYERS)] for _ in range(MICRO_BATCHES)])


def serve(shard: ExpertShard, work: Work, lanes: int) -> None:
    """Serve a step, with the requests of `lanes` micro-batches merged."""
    server = ExpertServer(shard)
    shard.weights_changed()
    shard.zero_grad(set_to_none=True)
    for first in range(0, MICRO_BATCHES, lanes):
        together = range(first, first + lanes)
        for layer in range(LAYERS):
            batches = [(work.x[m], work.counts[m][layer]) for m in together]
            server.forward([(m, layer) for m in together], batches, keep_for_backward=True)
        for layer in reversed(range(LAYERS)):
            server.backward([(m, layer) for m in together], [work.dy[m] for m in together])
            shard.deferred_dw.drain_if_full()
    shard.deferred_dw.drain()


def serve_with(kernels: ModuleType, shard: ExpertShard, work: Work) -> None:
    """Serve a step with the back end that was not chosen for this device."""
    with mock.patch.object(shard, "_kernels", return_value=kernels):
        serve(shard, work, max(LANES))


class DenseProducts:
    """The products of a dense SwiGLU FFN, with nothing between them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        D, F_ = shape.hidden, shape.ffn_hidden

        def drawn(*size: int) -> Tensor:
            return (torch.randn(*size, device=device) * 0.02).to(dtype)

        self.w13_2FD, self.w2_DF = drawn(2 * F_, D), drawn(D, F_)
        self.h_T2F, self.act_TF = drawn(TOKENS, 2 * F_), drawn(TOKENS, F_)

    def step(self, work: Work) -> None:
        for x, dy in zip(work.x, work.dy, strict=True):
            for _ in range(LAYERS):
                torch.mm(x, self.w13_2FD.t())
                torch.mm(self.act_TF, self.w2_DF.t())
            for _ in range(LAYERS):
                torch.mm(dy, self.w2_DF)
                torch.mm(self.h_T2F, self.w13_2FD)
                torch.mm(self.h_T2F.t(), x)
                torch.mm(dy.t(), self.act_TF)


class DenseFFN:
    """A SwiGLU FFN per layer, with a hand-written backward like that of the experts."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        sizes = ((2 * shape.ffn_hidden, shape.hidden), (shape.hidden, shape.ffn_hidden))
        self.weights = [[torch.randn(size, device=device) * 0.02 for size in sizes] for _ in range(LAYERS)]
        self.dtype = dtype

    def step(self, work: Work) -> None:
        weights = [[weight.to(self.dtype) for weight in layer] for layer in self.weights]
        gradients = [[torch.zeros_like(weight) for weight in layer] for layer in self.weights]
        for x, dy in zip(work.x, work.dy, strict=True):
            hidden = [self._forward(x, *weights[layer]) for layer in range(LAYERS)]
            for layer in reversed(range(LAYERS)):
                self._backward(x, hidden[layer], dy, weights[layer], gradients[layer])

    @staticmethod
    def _forward(x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
        h_T2F = torch.mm(x_TD, w13_2FD.t())
        a_TF, b_TF = h_T2F.chunk(2, dim=1)
        torch.mm(F.silu(a_TF) * b_TF, w2_DF.t())
        return h_T2F

    @staticmethod
    def _backward(x_TD: Tensor, h_T2F: Tensor, dy_TD: Tensor, weights: list[Tensor], gradients: list[Tensor]) -> None:
        w13_2FD, w2_DF = weights
        a_TF, b_TF = h_T2F.chunk(2, dim=1)
        silu_TF = F.silu(a_TF)
        dact_TF = torch.mm(dy_TD, w2_DF)
        da_TF = torch.ops.aten.silu_backward(dact_TF * b_TF, a_TF)
        dh_T2F = torch.cat((da_TF, dact_TF * silu_TF), dim=1)
        torch.mm(dh_T2F, w13_2FD)
        for gradient, dy, x in zip(gradients, (dh_T2F, dy_TD), (x_TD, silu_TF * b_TF), strict=True):
            if dy.dtype == gradient.dtype:
                gradient.addmm_(dy.t(), x)
            else:
                gradient += torch.mm(dy.t(), x)


def experts_ratios(seconds: dict[str, list[float]], precision: str) -> dict[str, list[float]]:
    """Return the named ratios of one precision; ours has 4 lanes unless the name says otherwise."""
    merged = max(LANES)
    named = {f"experts_over_dense_{precision}": ratios(seconds["dense"], seconds[f"{merged} lanes"])}
    for lanes in LANES:
        if lanes != merged:
            name = f"experts_{lanes}_lanes_over_dense_{precision}"
            named[name] = ratios(seconds["dense"], seconds[f"{lanes} lanes"])
    for peer in ("dense_ffn", "hf_shared", "hf_private", "loop", "grouped_mm"):
        if peer in seconds:
            named[f"experts_over_{peer}_{precision}"] = ratios(seconds[peer], seconds[f"{merged} lanes"])
    return named


def our_contenders(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], None]]:
    """Return the contenders that do a step's work in this process, by name."""
    work = make_work(shape, dtype, device)
    shard = ExpertShard(tuple(range(shape.experts)), shape.hidden, shape.ffn_hidden, dtype)
    shard.reset_parameters(0.02, 0.02, seed=0)
    shard.to(device)
    products, ffn = DenseProducts(shape, dtype, device), DenseFFN(shape, dtype, device)
    contenders: dict[str, Callable[[], None]] = {
        "dense": lambda: products.step(work),
        "dense_ffn": lambda: ffn.step(work),
    }
    for lanes in LANES:
        contenders[f"{lanes} lanes"] = lambda lanes=lanes: serve(shard, work, lanes)
    name, other = ("loop", loop_experts) if device.type == "cuda" else ("grouped_mm", grouped_experts)
    contenders[name] = lambda: serve_with(other, shard, work)
    return contenders


def hf_contenders(
    shape: Shape, dtype: torch.dtype, python: str, folder: Path, stack: ExitStack
) -> dict[str, Callable[[], None]]:
    """Return transformers' sparse blocks, which run in a process of the peers' environment."""
    settings = asdict(shape) | {
        "kind": "experts",
        "dtype": str(dtype).removeprefix("torch."),
        "layers": LAYERS,
        "sequences": 1,
        "seq_len": TOKENS,
        "micro_batches": MICRO_BATCHES,
        "heads": 4,
        "kv_heads": 4,
        "vocab": 8,
    }
    script = str(Path(__file__).with_name("peer_hf.py"))
    command = [python, script, json.dumps(settings)]
    peer = stack.enter_context(Contender(f"transformers {settings['dtype']}", command, 1, 1, folder))
    return {f"hf_{model}": lambda model=model: _ignore(peer.run(model=model)) for model in ("shared", "private")}


def _ignore(_: float) -> None:
    """Drop the peer's own time; all contenders are timed in the same way, by the caller."""


def time_rounds(
    contenders: dict[str, Callable[[], None]], rounds: int, device: torch.device, precision: str
) -> dict[str, list[float]]:
    """Return the seconds of every contender, round by round; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in tqdm(range(rounds + 1), desc=precision, dynamic_ncols=True):
        for name, work in contenders.items():
            _synchronize(device)
            started = time.perf_counter()
            work()
            _synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="Also print one JSON object at the end.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--shape", "size", type=click.Choice(list(SHAPES)), default="quick", show_default=True, help="D, F and M."
)
def main(rounds: int, as_json: bool, device: str, size: str) -> None:
    """Compare the experts with dense products, on one thread of a CPU in fp32 and bf16, or on a GPU in bf16.

    On a CPU, the peers are first installed into an environment of their own.

    \b
    Examples:
      python -m tests.benchmarks.experts --rounds 3 --json
      python -m tests.benchmarks.experts --device cuda --shape 182m
    """
    on, shape = torch.device(device), SHAPES[size]
    on_cpu = on.type == "cpu"
    python = peers_python() if on_cpu else ""
    end_in_order()
    results: dict[str, list[float]] = {}
    notes = []
    for precision in DTYPES if on_cpu else ("bf16",):
        with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            contenders = our_contenders(shape, DTYPES[precision], on)
            if on_cpu:
                contenders |= hf_contenders(shape, DTYPES[precision], python, Path(folder), stack)
            seconds = time_rounds(contenders, rounds, on, precision)
        results |= experts_ratios(seconds, precision)
        rates = (f"{name} {shape.flops / statistics.median(s) / 1e9:,.0f}" for name, s in seconds.items())
        notes.append(f"{precision}, GFLOP/s of the experts' products: {', '.join(rates)}")
    title = f"Experts at the pool, {size}: D={shape.hidden} F={shape.ffn_hidden} M={shape.experts}, {TOKENS:,} tokens"
    where = f"{title}, {torch.cuda.get_device_name() if not on_cpu else 'one thread'}"
    command = f"python -m tests.benchmarks.experts --device {device} --shape {size}"
    print_report(where, command, results, notes, as_json)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
