"""Numbers in the documents are those of the recorded results."""

from __future__ import annotations

import csv
import re

import pytest

from tests.docs.markdown import ROOT

RESULTS = (ROOT / "docs/results/README.md").read_text()
PERFORMANCE = (ROOT / "docs/performance.md").read_text()
README = (ROOT / "README.md").read_text()
ROWS = {
    name: (float(median), float(largest))
    for path in (ROOT / "tests/benchmarks/results").glob("*.txt")
    for name, median, largest in re.findall(
        r"^(\w+) +(\d+\.\d+) +\d+\.\d+ +(\d+\.\d+) +\d+$", path.read_text(), re.MULTILINE
    )
}
MEDIANS = {name: median for name, (median, _) in ROWS.items()}


def results_of(sweep: str) -> dict[str, dict[str, str]]:
    """The rows of a sweep's result by name."""
    with (ROOT / "docs/results" / sweep / "result.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def shown(value: str, form: str) -> str:
    """A number as the tables have it; empty where there is none."""
    return format(float(value), form) if value else ""


def row_of(document: str, first: str) -> list[str]:
    """The cells of the table row that begins with a cell."""
    (row,) = re.findall(rf"^\| {re.escape(first)} \| (.+) \|$", document, re.MULTILINE)
    return [cell.strip().strip("*") for cell in row.split("|")]


@pytest.mark.parametrize("name", results_of("small-reproduction"))
def test_small_reproduction(name: str) -> None:
    r = results_of("small-reproduction")[name]
    loss, sd, difference, p, _, imbalance, differ, random = row_of(RESULTS, f"`{name}`")
    interval = f"{shown(r['difference_low'], '+.3f')} to {shown(r['difference_high'], '+.3f')}"
    assert (loss, sd, p) == (
        shown(r["val_loss_mean"], ".4f"),
        shown(r["val_loss_sd"], ".4f"),
        shown(r["difference_p"], ".3f"),
    )
    assert difference == (f"{shown(r['difference_mean'], '+.3f')} ({interval})" if r["difference_mean"] else "")
    assert imbalance == ("" if name == "dense" else shown(r["load_imbalance"], ".1f"))
    assert (differ, random) == (shown(r["specialisation"], ".2f"), shown(r["random_routing"], "+.3f"))


@pytest.mark.parametrize("name", results_of("small-muon"))
def test_small_muon(name: str) -> None:
    r = results_of("small-muon")[name]
    assert row_of(RESULTS, f"`{name}`") == [
        r["val_loss_n"],
        shown(r["val_loss_mean"], ".3f"),
        shown(r["val_loss_sd"], ".3f"),
        shown(r["difference_mean"], "+.3f"),
        shown(r["load_imbalance"], ".1f"),
    ]


@pytest.mark.parametrize(("coefficient", "label"), [("0.001", "1e-3"), ("0.01", "**1e-2**"), ("0.1", "1e-1")])
def test_small_scores(coefficient: str, label: str) -> None:
    results = results_of("small-scores")
    cells = [
        shown(results[f"{scores},balance.pool={coefficient},train.steps={steps}"]["difference_mean"], "+.3f")
        for steps in (300, 1000)
        for scores in ("raw", "normalized")
    ]
    assert row_of(RESULTS, label) == cells


def test_small_constant() -> None:
    results = results_of("small-constant")
    found = [
        shown(results[f"unipool,router.constant_factor={c}"]["difference_mean"], "+.3f") for c in (0.1, 0.3, 1.0, 3.0)
    ]
    assert f"UniPool is at {', '.join(found[:3])} and {found[3]} compared with vanilla" in " ".join(RESULTS.split())


def slower(name: str) -> str:
    """A ratio of speeds as the documents say it."""
    if name not in MEDIANS:
        return "not measured"
    ratio = MEDIANS[name]
    return f"{1 / ratio:.2f}x slower" if ratio < 1 else f"{ratio:.2f}x faster"


@pytest.mark.parametrize(
    ("first", "benchmark"),
    [
        (
            "UniPool in its fastest layout, and the best peer (Hugging Face Qwen3-MoE, DeepSpeed MoE)",
            "best_layout_over_best_peer",
        ),
        ("UniPool, two ranks with both roles, and the best peer", "every_rank_over_best_peer"),
        ("UniPool, 1 trunk + 1 pool rank, and the best peer", "one_plus_one_over_best_peer"),
        ("UniPool, 1 trunk + 1 pool rank, and our dense model", "one_plus_one_over_dense"),
        ("UniPool colocated, and our dense model", "colocated_over_dense"),
        ("our vanilla MoE, and our dense model", "vanilla_over_dense"),
        ("UniPool colocated, and our vanilla MoE", "colocated_over_vanilla"),
        ("two lanes, compared with lock step", "lanes2_over_lockstep"),
        ("four lanes, compared with lock step", "lanes4_over_lockstep"),
    ],
)
def test_speeds(first: str, benchmark: str) -> None:
    assert row_of(PERFORMANCE, first)[:2] == [slower(f"{benchmark}_fp32"), slower(f"{benchmark}_bf16")]


@pytest.mark.parametrize("layout", ["8 x 1", "4 x 2", "2 x 4"])
def test_loads(layout: str) -> None:
    names = [f"{layout.replace(' ', '')}_{way}" for way in ("lockstep", "staggered", "placed", "both")]
    rows = [ROWS[name] for name in names]
    assert row_of(PERFORMANCE, layout)[:4] == [f"{median:.2f} ({worst:.2f})" for median, worst in rows]


def test_the_front_page() -> None:
    peer, peer_bf16 = slower("best_layout_over_best_peer_fp32"), slower("best_layout_over_best_peer_bf16")
    assert f"{peer} than the best peer ({peer_bf16.partition(' ')[0]} in bf16)" in README
    assert f"{slower('lanes4_over_lockstep_fp32')} than lock step with four lanes" in README
    r = results_of("small-reproduction")["unipool"]
    low, high = shown(r["difference_low"], "+.3f"), shown(r["difference_high"], "+.3f")
    assert f"{shown(r['difference_mean'], '+.3f')} nats, {low} to {high}" in README
