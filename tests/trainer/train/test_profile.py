"""Recordings of steps: which files appear, what the ranges are called, and that nothing stays behind."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pool.schedule import SERVE, Kind
from pool.wire.contract import End
from tests.distributed import join, run_ranks
from tests.training import optimizer_step, tiny
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe, check_recipe
from trainer.model.micro_batch import Request
from trainer.train.profiling.profile import costs
from trainer.train.profiling.profile_ranges import WORK, lanes_of, named_segments

LAYERS = 3


def record(recipe: Recipe, steps: int) -> list[str]:
    """Train; return the classes' methods that are not what they were before."""
    from tests.benchmarks.our_role import make_role
    from trainer.telemetry.run_folder import RunFolder
    from trainer.train.profiling import profile_ranges
    from trainer.train.profiling.profile import StepProfile

    def methods() -> dict[str, Any]:
        clients = [(client, "run") for client in (profile_ranges.RemotePool, profile_ranges.LocalPool)]
        return {
            f"{owner.__name__}.{name}": getattr(owner, name) for owner, name, *_ in (*profile_ranges.WORK, *clients)
        }

    before = methods()
    job = join(recipe)
    role = make_role(recipe, job)
    folder = RunFolder(recipe)
    if job.rank == 0:
        folder.make()
    job.barrier()
    profile = StepProfile(recipe, job, folder, compiled=False)
    for step in range(steps):
        with profile.step(step + 1):
            optimizer_step(job, role, step)
        torch.ones(2**21).erfinv()  # as an evaluation does between two steps
    profile.finish()
    job.close()
    return [name for name, method in methods().items() if method is not before[name]]


LAYOUTS: dict[str, dict[str, Any]] = {"dedicated": {"trunk_ranks": 1, "pool_ranks": 1, "lanes": 2}, "colocated": {}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trace_of_each_rank_and_a_table_of_each_role(tmp_path: Path, layout: str) -> None:
    recipe = tiny(run={"dir": str(tmp_path / "run")}, parallel=LAYOUTS[layout], profile={"steps": (2, 3)})
    ranks = run_ranks(recipe.grid.world_size, record, recipe, 3)
    assert ranks == [[]] * recipe.grid.world_size
    dedicated = layout == "dedicated"
    tables = ["steps_2-3_pool.txt", "steps_2-3_trunk.txt"] if dedicated else ["steps_2-3_trunk_and_pool.txt"]
    traces = [f"steps_2-3_rank_{rank}.json.gz" for rank in range(len(ranks))]
    assert sorted(file.name for file in (tmp_path / "run" / "profile").iterdir()) == sorted([*tables, *traces])

    found = [ranges(tmp_path / "run" / "profile" / trace) for trace in traces]
    trunk, pool = found[0], found[-1]
    assert trunk["step 2"] == trunk["step 3"] == 1 and trunk["step 1"] == 0
    lanes = recipe.micro_batches if not dedicated else 2
    each = 2 * recipe.micro_batches // lanes  # of a lane, in two steps
    for lane in range(lanes):
        for layer in range(LAYERS):
            assert trunk[f"forward layer {layer} lane {lane}"] == each
            assert trunk[f"backward layer {layer} lane {lane}"] == each
        assert trunk[f"head lane {lane}"] == each
    assert trunk["router"] == 2 * recipe.micro_batches * LAYERS
    assert trunk["optimizer"] == (2 if dedicated else 4) and pool["weight gradients"] > 0
    if dedicated:
        assert trunk["wait for pool"] == 2 * 2 * recipe.micro_batches * LAYERS
        assert pool["wait for requests"] > 0 and pool["optimizer"] == 2
    for kind in ("FORWARD", "BACKWARD"):
        served = [name for name in pool if name.startswith(f"serve {kind} layer ")]
        assert {int(layer) for name in served for layer in re.findall(r"layer (\d)", name)} == set(range(LAYERS))
        assert all(" lane " in name for name in served) == dedicated
    for table in tables:
        text = (tmp_path / "run" / "profile" / table).read_text()
        assert re.search(r"^step +1\.0 .* 100\.0%$", text, re.M) and "aten::mm " in text
        assert "weight gradients" in text or "trunk.txt" in table
        assert "erfinv" not in text


def ranges(trace: Path) -> Counter[str]:
    """How often each range is in a trace."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_a_run_that_stops_early_keeps_what_it_has_recorded(tmp_path: Path) -> None:
    """As when a signal asks for a stop. Steps that are not asked for leave nothing."""
    recipe = tiny(run={"dir": str(tmp_path)}, profile={"steps": (1, 4)})
    run_ranks(1, record, recipe, 1)
    assert (tmp_path / "profile" / "steps_1-1_rank_0.json.gz").exists()
    elsewhere = tmp_path / "other"
    run_ranks(1, record, tiny(run={"dir": str(elsewhere)}, profile={"steps": (3, 4)}), 1)
    assert not (elsewhere / "profile").exists()


def record_on_a_full_disk(recipe: Recipe) -> list[str]:
    """Kineto then writes nothing and raises nothing. Return what is said."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.profiler.profile.export_chrome_trace", lambda profiler, path: None)
        patch.setattr("trainer.train.profiling.profile.say", said.append)
        record(recipe, 1)
    return said


