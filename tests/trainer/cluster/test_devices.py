"""Which rank computes on which device, on made-up machines: one GPU, several, masked, shared, instances, none."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pool.topology import Topology
from tests.distributed import join, run_ranks
from tests.trainer.job import write_recipe
from tests.training import tiny
from trainer.cluster.devices import Sight, assign_devices, sight, tell_deepspeed
from trainer.cluster.liveness import Arrival
from trainer.cluster.rank_assignment import payload_device
from trainer.common.errors import UserError
from trainer.common.gpus import Gpu, GpuFacts
from trainer.common.strict_json import dumps
from trainer.config.recipe import Recipe

NAME = "NVIDIA H100 80GB HBM3"
PAIR, FOUR, REPLICAS = Topology(1, 1, 1), Topology(2, 2, 2), Topology(1, 2, 1)


def gpu(number: int, host: str = "a") -> Gpu:
    return Gpu(NAME, f"GPU-{host}-{number}", f"boot of {host} 0:{number:x}:0")


def machine(ranks: int, gpus: int, host: str = "a") -> list[Sight]:
    """Ranks that all see all GPUs."""
    return [Sight(host, rank, tuple(gpu(number, host) for number in range(gpus))) for rank in range(ranks)]


def test_a_gpu_each() -> None:
    devices = assign_devices(FOUR, machine(4, 8), "auto")
    assert devices.ordinals == (0, 1, 2, 3)
    assert (devices.summary, devices.lines) == (f"4 x {NAME}", (f"devices: 4 x {NAME}",))
    assert not devices.shared and devices.types == ["cuda"] * 4
    assert payload_device(FOUR, devices.types, "auto", devices.shared) == "cuda"


def test_several_machines_with_a_launcher_that_numbers_in_an_order_of_its_own() -> None:
    """deepspeed's launcher gives the ranks 1 and 2 of uneven machines the local ranks 1 and 0."""
    sights = machine(1, 4) + [replace(own, local_rank=1 - own.local_rank) for own in machine(2, 2, "b")]
    assert assign_devices(Topology(1, 2, 2), sights, "cuda").ordinals == (0, 1, 0)


def test_the_roles_share_one_gpu_by_way_of_the_host() -> None:
    devices = assign_devices(PAIR, machine(2, 1), "cuda")
    assert devices.ordinals == (0, 0)
    assert devices.shared
    assert devices.summary == f"1 x {NAME}"
    assert devices.lines == (f"devices: 1 x {NAME}; ranks share a GPU, so tokens go through the host",)
    assert payload_device(PAIR, devices.types, "auto", devices.shared) == "cpu"


def test_roles_share_gpus_evenly_whatever_the_order_of_the_ranks() -> None:
    """The two trunk ranks are never put on one GPU, also if the launcher's order is trunk, pool, trunk, pool."""
    for local_ranks in ([0, 1, 2, 3], [0, 2, 1, 3], [2, 3, 0, 1]):
        sights = [replace(own, local_rank=number) for own, number in zip(machine(4, 2), local_ranks, strict=True)]
        ordinals = assign_devices(FOUR, sights, "auto").ordinals
        assert sorted(map(str, ordinals[:2])) == sorted(map(str, ordinals[2:])) == ["0", "1"], local_ranks


def test_shards_may_share_a_gpu_for_they_average_nothing() -> None:
    assert assign_devices(Topology(1, 2, 2), machine(3, 1), "auto").ordinals == (0, 0, 0)


