"""The parts of `tests.gpu.check`: python -m tests.gpu.parts NAME DIR [--rehearse], each in a process of its own.

A part writes what it finds to DIR/NAME.json as it goes, and fails by an exception.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from trainer.common.atomic import atomic_write
from trainer.common.gpus import VISIBLE, look, set_allocator, why_none
from trainer.common.strict_json import dumps
from trainer.config.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
TINY = {
    "quickstart": (
        *("model.layers=2", "model.hidden=32", "model.ffn_hidden=32", "model.vocab=300", "model.seq_len=32"),
        *("pool.experts=8", "train.global_batch=4", "train.micro_batch=2"),
    ),
    "unipool-182m": (
        *("model.layers=2", "model.hidden=64", "model.heads=2", "model.kv_heads=1", "model.ffn_hidden=64"),
        *("model.vocab=300", "model.seq_len=32", "pool.experts=8", "train.global_batch=32", "train.micro_batch=4"),
    ),
    "unipool-978m": ("model.hidden=64", "model.heads=2", "model.kv_heads=1", "model.ffn_hidden=64", "pool.experts=8"),
}
"""Shapes of a rehearsal."""

LOSS_TOLERANCE = 1e-2
"""Largest relative difference between losses on a GPU and on the CPU, in fp32."""

PACKAGES = (
    *("deepspeed", "pydantic", "datasets", "pyarrow", "tokenizers", "fastokens", "transformers", "safetensors"),
    *("scipy", "pandas", "matplotlib", "tensorboard", "prometheus_client", "zstandard", "filelock", "psutil", "rich"),
)


class Part:
    """Where a part writes, and on what it runs.

    Args:
        rehearse: Whether it runs on the CPU with tiny shapes.
    """

    def __init__(self, name: str, folder: Path, rehearse: bool):
        self.name, self.folder, self.rehearse = name, folder, rehearse
        self.found: dict[str, Any] = {}

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def write(self, **found: Any) -> None:
        """Add to what the part has found; the file is always whole."""
        self.found |= found
        text = dumps(self.found)
        atomic_write(self.folder / f"{self.name}.json", lambda path: path.write_text(text))

    def sets(self, recipe: str, *sets: str) -> list[str]:
        """Return overrides of a recipe's keys for this part."""
        return [*(TINY[recipe] if self.rehearse else ()), *sets]


def machine(part: Part) -> None:
    """What there is: GPUs, torch, the packages that the trainer needs."""
    import torch

    from trainer.doctor.gpus import torch_and_gpus

    facts = look()
    part.write(
        gpus=[gpu.name for gpu in facts.gpus],
        torch=facts.torch,
        cuda=facts.built_for,
        driver=facts.driver,
        python=sys.version.split()[0],
        cores=os.cpu_count(),
        unmet=_unmet(),
        missing=[error for name in PACKAGES if (error := _import_error(name))],
        doctor=[f"{finding.status}: {finding.about}: {finding.found}" for finding in torch_and_gpus(None)],
    )
    assert not part.found["missing"], part.found["missing"]
    if part.rehearse:
        return
    assert facts.gpus, why_none(facts)
    properties = torch.cuda.get_device_properties(0)
    part.write(memory=properties.total_memory, sms=properties.multi_processor_count, nccl=torch.cuda.nccl.version())
    part.write(matmul_flops=_matmul_flops(torch.device("cuda"), 8192))


def _unmet() -> list[str]:
    """Return what requirements.txt asks for and is not here, also in turn; what torch needs is torch's affair."""
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    asked, looked, unmet = list(map(Requirement, lines)), {"torch"}, []
    for wanted in asked:
        try:
            here = distribution(wanted.name)
        except PackageNotFoundError:
            unmet.append(str(wanted))
            continue
        if not wanted.specifier.contains(here.version, prereleases=True):
            unmet.append(f"{wanted}: here is {here.version}")
        if wanted.name not in looked:
            looked.add(wanted.name)
            further = map(Requirement, here.requires or ())
            asked += [one for one in further if one.marker is None or one.marker.evaluate({"extra": ""})]
    return sorted(set(unmet))


def _import_error(name: str) -> str:
    try:
        import_module(name)
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    return ""


def _matmul_flops(device: Any, size: int) -> float:
    import torch

    from trainer.bench.measure import best_seconds

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, device, 1.0)


def quickstart(part: Part) -> None:
    """Both roles of quickstart on one GPU, against the same on the CPU."""
    os.environ[VISIBLE] = os.environ.get(VISIBLE, "0").split(",")[0]
    _compare_losses(part)
    if not part.rehearse:
        assert "ranks share a GPU" in part.found["devices"], part.found["devices"]


def nccl_quickstart(part: Part) -> None:
    """The roles of quickstart on a GPU each, against the same on the CPU."""
    _compare_losses(part)


