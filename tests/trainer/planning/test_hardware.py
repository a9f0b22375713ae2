"""Predicted times compared with arithmetic by hand; profiles; the wire; lanes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.distributed import TIME_LIMIT
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe, load_recipe
from trainer.planning.hardware import (
    DATA_SHEETS,
    Figure,
    Hardware,
    Profile,
    Rates,
    costs_in_seconds,
    device_peak,
    find_hardware,
    load_profile,
    peak_flops,
    with_link,
    with_network,
)
from trainer.planning.lanes import accumulation_time, choose_lanes
from trainer.planning.step_time import step_time

H100 = DATA_SHEETS["h100"]
PROFILE = Profile(H100, (Figure("dense product", "fp32", 67e12, "FLOP/s", 1.0, "GEMM peak"),))


MEMORY = 0.85 * 3.35e12
OLD_RATES = Rates(67e12, trunk=0.5, head=0.5, experts=0.7)
MEASURED = Hardware(
    "measured, as an earlier version would have",
    fp32=OLD_RATES,
    bf16=replace(OLD_RATES, flops=989e12),
    memory=80e9,
    memory_bandwidth=3.35e12,
    launch_latency=50e-6,
    wire_latency=100e-6,
    wire_bandwidth=450e9,
)

A100 = replace(
    MEASURED, fp32=OLD_RATES, bf16=replace(OLD_RATES, flops=312e12), memory_bandwidth=2.04e12, wire_bandwidth=300e9
)


def at_182m(*overrides: str) -> Recipe:
    return load_recipe("unipool-182m", overrides)


@pytest.mark.parametrize(
    ("name", "fp32", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 67e12, 989e12),
        ("NVIDIA H100 PCIe", 51e12, 756e12),
        ("NVIDIA H100 NVL", 60e12, 835e12),
        ("NVIDIA H200", 67e12, 989e12),
        ("NVIDIA H200 NVL", 60e12, 835e12),
        ("NVIDIA A100-SXM4-80GB", 19.5e12, 312e12),
        ("NVIDIA A100-PCIE-40GB", 19.5e12, 312e12),
        ("NVIDIA B200", None, 2250e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA GH200 480GB", None, None),
        ("NVIDIA A1000 Laptop GPU", None, None),
        ("CPU", None, None),
    ],
)
def test_the_peak_of_a_device_by_its_name(name: str, fp32: float | None, bf16: float | None) -> None:
    assert (device_peak(name, "fp32"), device_peak(name, "bf16")) == (fp32, bf16)


def test_the_peak_of_a_job() -> None:
    """Of what the recipe says, else of all its devices, if each of them is known."""
    two = ["NVIDIA H100 NVL", "NVIDIA A100-SXM4-80GB"]
    assert peak_flops(at_182m(), two) == 835e12 + 312e12
    assert peak_flops(at_182m(), [*two, "CPU"]) is None
    assert peak_flops(at_182m(), []) is None
    assert peak_flops(at_182m("parallel.hardware=h100"), ["CPU"] * 8) == 8 * 989e12


def test_costs_at_182m_by_hand() -> None:
    """A layer of 4.72 + 0.147 MFLOP, head 78.6, expert 14.16 over 4 shards; half and 0.7 of 989 TFLOP/s."""
    costs = costs_in_seconds(at_182m(), with_link(MEASURED, 400), lanes=2)
    assert costs.trunk_layer == pytest.approx(16384 * 4.866e6 / 494.5e12, rel=1e-3)
    assert costs.head == pytest.approx(16384 * 78.64e6 / 494.5e12, rel=1e-3)
    assert costs.pool_layer == pytest.approx(16384 * 14.156e6 / 4 / 692.3e12, rel=1e-3)
    assert costs.slot == pytest.approx(50e-6 + 24 * 3 * 768 * 3072 * 2 / 3.35e12)
    # a request has 16384 x 768 bf16 numbers; 400 Gbit/s are 50 GB/s, and 4 pool ranks serve 4 trunk ranks
    assert costs.transfer == pytest.approx(100e-6 + 16384 * 768 * 2 / 50e9)
    assert costs.trunk_launch == costs.head_launch == costs.slot_launch == costs.weights == costs.flush == 0


def test_costs_of_a_data_sheet_by_hand() -> None:
    """At 0.6 of 989 TFLOP/s, with bytes at 0.85 of 3.35 TB/s; a kernel takes 5 us to launch and 2 us to run."""
    costs = costs_in_seconds(at_182m(), H100, lanes=2)
    layer, head, experts = (92800 / 3, 644096 / 3, 233472 / 3)  # bytes of a token or a row beside the products
    assert costs.trunk_layer == pytest.approx(16384 * (4.866e6 / 593.4e12 + layer / MEMORY) + 70 / 3 * 2e-6, rel=1e-3)
    assert costs.head == pytest.approx(16384 * (78.64e6 / 593.4e12 + head / MEMORY) + 44 / 3 * 2e-6, rel=1e-3)
    assert costs.pool_layer == pytest.approx(4096 * (14.156e6 / 593.4e12 + experts / MEMORY), rel=1e-3)
    weights = 24 * 3 * 768 * 3072
    assert (costs.slot, costs.weights, costs.flush) == pytest.approx(
        (30 * 2e-6, 2 * weights / MEMORY, 16 * weights / MEMORY)
    )
    payload = 16384 * 1536 / 450e9
    assert (costs.transfer, costs.payload) == pytest.approx((100e-6 + 3 * 15e-6 + payload, payload)), (
        "4 shards' headers"
    )
    launches = (costs.trunk_launch, costs.head_launch, costs.slot_launch)
    assert launches == pytest.approx((70 / 3 * 5e-6, 44 / 3 * 5e-6, 30 * 5e-6))
    eager = costs_in_seconds(at_182m("train.compile=false"), H100, lanes=2)
    assert eager.trunk_layer > 2 * costs.trunk_layer and eager.trunk_launch > 2 * costs.trunk_launch


def test_transfer_goes_at_the_slower_side() -> None:
    sent, one_node = 16384 * 768 * 2, replace(H100, node=0)
    for trunk_ranks, pool_ranks, shards, slower in ((8, 4, 4, 2), (4, 8, 4, 1), (8, 4, 2, 2), (2, 4, 4, 1)):
        layout = (f"parallel.trunk_ranks={trunk_ranks}", f"parallel.pool_ranks={pool_ranks}")
        costs = costs_in_seconds(at_182m(*layout, f"parallel.expert_parallel={shards}"), one_node, lanes=2)
        expected = 100e-6 + (shards - 1) * 15e-6 + slower * sent / 450e9
        assert costs.transfer == pytest.approx(expected), (trunk_ranks, pool_ranks, shards)


def test_one_400_gbit_link_at_182m() -> None:
    """Each of 4 + 4 ranks sends 12 layers x 2 x 8 micro-batches of 25.2 MB a step: 4.83 GB, 97 ms at 50 GB/s.

    At half of the peak the trunk computes for 109 ms, so one such link is just enough and 200 Gbit/s are not.
    At the whole peak it would not be. With what a data sheet says 200 Gbit/s are enough, because the pool takes longer.
    """
    traffic = 2 * 12 * 8 * 16384 * 768 * 2
    trunk_seconds = 3 * 8 * 16384 * 137.04e6 / 494.5e12
    assert traffic / 50e9 == pytest.approx(0.0966, rel=1e-3)
    assert trunk_seconds == pytest.approx(0.109, rel=1e-2)
    fine, half = (step_time(at_182m("parallel.lanes=8"), with_link(MEASURED, gbit)) for gbit in (400, 200))
    assert fine.wire is not None and half.wire is not None
    assert not fine.wire.binds
    assert fine.wire.needed <= traffic / trunk_seconds < fine.wire.available
    assert half.wire.binds
    assert half.seconds - half.step_end >= traffic / 25e9
    ideal = replace(MEASURED, bf16=Rates(989e12, trunk=1.0, head=1.0, experts=1.0), launch_latency=0.0)
    assert traffic / (trunk_seconds / 2) > 50e9
    at_peak = step_time(at_182m("parallel.lanes=8"), with_link(ideal, 400)).wire
    assert at_peak is not None and at_peak.needed > fine.wire.needed
    sheet = step_time(at_182m("parallel.lanes=8"), with_link(H100, 200)).wire
    assert sheet is not None and not sheet.binds


def test_wire_of_the_pool_where_it_serves_more() -> None:
    overrides = ("parallel.trunk_ranks=8", "parallel.pool_ranks=2")
    few = step_time(at_182m(*overrides), with_link(H100, 100))
    assert few.wire is not None and few.wire.role == "pool" and few.wire.binds
    # 4 micro-batches of each of 8 trunk ranks, half of each to either shard
    traffic = 2 * 12 * 4 * 8 * 16384 * 768 * 2 / 2
    assert few.seconds >= traffic / 12.5e9
    assert few.wire.slowdown > 1


def test_step_time_adds_up() -> None:
    recipe = at_182m()
    f = step_time(recipe, H100)
    assert f.tokens_per_second * f.seconds == pytest.approx(512 * 1024)
    assert f.mfu == pytest.approx(3 * (137.04e6 + 169.87e6) * f.tokens_per_second / (8 * 989e12), rel=1e-3)
    costs = costs_in_seconds(recipe, H100, f.lanes)
    assert f.trunk_busy * f.seconds == pytest.approx(8 * 3 * (12 * costs.trunk_layer + costs.head))


@pytest.mark.parametrize(
    ("overrides", "hardware", "lanes", "seconds", "trunk_busy", "pool_busy", "slowdown"),
    [
        ((), MEASURED, 4, 0.15855019852111946, 0.6872773925542014, 0.8692476020322901, 1.0336432957487547),
        (
            (),
            with_link(MEASURED, 400),
            8,
            0.18823307596136837,
            0.5788991465607768,
            0.6750617482009289,
            1.0370804685246806,
        ),
        (
            ("parallel.pool_ranks=0", "parallel.lanes=4"),
            A100,
            *(4, 0.7125515383624641, 0.4847571952789759, 0.47846501641627553, None),
        ),
    ],
)
def test_measured_shares_predict_as_in_earlier_versions(
    overrides: tuple[str, ...],
    hardware: Hardware,
    lanes: int,
    seconds: float,
    trunk_busy: float,
    pool_busy: float,
    slowdown: float | None,
) -> None:
    step = step_time(at_182m("pool.stash_bytes=1000000000000", *overrides), hardware)
    assert step.lanes == lanes
    assert (step.seconds, step.trunk_busy, step.pool_busy) == pytest.approx((seconds, trunk_busy, pool_busy), rel=1e-9)
    assert (step.wire.slowdown if step.wire else None) == (slowdown and pytest.approx(slowdown, rel=1e-9))


@pytest.mark.parametrize("name", ["dense-182m", "unipool-182m"])
def test_without_pool_ranks_nothing_overlaps(name: str) -> None:
    f = step_time(load_recipe(name, ["parallel.pool_ranks=0"]), H100)
    assert f.wire is None and f.pool_ranks == 0
    assert (f.trunk_busy + f.pool_busy) * f.seconds == pytest.approx(f.seconds - f.step_end)
    assert (f.pool_busy == 0) == (name == "dense-182m")


def test_chosen_lanes_are_the_fewest_of_the_good() -> None:
    recipe = at_182m()
    hardware = (with_link(H100, 400), H100)
    for device in hardware:
        costs_of = partial(costs_in_seconds, recipe, device)
        taken = [accumulation_time(recipe, lanes, costs_of(lanes))[0] for lanes in range(1, 9)]
        chosen = choose_lanes(recipe, costs_of)
        assert taken[chosen - 1] <= 1.03 * min(taken)
        assert all(seconds > 1.03 * min(taken) for seconds in taken[: chosen - 1])
    slow, fast = (choose_lanes(recipe, partial(costs_in_seconds, recipe, device)) for device in hardware)
    assert slow > fast > 1


def test_one_lane_without_merging_may_be_fastest() -> None:
    """Where one trunk rank's requests need not be merged, one lane has fewer launches and moves fewer bytes."""
    colocated = ("parallel.trunk_ranks=1", "parallel.pool_ranks=0")
    seconds = [step_time(at_182m(*colocated, f"parallel.lanes={lanes}"), H100).seconds for lanes in (1, 2, 3, 4)]
    assert min(seconds) == seconds[0] < seconds[1]
    assert step_time(at_182m(*colocated), H100) == step_time(at_182m(*colocated, "parallel.lanes=1"), H100)