@pytest.mark.parametrize(
    ("grid", "sights", "message"),
    [
        (
            Topology(2, 0, 1),
            machine(2, 1),
            rf"rank 0 \(trunk 0\) and rank 1 \(trunk 1\) on a would share a GPU \({NAME}, GPU-a-0\): .*"
            "lower parallel.trunk_ranks, or set parallel.device=cpu",
        ),
        (
            REPLICAS,
            machine(3, 1),
            r"rank 1 \(pool 0, shard 0\) and rank 2 \(pool 1, shard 0\) on a would .* lower parallel.pool_ranks, or",
        ),
        (Topology(9, 0, 1), machine(9, 8), r"rank 0 .* and rank 8 .* on a would share a GPU"),
    ],
    ids=["trunk ranks", "replicas", "more ranks than GPUs"],
)
def test_nccl_s_ranks_cannot_share(grid: Topology, sights: list[Sight], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        assign_devices(grid, sights, "auto")
    assert "\n" not in str(caught.value)


def test_launchers_that_show_each_rank_one_gpu() -> None:
    """Slurm's --gpus-per-task and pods with one GPU each: whatever the local rank is, the GPU is 0."""
    sights = [Sight("a", rank, (gpu(rank),)) for rank in range(4)]
    devices = assign_devices(FOUR, sights, "auto")
    assert devices.ordinals == (0, 0, 0, 0)
    assert not devices.shared and devices.summary == f"4 x {NAME}"


def test_each_rank_with_both_roles_needs_a_gpu_of_its_own() -> None:
    grid = Topology(2, 2, 2, every_rank=True)
    sights = [Sight("a", rank, (gpu(0), gpu(1))) for rank in range(2)]
    assert assign_devices(grid, sights, "auto").ordinals == (0, 1)
    with pytest.raises(UserError, match=r"\(trunk 0, shard 0\) .*would share a GPU .*lower parallel.trunk_ranks,"):
        assign_devices(grid, [Sight("a", rank, (gpu(0),)) for rank in range(2)], "auto")


def test_masks_that_overlap() -> None:
    """A rank that sees little chooses before one that sees much."""
    sights = [Sight("a", 0, (gpu(0), gpu(1))), Sight("a", 1, (gpu(0),))]
    assert assign_devices(Topology(2, 0, 1), sights, "auto").ordinals == (1, 0)


def test_pods_on_one_machine_that_see_the_same_gpu() -> None:
    """Their host names and process numbers differ, but not the GPU's UUID."""
    sights = [Sight("pod-0", 0, (gpu(0),)), Sight("pod-1", 0, (replace(gpu(0), place="another boot 0:0:0"),))]
    assert assign_devices(PAIR, sights, "auto").shared
    with pytest.raises(UserError, match="would share"):
        assign_devices(Topology(2, 0, 1), sights, "auto")


def test_instances_of_a_gpu_count_as_one() -> None:
    """NCCL compares addresses on the bus, which two MIG instances share."""
    sights = [Sight("a", rank, (replace(gpu(0), uuid=f"MIG-{rank}"),)) for rank in range(2)]
    assert assign_devices(PAIR, sights, "auto").shared
    with pytest.raises(UserError, match="instances of one GPU count as one"):
        assign_devices(Topology(2, 0, 1), sights, "auto")


BLIND = GpuFacts((), "2.13.0", "13.0", 12040, on_machine=8)


@pytest.fixture
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment says nothing of devices."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


@pytest.mark.usefixtures("no_choice")
def test_no_silent_training_on_the_cpu() -> None:
    """A machine whose GPUs cannot be used is named; one without GPUs is not worth a warning."""
    sights = [sight("auto", "a", rank, BLIND) for rank in range(2)]
    devices = assign_devices(PAIR, sights, "auto")
    assert (devices.ordinals, devices.names, devices.summary) == ((None, None), ("CPU", "CPU"), "CPU")
    first, warning = devices.lines
    assert first == "devices: CPU"
    assert warning.startswith(
        "warning: a trains on the CPU although it has 8 GPUs: the NVIDIA driver supports CUDA 12.4"
    )
    sights = [sight("auto", "a", rank, replace(BLIND, built_for=None, on_machine=0)) for rank in range(2)]
    assert assign_devices(PAIR, sights, "auto").lines == ("devices: CPU (torch 2.13.0 is built without CUDA)",)


@pytest.mark.usefixtures("no_choice")
def test_cuda_or_an_error() -> None:
    sights = [sight("cuda", host, 0, facts) for host, facts in (("a", GpuFacts((gpu(0),))), ("b", BLIND))]
    assert assign_devices(PAIR, sights, "auto").summary == f"1 x {NAME}, CPU"
    wanted = r"^parallel.device = cuda, but rank 1 \(pool 0, shard 0\) on b can use no GPU: the NVIDIA driver supports"
    with pytest.raises(UserError, match=wanted):
        assign_devices(PAIR, sights, "cuda")
    with pytest.raises(UserError, match=r"rank 0 \(trunk 0\) on b and 1 other rank can use no GPU"):
        assign_devices(PAIR, [sights[1]] * 2, "cuda")


def test_the_cpu_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    usable = GpuFacts((gpu(0),), on_machine=1)
    assert sight("cpu", "a", 0, usable) == Sight("a", 0, why_cpu="parallel.device = cpu")
    assert sight("auto", "a", 0, usable).gpus == (gpu(0),)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    own = sight("auto", "a", 0, usable)
    assert own == Sight("a", 0, why_cpu="DS_ACCELERATOR=cpu in the environment")
    assert assign_devices(PAIR, [own, own], "auto").lines == ("devices: CPU (DS_ACCELERATOR=cpu in the environment)",)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert sight("auto", "a", 0, usable).gpus == (gpu(0),)


def test_what_a_rank_tells_the_others_arrives() -> None:
    arrival = Arrival("pool", "2 + 2", machine(2, 2)[1], "10.0.0.1")
    assert Arrival.from_json(dumps(asdict(arrival))) == arrival


@pytest.mark.parametrize(
    ("device", "ordinal"), [(torch.device("cuda", 0), "0"), (torch.device("cuda", 1), "1"), (torch.device("cpu"), "3")]
)
def test_deepspeed_gets_an_ordinal_that_there_is(
    device: torch.device, ordinal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine calls `set_device(LOCAL_RANK)`, and requires the same of Open MPI's variable where there is one."""
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK", raising=False)
    tell_deepspeed(device, 3)
    assert (os.environ["DS_ACCELERATOR"], os.environ["LOCAL_RANK"]) == (device.type, ordinal)
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    tell_deepspeed(device, 3)
    assert os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == ordinal


def test_ranks_meet_on_one_gpu() -> None:
    """Both ranks of 1 + 1, as `make train` starts them, on a made-up machine with one GPU."""
    told = run_ranks(2, _meet, tiny(parallel={"pool_ranks": 1}), 1)
    assert (
        told
        == [("cuda:0", "cpu", "0", "cuda", f"devices: 1 x {NAME}; ranks share a GPU, so tokens go through the host")]
        * 2
    )


def test_ranks_that_cannot_share_end_with_one_line() -> None:
    first, second = run_ranks(2, _meet, tiny(parallel={"trunk_ranks": 2}), 1)
    assert first == second
    assert first.startswith("rank 0 (trunk 0) and rank 1 (trunk 1) on ")


def _meet(recipe: Recipe, gpus: int) -> Any:
    from trainer.cluster import devices
    from trainer.cluster.rendezvous import read_launch, rendezvous

    os.environ["DS_ACCELERATOR"] = "cuda"
    devices.look = lambda: GpuFacts(tuple(gpu(number) for number in range(gpus)))  # type: ignore[attr-defined]
    try:
        member = rendezvous(recipe, read_launch())
    except UserError as error:
        return str(error)
    told = (os.environ["LOCAL_RANK"], os.environ["DS_ACCELERATOR"], *member.devices.lines)
    return str(member.device), str(member.payload_device), *told


@pytest.mark.usefixtures("no_choice")
def test_a_job_that_needs_gpus_ends_before_anything_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`parallel.device=cuda` without a GPU, and with too few: one line, exit status 2."""
    from click.testing import CliRunner

    from trainer.cli import cli
    from trainer.cluster import launch

    monkeypatch.setattr(launch, "end_on_signals", lambda: None)
    recipe = str(write_recipe(tmp_path))
    arguments = ["train", recipe, "--set", "parallel.device=cuda", "--set", "parallel.trunk_ranks=2"]
    for facts, line in (
        (BLIND, r"can use no GPU: the NVIDIA driver supports CUDA 12.4"),
        (GpuFacts((gpu(0),)), r"rank 0 \(trunk 0\) and rank 1 \(trunk 1\) on .* would share a GPU"),
    ):
        monkeypatch.setattr("trainer.cluster.devices.look", lambda facts=facts: facts)
        error = CliRunner().invoke(cli, arguments).exception
        assert isinstance(error, UserError) and re.search(line, str(error))
    assert not (tmp_path / "data").exists()


def test_deepspeed_takes_its_device_from_the_local_rank() -> None:
    """What `tell_deepspeed` relies on."""
    (asked,) = run_ranks(1, _devices_of_an_engine, tiny())
    assert set(asked) == {7}


def _devices_of_an_engine(recipe: Recipe) -> list[int]:
    from deepspeed.accelerator import get_accelerator

    from tests.benchmarks.our_role import make_role

    job = join(recipe)
    asked: list[int] = []
    get_accelerator().set_device = asked.append
    os.environ["LOCAL_RANK"] = "7"
    make_role(recipe, job)
    job.close()
    return asked