def test_a_full_disk_is_named_and_leaves_no_files(tmp_path: Path) -> None:
    ((line,),) = run_ranks(1, record_on_a_full_disk, tiny(run={"dir": str(tmp_path)}, profile={"steps": (1, 1)}))
    assert line.endswith("cannot be written (torch could not write the trace; the disk may be full)")
    assert not any((tmp_path / "profile").iterdir())


@pytest.mark.parametrize("steps", [[3, 2], [1, 5], [0, 1], [1], 3])
def test_steps_that_are_not_of_the_run_are_refused(steps: Any) -> None:
    tree = tiny().model_dump(mode="json")
    with pytest.raises(UserError, match=r"profile\.steps"):
        check_recipe(tree, [("profile.steps", steps)], "recipe")


def test_messages_of_all_transports_have_ranges() -> None:
    named = {(owner, name) for owner, name, _ in WORK}
    ends = [End, *End.__subclasses__()]
    for end in ends:
        ends += [sub for sub in end.__subclasses__() if sub not in ends]
    sending = {(end, name) for end in ends for name in ("request", "answer") if name in vars(end)}
    assert len(sending) == 6 and sending <= named


def test_lanes_of_micro_batches() -> None:
    """Lane 1 begins a second micro-batch before lane 0 does."""
    assert lanes_of([0, 1, SERVE, 0, 1, 1, SERVE, 0, 1, 0, 1, 0], 3)[:4] == [0, 1, 1, 0]


def test_segments_are_named_by_what_they_compute() -> None:
    rows, names = torch.ones(1), []

    def micro_batch() -> Any:
        for kind, layer in ((Kind.FORWARD, 0), (Kind.FORWARD, 1), (Kind.BACKWARD, 1), (Kind.BACKWARD, 0)):
            assert (yield Request(kind, 5, layer, rows, rows)) is rows
        return "result"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "trainer.train.profiling.profile_ranges.record_function", lambda name: names.append(name) or _nothing
        )
        running = named_segments(micro_batch(), 2, 7)
        running.send(None)  # type: ignore[arg-type]
        for _ in range(3):
            running.send(rows)
        with pytest.raises(StopIteration) as stop:
            running.send(rows)
    assert stop.value.value == "result"
    forward, backward = ["forward layer 0 lane 7", "forward layer 1 lane 7"], ["backward layer 1", "backward layer 0"]
    assert names == [*forward, "head lane 7", *(f"{name} lane 7" for name in backward)]


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_nothing = _Nothing()


def test_costs_of_a_gpu_are_ordered_by_its_own_time() -> None:
    def event(key: str, cpu: float, device: float, annotation: bool = False, on: str = "CPU") -> Any:
        return SimpleNamespace(
            key=key,
            count=2,
            cpu_time_total=cpu,
            self_cpu_time_total=cpu,
            device_time_total=device,
            self_device_time_total=device,
            is_user_annotation=annotation,
            device_type=getattr(torch.autograd.DeviceType, on),
        )

    events = [
        event("step 3", 8e3, 6e3, True),
        event("step 4", 8e3, 6e3, True),
        event("forward layer 0 lane 1", 4e3, 1e3, True),
        event("backward layer 0 lane 1", 2e3, 5e3, True),
        event("gloo:send", 9e9, 0, True),
        event("aten::mm", 3e3, 0),
        event("gemm", 0, 7e3, on="CUDA"),
    ]
    on_gpu, on_host = costs(events, "title", 2, True), costs(events, "title", 2, False)
    assert on_gpu.index("\nbackward ") < on_gpu.index("\nforward ") and "gemm" in on_gpu
    assert on_host.index("\nforward ") < on_host.index("\nbackward ") and "gemm" not in on_host
    assert re.search(r"^forward +1\.0 +2\.000 +25\.0% +0\.500$", on_gpu, re.M)
    assert on_host.index("gloo:send") > on_host.index("Messages")
