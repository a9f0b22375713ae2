"""Measures how fast a machine computes with a recipe's shapes, relative to the machine's own limits.

Everything runs the trainer's own code on one rank's share of the machine, and the best of several runs counts. A run is
limited to a fraction of a second by using fewer sequences and fewer experts, but never narrower ones.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pool.counts import Counts
from pool.placement import contiguous
from pool.shard import ExpertServer
from trainer.bench.launches import LaunchFigures, measure_launches
from trainer.bench.tables import PROCESSOR
from trainer.bench.wire import measure_wire, synchronize, timed
from trainer.common.errors import UserError
from trainer.common.machine import limit_threads, usable_cores, usable_memory
from trainer.config.recipe import Recipe
from trainer.engine.experts import build_shard
from trainer.model.micro_batch import Objective, PoolMap, train_micro_batch
from trainer.model.trunk import Trunk, compute_dtype
from trainer.planning.hardware import Figure, Hardware, Profile, Rates
from trainer.planning.model_costs import FP32, count_flops

ROWS_PER_EXPERT = (32, 128, 512)
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
GEMM_PEAK, MEMORY = "GEMM peak", "memory bandwidth"


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: Time of one measurement; a run of it would take a tenth of that at the GEMM peak.
        gemm_sizes: Sizes of the square dense products.
        copy_bytes: Size of a copy that fits into no cache.
        message_bytes: Size of a large message.
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
    """Measure, and save the profile to `out`.

    Raises:
        UserError: The recipe is dense, or `out` cannot be written; this is checked before anything is measured.
    """
    if recipe.model.ffn == "dense":
        raise UserError("bench: model.ffn = dense: has no experts and no wire to measure; use a recipe with a pool")
    if not (os.path.isdir(out.parent) and os.access(out.parent, os.W_OK)) or os.path.isdir(out):
        raise UserError(f"--out {out}: cannot be written; choose a file in an existing, writable folder")
    if device.type == "cpu":
        limit_threads(recipe.grid.world_size)  # as many as a rank of this job has
    profile = _measure(recipe, device, effort or EFFORT[device.type])
    profile.save(out)
    return profile


def best_seconds(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Run a function for about `seconds`, at least twice, and return the time of its shortest run but the first."""
    function()
    best, until = math.inf, time.perf_counter() + seconds
    while True:
        best = min(best, timed(function, device))
        if time.perf_counter() >= until:
            return best


def _announce(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr)