def test_lanes_are_at_most_the_micro_batches() -> None:
    recipe = at_182m("train.global_batch=128")
    assert recipe.micro_batches == 2
    assert choose_lanes(recipe, partial(costs_in_seconds, recipe, H100)) <= 2
    dense = load_recipe("dense-182m")
    assert choose_lanes(dense, partial(costs_in_seconds, dense, H100)) == 1


def test_profile_comes_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    PROFILE.save(path)
    assert load_profile(path) == PROFILE
    assert find_hardware(str(path)) == H100
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def test_a_profile_of_an_earlier_version_loads(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    Profile(MEASURED, ()).save(path)
    tree = json.loads(path.read_text())
    for key in ("launch", "kernel", "message", "hop", "node", "network_bandwidth"):
        del tree["hardware"][key]
    for precision in ("fp32", "bf16"):
        del tree["hardware"][precision]["products_only"]
    path.write_text(json.dumps(tree))
    assert load_profile(path) == Profile(MEASURED, ())


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("hardware", "bf16", "trunk"), 1.5, "hardware.bf16.trunk: must be less than or equal to 1"),
        (("hardware", "memory"), "much", "hardware.memory: must be a valid number"),
        (("hardware", "wire_bandwidth"), float("inf"), "hardware.wire_bandwidth: must be a finite number"),
        (("hardware", "colour"), "red", "hardware.colour: Unexpected"),
    ],
)
def test_bad_profile(tmp_path: Path, keys: tuple[str, ...], value: object, said: str) -> None:
    path = tmp_path / "profile.json"
    PROFILE.save(path)
    tree = json.loads(path.read_text())
    node = tree
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError) as error:
        find_hardware(str(path))
    assert str(error.value).startswith(f"profile {path}: {said}") and "\n" not in str(error.value)


