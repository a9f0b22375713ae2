"""`python -m trainer bench`: what this machine does with a recipe's shapes, beside its own limits.

Everything is the trainer's own code on a rank's share of the machine, and the best of several runs. A run is cut to a
fraction of a second: fewer sequences, fewer experts; never narrower ones.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pool.shard import ExpertServer, ExpertShard
from trainer.bench.tables import PROCESSOR
from trainer.bench.wire import measure_wire
from trainer.common.errors import UserError
from trainer.common.machine import limit_threads, usable_cores, usable_memory
from trainer.config.recipe import Recipe
from trainer.model.micro_batch import Objective, PoolMap, train_micro_batch
from trainer.model.trunk import Trunk
from trainer.planning.hardware import Figure, Hardware, Profile, Rates
from trainer.planning.model_costs import FP32, count_flops

ROWS_PER_EXPERT = (32, 128, 512)
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GEMM_PEAK, MEMORY = "GEMM peak", "memory bandwidth"


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: of one measurement, besides a first run; a run would last a tenth of that at the GEMM peak.
        gemm_sizes: sides of the square products.
        copy_bytes: a copy that no cache holds.
        message_bytes: a large message.
    """

    seconds: float
    gemm_sizes: tuple[int, ...]
    copy_bytes: int
    message_bytes: int = 8 * 2**20


EFFORT = {
    "cpu": Effort(0.7, gemm_sizes=(512, 1024, 2048), copy_bytes=2**28),
    "cuda": Effort(0.3, gemm_sizes=(2048, 4096, 8192), copy_bytes=2**30),
}


def run(recipe: Recipe, device: torch.device, out: Path, effort: Effort | None = None) -> Profile:
    """Measure and save to `out`.

    Raises:
        UserError: a dense recipe, or `out` cannot be written (known before anything is measured).
    """
    if recipe.model.ffn == "dense":
        raise UserError("bench: model.ffn = dense: has no experts and no wire to measure; take a recipe with a pool")
    if not (os.path.isdir(out.parent) and os.access(out.parent, os.W_OK)) or os.path.isdir(out):
        raise UserError(f"--out {out}: cannot be written; choose a file in a folder that is there")
    if device.type == "cpu":
        limit_threads(recipe.grid.world_size)  # as a rank of this job has
    profile = _measure(recipe, device, effort or EFFORT[device.type])
    profile.save(out)
    return profile