def _compare_losses(part: Part) -> None:
    jobs = {}
    for run, device in (("checked", part.device), ("expected", "cpu")):
        run_dir = part.folder / f"{part.name}-{run}"
        sets = part.sets(
            "quickstart",
            *("train.steps=2" if part.rehearse else "train.steps=10", "eval.batches=1", "data.max_documents=200"),
            *(f"run.dir={run_dir}", f"data.dir={part.folder / 'data'}", f"parallel.device={device}"),
        )
        command = [sys.executable, "-m", "trainer", "train", "quickstart", *_options(sets)]
        log = run_dir.with_suffix(".log")
        shutil.rmtree(run_dir, ignore_errors=True)
        with log.open("w") as output:
            jobs[run] = (run_dir, log, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
    losses = {}
    for run, (run_dir, log, job) in jobs.items():
        status = job.wait()
        print(log.read_text())
        assert status == 0, f"{run}: status {status}"
        losses[run] = [line["loss"] for line in _records(run_dir) if "loss" in line]
        if run == "checked":
            (devices,) = (line for line in log.read_text().splitlines() if line.startswith("devices: "))
            part.write(devices=devices)
        part.write(losses=losses)
    pairs = zip(losses["checked"], losses["expected"], strict=True)
    worst = max(abs(checked - expected) / expected for checked, expected in pairs)
    part.write(largest_relative_difference=worst)
    assert worst < LOSS_TOLERANCE, worst


def _options(sets: Sequence[str]) -> list[str]:
    return [word for value in sets for word in ("--set", value)]


def _records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def experts(part: Part) -> None:
    """A layer's request to all experts, forward and both backwards, against `torch.matmul` of as many FLOPs."""
    import torch

    from pool.counts import Counts
    from pool.shard import ExpertServer, ExpertShard
    from trainer.bench.measure import best_seconds

    device = torch.device(part.device)
    found = {}
    for name in ("unipool-182m", "unipool-978m"):
        recipe = load_recipe(name, part.sets(name))
        m, number = recipe.model, recipe.pool.experts
        tokens = 256 if part.rehearse else recipe.train.micro_batch * m.seq_len
        with device:
            shard = ExpertShard(tuple(range(number)), m.hidden, m.ffn_hidden, torch.bfloat16, deferred_bytes=2**62)
        for weight in shard.parameters():  # on the device: a CPU draws the 5 billion weights of 978M for a minute
            torch.nn.init.normal_(weight, std=m.init_std)
        server = ExpertServer(shard)
        x_ND = torch.randn(tokens, m.hidden, device=device, dtype=torch.bfloat16)
        ids_N = torch.randint(number, (tokens,), generator=torch.Generator().manual_seed(0))
        counts = Counts(torch.bincount(ids_N, minlength=number).to(device))
        seconds = {}

        def forward(server: ExpertServer = server, x_ND: Any = x_ND, counts: Counts = counts) -> Any:
            return server.forward([0], [(x_ND, counts)], keep_for_backward=True)[0]

        def whole(server: ExpertServer = server, forward: Callable[[], Any] = forward) -> None:
            server.backward([0], [forward()])
            server.shard.deferred_dw.drain()

        def only_forward(server: ExpertServer = server, x_ND: Any = x_ND, counts: Counts = counts) -> None:
            server.forward([0], [(x_ND, counts)], keep_for_backward=False)

        wide_DF = torch.randn(m.hidden, m.ffn_hidden, device=device, dtype=torch.bfloat16)
        budget = 0.05 if part.rehearse else 1.0
        seconds["forward"] = best_seconds(only_forward, device, budget)
        seconds["forward and backward"] = best_seconds(whole, device, budget)
        product = best_seconds(lambda x_ND=x_ND, w_DF=wide_DF: x_ND @ w_DF, device, budget)  # type: ignore[misc]
        found[name] = {
            "tokens": tokens,
            "experts": number,
            "seconds": seconds,
            "share_of_matmul_forward": 3 * product / seconds["forward"],
            "share_of_matmul": 9 * product / seconds["forward and backward"],
            "matmul_flops": 2 * tokens * m.hidden * m.ffn_hidden / product,
        }
        part.write(shapes=found)
        del shard, weight, server, x_ND, wide_DF, forward, whole, only_forward
        if device.type == "cuda":
            torch.cuda.empty_cache()


def colocated(part: Part) -> None:
    """Thirty steps of the 182M recipe on one GPU: speed, memory beside that of `plan`, and where the time goes."""
    recipe, sets = "unipool-182m", part.sets("unipool-182m", "parallel.trunk_ranks=1", "parallel.pool_ranks=0")
    sets += [] if part.rehearse else ["train.global_batch=64"]
    part.write(sets=sets, planned_memory=_planned_memory(recipe, sets))
    _take_steps(part, recipe, [*sets, f"train.steps={3 if part.rehearse else 30}"], profile=True)


def every_rank(part: Part) -> None:
    """The 182M recipe on one rank that has both roles: it serves itself, with the threads and streams of the wire."""
    _both_roles(part, 1)


def every_rank_two(part: Part) -> None:
    """The same on two GPUs, which exchange tokens by NCCL."""
    _both_roles(part, 2)


BATCH = "train.global_batch=128"
"""Micro-batches stay as large as those of `colocated`, so that the compiler finds the trunk's graphs in its cache."""


def _both_roles(part: Part, ranks: int) -> None:
    grid = ("parallel.layout=every_rank", f"parallel.trunk_ranks={ranks}", "parallel.pool_ranks=0", "parallel.lanes=2")
    sets = part.sets("unipool-182m", *grid, f"train.steps={3 if part.rehearse else 10}")
    _take_steps(part, "unipool-182m", sets if part.rehearse else [*sets, BATCH])


def lanes_2(part: Part) -> None:
    """The 182M recipe with a GPU for each role, joined by NCCL."""
    _dedicated(part, 2)


def lanes_4(part: Part) -> None:
    """The same with four lanes."""
    _dedicated(part, 4)


def lanes_4_eight_queues(part: Part) -> None:
    """The same with the fewest hardware queues that are allowed (`trainer.common.gpus`)."""
    _dedicated(part, 4, CUDA_DEVICE_MAX_CONNECTIONS="8")


def lanes_4_two_channels(part: Part) -> None:
    """The same with fewer of the GPU's processors for NCCL."""
    _dedicated(part, 4, NCCL_MAX_P2P_NCHANNELS="2")


def _dedicated(part: Part, lanes: int, **environment: str) -> None:
    os.environ.update(environment)
    sets = part.sets("unipool-182m", "parallel.trunk_ranks=1", "parallel.pool_ranks=1", f"parallel.lanes={lanes}")
    sets += [] if part.rehearse else [BATCH]
    _take_steps(part, "unipool-182m", [*sets, f"train.steps={3 if part.rehearse else 10}"])


def _planned_memory(recipe: str, sets: Sequence[str]) -> dict[str, int]:
    command = [sys.executable, "-m", "trainer", "plan", recipe, "--json", *_options(sets)]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {memory["role"]: memory["total"] for memory in report["memory"]}


def _take_steps(part: Part, name: str, sets: Sequence[str], profile: bool = False) -> None:
    """Take the recipe's steps on made-up tokens in one process a rank; sum up what the ranks have written."""
    from tests.distributed import job_environment

    sets = [*sets, f"parallel.device={part.device}", "metrics.tensorboard=false", "run.dir=unused"]
    recipe = load_recipe(name, sets)
    world = recipe.grid.world_size
    set_allocator()  # as `train` does
    environment = os.environ | job_environment(world) | {"DS_ACCELERATOR": part.device}
    ranks = []
    for rank in range(world):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        file = part.folder / f"{part.name}-rank{rank}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.gpu.rank", str(file), "profile" if profile else "", name, *sets]
        ranks.append((subprocess.Popen(command, env=own), file))
    running, written = True, None
    while running:  # the part may be stopped before its ranks have ended
        time.sleep(0.5)
        running = any(process.poll() is None for process, _ in ranks)
        found = [json.loads(file.read_text()) for _, file in ranks if file.exists()]
        if found and found != written:
            part.write(ranks=found, **_speed(recipe, found[0]), **_share_of_plan(part, found[0]))
            written = found
    statuses = [process.returncode for process, _ in ranks]
    assert statuses == [0] * world, statuses


