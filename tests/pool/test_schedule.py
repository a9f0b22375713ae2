"""Schedules made without a simulation: which requests they hold, and in which order."""

from __future__ import annotations

import pytest

from pool.schedule import Kind, PoolSchedule, RequestKey, Slot, generation_schedule, lockstep_schedule

SIZES = [(1, 1, 1), (1, 2, 3), (3, 1, 2), (2, 3, 4)]


@pytest.mark.parametrize("trunk_ranks, micro_batches, layers", SIZES)
def test_lockstep_serves_every_request_once(trunk_ranks: int, micro_batches: int, layers: int) -> None:
    served = [key for slot in lockstep_schedule(trunk_ranks, micro_batches, layers).slots for key in slot]
    wanted = {
        RequestKey(t, 0, b, layer, kind)
        for t in range(trunk_ranks)
        for b in range(micro_batches)
        for layer in range(layers)
        for kind in (Kind.FORWARD, Kind.BACKWARD)
    }
    assert len(served) == len(wanted)
    assert set(served) == wanted


@pytest.mark.parametrize("trunk_ranks, micro_batches, layers", SIZES)
def test_lockstep_forward_comes_before_its_backward(trunk_ranks: int, micro_batches: int, layers: int) -> None:
    done: set[RequestKey] = set()
    for slot in lockstep_schedule(trunk_ranks, micro_batches, layers).slots:
        for key in slot:
            if key.kind == Kind.BACKWARD:
                assert key.forward in done
        done.update(slot)


@pytest.mark.parametrize("trunk_ranks, micro_batches, layers", SIZES)
def test_lockstep_slots_hold_the_same_request_of_every_trunk_rank(
    trunk_ranks: int, micro_batches: int, layers: int
) -> None:
    for slot in lockstep_schedule(trunk_ranks, micro_batches, layers).slots:
        assert [key.trunk_rank for key in slot] == list(range(trunk_ranks))
        assert len({(key.lane, key.micro_batch, key.layer, key.kind) for key in slot}) == 1


def test_lockstep_order_by_hand() -> None:
    order = [(slot[0].micro_batch, slot[0].layer, slot[0].kind) for slot in lockstep_schedule(2, 2, 2).slots]
    f, b = Kind.FORWARD, Kind.BACKWARD
    assert order == [(0, 0, f), (0, 1, f), (0, 1, b), (0, 0, b), (1, 0, f), (1, 1, f), (1, 1, b), (1, 0, b)]


def test_lockstep_order_of_a_trunk_rank_does_not_depend_on_the_other_ranks() -> None:
    alone = [(k.micro_batch, k.layer, k.kind) for slot in lockstep_schedule(1, 3, 2).slots for k in slot]
    for trunk_rank in range(3):
        slots = lockstep_schedule(3, 3, 2).slots
        own = [(k.micro_batch, k.layer, k.kind) for slot in slots for k in slot if k.trunk_rank == trunk_rank]
        assert own == alone


def test_lockstep_has_one_lane() -> None:
    assert lockstep_schedule(2, 3, 4).lane_order == ((0,) * 3 * (4 + 1 + 4),) * 2


def test_generation_by_hand() -> None:
    schedule = generation_schedule(2, 2, 2)
    slots = schedule.slots
    wanted = [[(t, b, layer) for t in (0, 1)] for b in (0, 1) for layer in (0, 1)]
    assert schedule.lane_order == ((0, 0, 0), (0, 0, 0))
    assert [[(k.trunk_rank, k.micro_batch, k.layer) for k in slot] for slot in slots] == wanted
    assert {k.kind for slot in slots for k in slot} == {Kind.FORWARD_ONLY}


def test_forward_of_a_backward() -> None:
    assert RequestKey(1, 2, 3, 4, Kind.BACKWARD).forward == RequestKey(1, 2, 3, 4, Kind.FORWARD)


def test_requests_of_some_trunk_ranks() -> None:
    """Their order and the places where weight gradients are sealed remain; a slot without any of them does not."""
    seal: Slot = ()
    (first, second), (third, fourth) = lockstep_schedule(2, 1, 1).slots
    schedule = PoolSchedule(((first, second), seal, (third,), (fourth,), seal), ((0,), (1,)))
    assert schedule.for_trunk_ranks([0]) == PoolSchedule(((first,), seal, (third,), seal), ((0,), (1,)))
    assert schedule.for_trunk_ranks([1]) == PoolSchedule(((second,), seal, (fourth,), seal), ((0,), (1,)))
    assert schedule.for_trunk_ranks(range(2)) == schedule
    assert schedule.for_trunk_ranks([]).slots == (seal, seal)