def best_seconds(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest run within `seconds` (one at least), after a first run that does not count."""
    function()
    best, until = math.inf, time.perf_counter() + seconds
    while True:
        _synchronize(device)
        started = time.perf_counter()
        function()
        _synchronize(device)
        now = time.perf_counter()
        best = min(best, now - started)
        if now >= until:
            return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Progress:
    """A bar on a terminal; in a log a line for each measurement."""

    def __init__(self, total: int):
        self._bar = tqdm(total=total, disable=not sys.stderr.isatty(), bar_format="{n_fmt}/{total_fmt} {bar} {desc}")
        self._bar.dynamic_ncols = True

    def begin(self, what: str) -> None:
        if self._bar.disable:
            print(f"measuring {what}", file=sys.stderr)
        else:
            self._bar.set_description_str(what)
            self._bar.update()

    def close(self) -> None:
        self._bar.close()


def _measure(recipe: Recipe, device: torch.device, effort: Effort) -> Profile:
    progress = _Progress(2 + 5 * len(PRECISIONS))
    progress.begin("memory")
    bandwidth = memory_bandwidth(device, effort)
    figures = [Figure("memory, read + written", None, bandwidth, "bytes/s", None, None)]
    rates: dict[Precision, Rates] = {}
    launch = math.inf
    wall, processor = time.perf_counter(), time.process_time()
    for precision in PRECISIONS:
        bench = _Precision(recipe, precision, device, effort)
        for what in bench.measure():
            progress.begin(f"{what}, {precision}")
        figures += bench.figures
        rates[precision] = bench.rates()
        launch = min(launch, bench.launch_latency)
        del bench
    had = (time.process_time() - processor) / (time.perf_counter() - wall)
    progress.begin("wire")
    wire = measure_wire(recipe, device, effort.message_bytes)
    progress.close()
    if device.type == "cpu":
        figures.append(Figure(PROCESSOR, None, had, "of its time", had / torch.get_num_threads(), "the threads' time"))
    figures += [Figure("expert launch, one row", None, launch, "s", None, None), *wire.beside(MEMORY, bandwidth)]
    hardware = Hardware(
        name=_name(recipe, device),
        fp32=rates["fp32"],
        bf16=rates["bf16"],
        memory=_memory(recipe, device),
        memory_bandwidth=bandwidth,
        launch_latency=launch,
        wire_latency=wire.latency,
        wire_bandwidth=wire.bandwidth,
    )
    return Profile(hardware, tuple(figures))


def memory_bandwidth(device: torch.device, effort: Effort) -> float:
    """Bytes/s of a copy, read and written."""
    source = torch.ones(effort.copy_bytes // FP32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device, effort.seconds)


class _Precision:
    """All products in one precision. `measure` announces each measurement and makes it when it is resumed."""

    def __init__(self, recipe: Recipe, precision: Precision, device: torch.device, effort: Effort):
        train = recipe.train.model_copy(update={"precision": precision})
        self._recipe = recipe.model_copy(update={"train": train})
        self._flops = count_flops(recipe)
        self._precision, self._device, self._effort = precision, device, effort
        self.figures: list[Figure] = []
        self.launch_latency = math.inf
        self._peak = 0.0
        self._shares: dict[str, float] = {}

    def rates(self) -> Rates:
        trunk, head, experts = (self._shares[name] for name in ("trunk", "head", "experts"))
        return Rates(self._peak, trunk=trunk, head=head, experts=experts)

    def measure(self) -> Iterator[str]:
        yield "dense products"
        self._peak = max(self._gemm(size) for size in self._effort.gemm_sizes)
        self._figure("dense product", self._peak)
        yield "experts"
        by_rows = self._experts()
        for rows, flops in by_rows.items():
            self._figure(f"experts, {rows} rows each", flops)
        self._shares["experts"] = self._share(max(by_rows.values()))
        yield "router"
        trunk = Trunk(_two_layers(self._recipe), self._device)
        tokens = self._sequences(self._flops.trunk_layer) * self._recipe.model.seq_len
        seconds = self._router(trunk, tokens)
        self._figure("router", 3 * self._flops.router * tokens / seconds)
        experts = tokens * self._recipe.router.top_k * 3 * self._flops.expert / by_rows[128]
        self.figures.append(
            Figure("router's time", self._precision, seconds / tokens, "s a token", seconds / experts, "experts' time")
        )
        yield "trunk layer and head"
        for name, title, flops in (
            ("trunk", "layer with router", self._flops.trunk_layer + self._flops.router),
            ("head", "head and loss", self._flops.head),
        ):
            sequences = self._sequences(flops)
            layer, head = self._segments(trunk, sequences)
            reached = 3 * flops * sequences * self._recipe.model.seq_len / (layer if name == "trunk" else head)
            self._figure(title, reached)
            self._shares[name] = self._share(reached)
        yield "expert launch"
        self.launch_latency = self._launch()

    def _figure(self, name: str, flops: float) -> None:
        self.figures.append(Figure(name, self._precision, flops, "FLOP/s", flops / self._peak, GEMM_PEAK))

    def _share(self, flops: float) -> float:
        return min(1.0, flops / self._peak)  # on a busy machine the peak may have had a worse moment

    def _work(self) -> float:
        """FLOPs of a run."""
        return self._peak * self._effort.seconds / 10

    def _sequences(self, flops_a_token: float) -> int:
        """Sequences of a run: at most a micro-batch, at least one."""
        fitting = int(self._work() / (3 * flops_a_token * self._recipe.model.seq_len))
        return max(1, min(self._recipe.train.micro_batch, fitting))

    def _gemm(self, size: int) -> float:
        a, b = (torch.randn(size, size, device=self._device).to(DTYPES[self._precision]) for _ in range(2))
        out = torch.empty_like(a)
        share = self._effort.seconds / len(self._effort.gemm_sizes)
        return 2 * size**3 / best_seconds(lambda: torch.mm(a, b, out=out), self._device, share)

    def _experts(self) -> dict[int, float]:
        """FLOP/s of a request's forward and both backward passes, by rows of each expert."""
        a_row = 3 * self._flops.expert
        most = int(self._work() / (a_row * max(ROWS_PER_EXPERT)))
        experts = max(2, min(self._recipe.pool.experts // self._recipe.grid.expert_parallel, most))
        server = self._server(experts)

        def serve(x_ND: Tensor, counts: list[int]) -> None:
            (y_ND,) = server.forward([0], [(x_ND, counts)], keep_for_backward=True)
            server.backward([0], [y_ND])
            server.shard.deferred_dw.drain()

        reached = {}
        for rows in ROWS_PER_EXPERT:
            x_ND = torch.randn(experts * rows, self._recipe.model.hidden, device=self._device)
            x_ND = x_ND.to(DTYPES[self._precision])
            taken = best_seconds(partial(serve, x_ND, [rows] * experts), self._device, self._effort.seconds)
            reached[rows] = a_row * experts * rows / taken
        return reached

    def _server(self, experts: int) -> ExpertServer:
        m = self._recipe.model
        with self._device:
            shard = ExpertShard(
                tuple(range(experts)), m.hidden, m.ffn_hidden, DTYPES[self._precision], deferred_bytes=2**62
            )
        for parameter in shard.parameters():
            nn.init.normal_(parameter, std=m.init_std)
        return ExpertServer(shard)

    def _launch(self) -> float:
        """Seconds of a forward of one row: little but the way to the kernels."""
        server = self._server(1)
        x_ND = torch.zeros(1, self._recipe.model.hidden, dtype=DTYPES[self._precision], device=self._device)
        return best_seconds(
            lambda: server.forward([0], [(x_ND, [1])], keep_for_backward=False), self._device, self._effort.seconds / 10
        )

    def _router(self, trunk: Trunk, tokens: int) -> float:
        """Seconds of the router's forward and backward."""
        x_TD = torch.randn(tokens, self._recipe.model.hidden, device=self._device, requires_grad=True)
        router = trunk.blocks[0].router

        def route() -> None:
            with trunk.autocast():
                routing = router(x_TD)  # type: ignore[operator]
            roots = [routing.topk_scores_TK, routing.mean_scores_M]
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])

        return best_seconds(route, self._device, self._effort.seconds)

    def _segments(self, trunk: Trunk, sequences: int) -> tuple[float, float]:
        """Seconds of a layer's segment and of the head with embedding and loss, forward and backward.

        A micro-batch of two layers whose requests are answered by themselves; each piece at its best.
        """
        m, device = self._recipe.model, self._device
        sequences_BS1 = torch.randint(m.vocab, (sequences, m.seq_len + 1), device=device)
        pool_map = PoolMap(
            torch.arange(self._recipe.experts_per_layer, device=device), self._recipe.experts_per_layer, 2
        )
        objective = Objective(1.0, lambda load_LM: None, 0.0, self._recipe.train.recompute)
        best = [math.inf] * 5

        def micro_batch() -> None:
            coroutine = train_micro_batch(trunk, pool_map, sequences_BS1, 0, objective)
            times, rows_ND, ended = [time.perf_counter()], None, False
            while not ended:
                try:
                    rows_ND = coroutine.send(rows_ND).rows_ND  # type: ignore[arg-type]  # None starts a generator
                except StopIteration:
                    ended = True
                _synchronize(device)
                times.append(time.perf_counter())
            best[:] = map(min, best, (after - before for before, after in pairwise(times)))

        best_seconds(micro_batch, device, self._effort.seconds)
        first_forward, forward, head, backward, first_backward = best
        embedding = max(0.0, first_forward - forward) + max(0.0, first_backward - backward)
        return forward + backward, head + embedding


def _two_layers(recipe: Recipe) -> Recipe:
    """The recipe's shapes with two layers and what one of its layers sees of the pool."""
    model = recipe.model.model_copy(update={"layers": 2, "groups": 1})
    pool = recipe.pool.model_copy(update={"experts": recipe.experts_per_layer})
    return recipe.model_copy(update={"model": model, "pool": pool})


def _name(recipe: Recipe, device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0].partition(":")[2].strip() if names else "CPU"
    return f"{model}, {torch.get_num_threads()} of {usable_cores()} cores"


def _memory(recipe: Recipe, device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return usable_memory() // recipe.grid.world_size