def _share_of_plan(part: Part, rank: dict[str, Any]) -> dict[str, float]:
    planned = part.found.get("planned_memory")
    return {"peak_over_planned": rank["peak_tensors"] / sum(planned.values())} if planned and not part.rehearse else {}


def _speed(recipe: Recipe, rank: dict[str, Any]) -> dict[str, float]:
    from trainer.planning.model_costs import count_flops

    seconds = rank["seconds"]
    step = statistics.median(seconds[len(seconds) // 3 :])  # the first ones compile
    rate = recipe.train.global_batch * recipe.model.seq_len / step
    flops = rate * count_flops(recipe).training / recipe.grid.world_size
    peak = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
    known = [value for name, value in peak.items() if any(name in gpu.name for gpu in look().gpus)]
    found = {"step_seconds": step, "tokens_per_second": rate, "flops_per_gpu": flops}
    return found | ({"mfu": flops / known[0]} if known else {})


PARTS = (
    *(machine, quickstart, experts, colocated, every_rank, nccl_quickstart, every_rank_two),
    *(lanes_2, lanes_4, lanes_4_eight_queues, lanes_4_two_channels),
)


def main(name: str, folder: str, rehearse: bool) -> None:
    """Run a part."""
    started = time.monotonic()
    part = Part(name, Path(folder), rehearse)
    {function.__name__: function for function in PARTS}[name](part)
    part.write(own_seconds=time.monotonic() - started)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--rehearse" in sys.argv[3:])