def test_bad_names(tmp_path: Path) -> None:
    for name, said in (("h10", "did you mean h100"), ("tpu", "allowed: h100, h200, a100, or a profile")):
        with pytest.raises(UserError, match=said):
            find_hardware(name)
    with pytest.raises(UserError, match="cannot be read"):
        find_hardware(str(tmp_path))
    with pytest.raises(UserError, match="cannot be written"):
        PROFILE.save(tmp_path / "none" / "profile.json")
    for gbit in (-3.0, 0.0, 1e-300, 1e300, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--interconnect .* from 0.001 to 1,000,000"):
            with_link(H100, gbit)
        with pytest.raises(UserError, match="--network .* from 0.001 to"):
            with_network(H100, gbit)
    with pytest.raises(UserError, match=r"--network 100: the profile has one link .* --interconnect"):
        with_network(MEASURED, 100)


def test_needs_no_torch() -> None:
    code = (
        "import sys; from trainer.cli import cli;"
        "cli.main(['plan', 'unipool-182m', '--hardware', 'h100', '--json'], standalone_mode=False);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=TIME_LIMIT)


@pytest.mark.parametrize("name", ["unipool-182m", "unipool-469m", "unipool-978m"])
def test_predictions_for_gpus_are_sane(name: str) -> None:
    """The chosen lanes hide launches and headers; the share of the peak stays below that of products alone."""
    recipe = load_recipe(name)
    own = step_time(recipe, H100)
    assert 2 <= own.lanes <= 4 and own.memory <= 0.9 * H100.memory
    assert 0.1 < own.mfu < 0.6 and max(own.trunk_busy, own.pool_busy) > 0.8
    in_order = step_time(load_recipe(name, ["parallel.lanes=1"]), H100)
    assert in_order.seconds > 1.1 * own.seconds
    for slower in (replace(H100, launch=2 * H100.launch), replace(H100, wire_latency=2 * H100.wire_latency)):
        lanes = f"parallel.lanes={own.lanes}"
        assert step_time(load_recipe(name, [lanes]), slower).seconds < 1.03 * own.seconds


def test_a_host_that_launches_slowly_is_exposed() -> None:
    """Where a launch takes longer than the kernel, the step takes the host's time, colocated as well."""
    slow = replace(H100, launch=1e-3)
    colocated = at_182m("parallel.pool_ranks=0", "parallel.lanes=1")
    costs = costs_in_seconds(colocated, slow, lanes=1)
    launching = 3 * 8 * (12 * costs.trunk_launch + costs.head_launch) + 2 * 12 * 8 * costs.slot_launch
    assert launching < step_time(colocated, slow).seconds < 1.1 * launching
    assert step_time(at_182m("parallel.lanes=1"), slow).seconds > 3 * 8 * (12 * 70 / 3 + 44 / 3) * 1e-3
