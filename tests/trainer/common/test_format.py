"""Numbers as text."""

from __future__ import annotations

import math

import pytest

from trainer.common import format as fmt

NAN = math.nan


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (12, "12"), (999, "999"), (147_456, "147.5K"), (777_898_764, "777.9M"), (5.7418e9, "5.742B")),
        *((3.146e13, "31.46T"), (3.146e16, "3.146e+04T"), (999_990, "1M"), (999_940, "999.9K"), (-1500, "-1.5K")),
    ],
)
def test_count(value: float, text: str) -> None:
    assert fmt.count(value) == text


def test_count_with_fewer_digits() -> None:
    assert [fmt.count(n, digits=3) for n in (786_432, 1_572_864, 999_600)] == ["786K", "1.57M", "1M"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        *((1.234e10, "B/s", "12.3 GB/s"), (989e12, "FLOP/s", "989 TFLOP/s"), (3.5e-4, "s", "350 us")),
        *((0.0, "B", "0 B"), (999.96, "B", "1 kB"), (1.0, "s", "1 s"), (2e-12, "s", "0.002 ns"), (42, "B", "42 B")),
    ],
)
def test_quantity(value: float, unit: str, text: str) -> None:
    assert fmt.quantity(value, unit) == text


def test_bytes_and_seconds() -> None:
    assert [fmt.size(n) for n in (114e6, 80 * 2**30)] == ["114 MB", "85.9 GB"]
    assert [fmt.seconds(s) for s in (4e-8, 0.0125, 1.234, 125, 4321)] == [
        "40 ns",
        "12.5 ms",
        "1.23 s",
        "125 s",
        "4,321 s",
    ]


def test_durations_have_two_units_at_most() -> None:
    values = (0.4, 45, 99.4, 100, 3600, 12_000, 172_800, 1e6)
    assert [fmt.duration(s) for s in values] == [
        *("0 s", "45 s", "99 s", "2 min", "60 min", "3 h 20 min", "2 d 0 h", "11 d 13 h"),
    ]


def test_losses() -> None:
    assert (fmt.loss(3.09917), fmt.loss(NAN), fmt.loss(None)) == ("3.0992", "-", "-")
    assert (fmt.loss_change(0.00871), fmt.loss_change(-0.2), fmt.loss_change(NAN)) == ("+0.0087", "-0.2000", "-")
    assert [fmt.perplexity(nats) for nats in (0.0, 3.1, 40.0, 1e4)] == ["1.0", "22.2", "2.35e+17", "inf"]


def test_intervals() -> None:
    assert fmt.interval(-0.031, 0.0494) == "-0.0310 to +0.0494"
    assert fmt.interval(0.127, math.inf, ".2f") == "0.13 to inf"
    assert fmt.interval(NAN, 1.0) == fmt.interval(None, None) == "-"
    assert fmt.plus_minus(0.43214, 0.012) == "0.4321 ± 0.0120"
    assert (fmt.plus_minus(0.43214, None), fmt.plus_minus(None, 0.1)) == ("0.4321", "-")


def test_shares_and_tests() -> None:
    assert (fmt.percent(0.974), fmt.percent(0.9744, 1), fmt.percent(None)) == ("97%", "97.4%", "-")
    assert [fmt.p_value(p) for p in (1e-9, 0.04434, 1.0, NAN, None)] == ["<0.0001", "0.0443", "1.0000", "-", "-"]


def test_plurals() -> None:
    assert [fmt.plural(n, "seed") for n in (0, 1, 2, 1024)] == ["0 seeds", "1 seed", "2 seeds", "1,024 seeds"]


def test_spans() -> None:
    assert fmt.spans(iter([0, 1, 2, 5, 7, 8])) == "0-2,5,7-8"
    assert fmt.spans((0, 1, 2, 7, 9, 10), ", ") == "0-2, 7, 9-10"