def _measure(recipe: Recipe, device: torch.device, effort: Effort) -> Profile:
    _announce("memory")
    bandwidth = memory_bandwidth(device, effort)
    figures = [Figure("memory, read + written", None, bandwidth, "bytes/s", None, None)]
    rates: dict[Precision, Rates] = {}
    launch = math.inf
    wall, processor = time.perf_counter(), time.process_time()
    for precision in PRECISIONS:
        bench = _Precision(recipe, precision, device, effort)
        rates[precision] = bench.measure()
        figures += bench.figures
        _announce(f"expert launch, {precision}")
        launch = min(launch, bench.launch_latency())
    available = (time.process_time() - processor) / (time.perf_counter() - wall)
    _announce("wire")
    wire = measure_wire(recipe, device, effort.message_bytes)
    if device.type == "cpu":
        share = available / torch.get_num_threads()
        figures.append(Figure(PROCESSOR, None, available, "of its time", share, "the threads' time"))
    costs = None
    if device.type == "cuda":
        _announce("launches and copies")
        costs = measure_launches(device, effort.copy_bytes // 4)
        figures += launch_figures(costs)
    figures += [
        Figure("expert launch, one row", None, launch, "s", None, None),
        Figure("wire latency, one way", None, wire.latency, "s", None, None),
        Figure("wire, one way", None, wire.bandwidth, "bytes/s", wire.bandwidth / bandwidth, MEMORY),
        Figure("transfer hidden by computing", None, wire.hidden, "of its time", wire.hidden, "its time"),
    ]
    hardware = Hardware(
        name=_name(device),
        fp32=rates["fp32"],
        bf16=rates["bf16"],
        memory=_memory(recipe, device),
        memory_bandwidth=bandwidth,
        launch_latency=launch,
        wire_latency=wire.latency,
        wire_bandwidth=wire.bandwidth,
        launch=costs.launch if costs else 0.0,
        kernel=costs.kernel if costs else 0.0,
    )
    return Profile(hardware, tuple(figures))


def launch_figures(costs: LaunchFigures) -> list[Figure]:
    """The figures of a GPU's launches and copies, for the profile."""
    return [
        Figure("launch of a kernel, host", None, costs.launch, "s", None, None),
        Figure("empty kernel, device", None, costs.kernel, "s", None, None),
        Figure("pinned memory to device", None, costs.to_device, "bytes/s", None, None),
        Figure("device to pinned memory", None, costs.to_host, "bytes/s", None, None),
        Figure("copy of 4 KiB to the host", None, costs.copy_latency, "s", None, None),
    ]


def memory_bandwidth(device: torch.device, effort: Effort) -> float:
    """Measure a copy, in bytes/s read and written."""
    source = torch.ones(effort.copy_bytes // FP32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device, effort.seconds)


class _Precision:
    """All measurements in one precision; `figures` has their results."""

    def __init__(self, recipe: Recipe, precision: Precision, device: torch.device, effort: Effort):
        self._recipe = recipe.changed("train", precision=precision)
        self._flops, self._dtype = count_flops(recipe), compute_dtype(self._recipe)
        self._precision, self._device, self._effort = precision, device, effort
        self.figures: list[Figure] = []
        self._peak = 0.0

    def measure(self) -> Rates:
        """Measure all pieces of a step."""
        seq_len, flops = self._recipe.model.seq_len, self._flops
        _announce(f"dense products, {self._precision}")
        self._peak = max(self._gemm(size) for size in self._effort.gemm_sizes)
        self._figure("dense product", self._peak)
        _announce(f"experts, {self._precision}")
        by_rows = self._experts()
        for rows, reached in by_rows.items():
            self._figure(f"experts, {rows} rows each", reached)
        _announce(f"router, {self._precision}")
        trunk = Trunk(_two_layers(self._recipe), self._device)
        tokens = self._sequences(flops.trunk_layer) * seq_len
        seconds = self._router(trunk, tokens)
        self._figure("router", 3 * flops.router * tokens / seconds)
        experts = tokens * self._recipe.router.top_k * 3 * flops.expert / by_rows[128]
        share = seconds / experts
        self.figures.append(
            Figure("router's time", self._precision, seconds / tokens, "s/token", share, "experts' time")
        )
        _announce(f"trunk layer and head, {self._precision}")
        layer_flops = flops.trunk_layer + flops.router
        sequences = self._sequences(layer_flops)
        layer = 3 * layer_flops * sequences * seq_len / self._segments(trunk, sequences)[0]
        self._figure("layer with router", layer)
        sequences = self._sequences(flops.head)
        head = 3 * flops.head * sequences * seq_len / self._segments(trunk, sequences)[1]
        self._figure("head and loss", head)
        # On a busy machine the measured peak may be lower than what a piece reaches.
        shares = [min(1.0, reached / self._peak) for reached in (layer, head, max(by_rows.values()))]
        return Rates(self._peak, shares[0], shares[1], shares[2])

    def _figure(self, name: str, flops: float) -> None:
        self.figures.append(Figure(name, self._precision, flops, "FLOP/s", flops / self._peak, GEMM_PEAK))

    def _work(self) -> float:
        """FLOPs of one run."""
        return self._peak * self._effort.seconds / 10

    def _sequences(self, flops_per_token: float) -> int:
        """Sequences of one run: at least one, at most a micro-batch."""
        fitting = int(self._work() / (3 * flops_per_token * self._recipe.model.seq_len))
        return max(1, min(self._recipe.train.micro_batch, fitting))

    def _gemm(self, size: int) -> float:
        """FLOP/s of a square product."""
        a, b = (torch.randn(size, size, device=self._device).to(self._dtype) for _ in range(2))
        out = torch.empty_like(a)
        share = self._effort.seconds / len(self._effort.gemm_sizes)
        return 2 * size**3 / best_seconds(lambda: torch.mm(a, b, out=out), self._device, share)

    def _experts(self) -> dict[int, float]:
        """FLOP/s of a request's forward and both of its backward passes, by rows of each expert."""
        flops_per_row = 3 * self._flops.expert
        most = int(self._work() / (flops_per_row * max(ROWS_PER_EXPERT)))
        experts = max(2, min(self._recipe.pool.experts // self._recipe.grid.expert_parallel, most))
        server = self._server(experts)

        def serve(x_ND: Tensor, counts: Counts) -> None:
            (y_ND,) = server.forward([0], [(x_ND, counts)], keep_for_backward=True)
            server.backward([0], [y_ND])
            server.shard.deferred_dw.drain()

        reached = {}
        for rows in ROWS_PER_EXPERT:
            x_ND = torch.randn(experts * rows, self._recipe.model.hidden, device=self._device).to(self._dtype)
            counts = Counts.of([rows] * experts, self._device)
            taken = best_seconds(partial(serve, x_ND, counts), self._device, self._effort.seconds)
            reached[rows] = flops_per_row * experts * rows / taken
        return reached

    def _server(self, experts: int) -> ExpertServer:
        recipe = self._recipe.changed("pool", experts=experts, stash_bytes=2**62)
        return ExpertServer(build_shard(recipe, contiguous(experts, 1, 1), 0, self._device))

    def launch_latency(self) -> float:
        """Seconds of a forward of one row, nearly all of which is overhead."""
        server = self._server(1)
        x_ND = torch.zeros(1, self._recipe.model.hidden, dtype=self._dtype, device=self._device)
        forward = partial(server.forward, [0], [(x_ND, Counts.of([1], self._device))], keep_for_backward=False)
        return best_seconds(forward, self._device, self._effort.seconds / 10)

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
        """Seconds of a layer's segment, and of the head with embedding and loss, forward and backward.

        Runs micro-batches of two layers in which each request is answered with its own rows; the best time of each
        piece counts.
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
                synchronize(device)
                times.append(time.perf_counter())
            best[:] = map(min, best, (after - before for before, after in pairwise(times)))

        best_seconds(micro_batch, device, self._effort.seconds)
        first_forward, forward, head, backward, first_backward = best
        embedding = max(0.0, first_forward - forward) + max(0.0, first_backward - backward)
        return forward + backward, head + embedding


def _two_layers(recipe: Recipe) -> Recipe:
    """The recipe's shapes with two layers, and with as many experts as one of its layers sees."""
    return recipe.changed("model", layers=2, groups=1).changed("pool", experts=recipe.experts_per_layer)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0].partition(":")[2].strip() if names else "CPU"
    return f"{model}, {torch.get_num_threads()} of {usable_cores()} cores"


def _memory(recipe: Recipe, device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return usable_memory() // recipe.grid.world_size
