"""Sweeps: their files, what is matched between variants, statistics, tables and pictures of made-up runs."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pool.placement import Placement
from tests.trainer.made_up import write_run
from trainer.cli import cli
from trainer.common.errors import UserError
from trainer.common.figure_style import INK, SERIES
from trainer.data.batches import permutation
from trainer.engine.experts import build_shard
from trainer.model.trunk import Trunk
from trainer.sweep.result import SweepResult, collect, to_json
from trainer.sweep.spec import Experiment, Picture, load_sweep, sweep_names
from trainer.sweep.statistics import paired

SWEEP = """
base: small
baseline: vanilla
seeds: [0, 1]
set: {train.steps: 12, data.dir: kept}
variants:
  vanilla: {model.groups: 8, router.kind: softmax, balance.pool: 0.0, balance.layer: 1e-2}
  raw: {}
  normalized: {balance.scores: normalized}
grid:
  balance.pool: [1e-3, 1e-2]
  train.lr: [1e-3, 2e-3]
"""


def write(folder: Path, text: str = SWEEP) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_axes_multiply_and_cells_find_their_baseline(tmp_path: Path) -> None:
    """vanilla sets balance.pool itself: that axis is not its own, train.lr is."""
    experiment = load_sweep(write(tmp_path), folder=tmp_path / "runs")
    cells = {cell.name: cell for cell in experiment.cells}
    assert list(cells)[:3] == [
        "vanilla,train.lr=0.001",
        "vanilla,train.lr=0.002",
        "raw,balance.pool=0.001,train.lr=0.001",
    ]
    assert len(cells) == 2 + 4 + 4
    assert cells["normalized,balance.pool=0.01,train.lr=0.002"].baseline == "vanilla,train.lr=0.002"
    recipe = cells["normalized,balance.pool=0.01,train.lr=0.002"].recipe
    assert (recipe.balance.scores, recipe.balance.pool, recipe.train.lr) == ("normalized", 1e-2, 2e-3)
    assert (recipe.train.steps, recipe.data.dir) == (12, "kept")
    assert [run.seed for run in experiment.runs] == [0] * 10 + [1] * 10, "all variants once before any twice"
    last = experiment.runs[-1]
    assert last.folder == tmp_path / "runs" / "normalized,balance.pool=0.01,train.lr=0.002" / "seed_1"
    assert last.recipe.run.seed == 1


def test_several_keys_are_one_axis(tmp_path: Path) -> None:
    text = SWEEP.partition("grid:")[0] + "grid: {'pool.experts, router.top_k': [[64, 1], [128, 2]]}"
    cells = load_sweep(write(tmp_path, text)).cells
    assert [(cell.recipe.pool.experts, cell.recipe.router.top_k) for cell in cells] == [(64, 1), (128, 2)] * 3
    assert cells[-1].baseline == "vanilla,pool.experts=128,router.top_k=2"


def test_a_folder_has_all_of_its_sweep(tmp_path: Path) -> None:
    """Bases and overrides are kept with it."""
    base = tmp_path / "base.yaml"
    base.write_text("{model: {layers: 2, hidden: 8, heads: 2, kv_heads: 1, ffn_hidden: 8, vocab: 300, seq_len: 8},"
        "pool: {experts: 4}, train: {steps: 4, global_batch: 4, micro_batch: 4, lr: 1e-2, min_lr: 0.0},"
        "data: {source: x, tokenizer: train}, run: {dir: x}}")  # fmt: skip
    text = f"{{base: {base}, baseline: a, variants: {{a: {{}}, b: {{base: {base}, pool.experts: 8}}}}, dir: elsewhere}}"
    first = load_sweep(write(tmp_path, text), ["train.steps=9"], tmp_path / "kept")
    first.folder.mkdir()
    first.save()
    base.unlink()
    again = load_sweep(str(tmp_path / "kept"))
    assert again.runs == first.runs and again.folder == tmp_path / "kept"
    assert {run.recipe.train.steps for run in again.runs} == {9}


WRONG = {
    "baseline: vanilla": ("baseline: dense", "baseline = 'dense': must be a variant (vanilla, raw, normalized)"),
    "baseline:": ("picture: {highlight: nix}\nbaseline:", "picture.highlight = 'nix': must be a variant"),
    "base:": ("picture: {reference: {nix: 0.1}}\nbase:", "picture.reference = 'nix': must be a variant"),
    "base: small": ("base: smal", "recipe smal: neither a readable file"),
    "base: small\n": ("", "base: missing"),
    "seeds: [0, 1]": ("seeds: [0, 0]", "seeds = [0, 0]: must be different"),
    "seeds: [0": ("seeds: [-1", "seeds.0 = -1: must be greater than or equal to 0"),
    "seeds:": ("seed:", "seed: unknown key; did you mean seeds?"),
    "  raw: {}": ("  ra/w: {}", "variants.ra/w: the name becomes a folder"),
    "  raw: {": ("  raw: {run.seed: 3", "variants.raw.run.seed: the sweep sets it itself"),
    "{train.steps: 12": (
        "{train: {steps: 12}",
        "set.train: must be a recipe key with its section, such as train.steps",
    ),
    "[1e-3, 1e-2]": ("[1e-2, 1e-2]", "grid.balance.pool = [0.01, 0.01]: a value appears twice"),
    "  train.lr: [1e-3, 2e-3]": ("  train.lr, train.min_lr: [[1e-3]]", "each value must be a list of 2, one per key"),
    "[1e-3, 2e-3]": ("[1e-3, fast]", "variant vanilla,train.lr=fast: train.lr = 'fast': must be a valid number"),
    "groups: 8": ("groups: 3", "variant vanilla,train.lr=0.001: model.groups = 3: must divide model.layers (8)"),
    "train.steps: 12": ("train.steps.more: 1", "train.steps.more cannot be set: steps is a value, not a section"),
    "data.dir: kept": ("metrics.targets_dir: t", "set.metrics.targets_dir: not allowed in a sweep"),
    "set:": ("set: [", "not YAML: line 6"),
}


@pytest.mark.parametrize("place", WRONG)
def test_what_is_wrong_is_one_line(place: str, tmp_path: Path) -> None:
    new, said = WRONG[place]
    with pytest.raises(UserError) as error:
        load_sweep(write(tmp_path, SWEEP.replace(place, new, 1)))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_wrong_commands(tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        return str(CliRunner().invoke(cli, ["sweep", *arguments]).exception)

    assert "did you mean: small-scores" in said("small-score")
    assert "give the name of a sweep" in said()
    assert "train first" in said("small-scores", "--report", "--dir", str(tmp_path / "none"))
    assert "metrics.port=0" in said("small-scores", "--jobs", "2", "--set", "metrics.port=9400")
    assert "must be a recipe key" in said("small-scores", "--set", "seed=1")
    assert "--set train.steps: grid sets this key" in said("small-scores", "--set", "train.steps=9")
    assert "--set router.kind: variants.vanilla sets this key" in said("small-scores", "--set", "router.kind=norm")
    assert "train.lr = 'x': must be a valid number" in said("small-scores", "--set", "train.lr=x")
    listed = CliRunner().invoke(cli, ["sweep", "--list"]).output.splitlines()
    assert [line.split()[0] for line in listed] == sweep_names()
    assert all(len(line.split()) > 5 for line in listed)


def test_recipes_for_a_cluster(tmp_path: Path) -> None:
    invoked = CliRunner().invoke(cli, ["sweep", write(tmp_path), "--write-recipes", "--dir", str(tmp_path / "runs")])
    files = [Path(line) for line in invoked.output.splitlines()]
    assert len(files) == 20 and all(file.is_file() for file in files)
    assert not any(file.with_suffix("").exists() for file in files), "nothing has run"


def test_variants_of_a_seed_are_matched() -> None:
    """The trunk, routers of one width, and experts by their number in the pool; another seed shares nothing."""
    tiny = (
        "{model.hidden: 16, model.ffn_hidden: 8, model.vocab: 300, model.seq_len: 8, model.layers: 4, pool.experts: 16}"
    )
    text = SWEEP.replace("groups: 8", "groups: 4").partition("grid:")[0]
    text = text.replace("{train.steps: 12, data.dir: kept}", tiny)
    text += "  half: {pool.experts: 8}\n  dense: {model.ffn: dense, pool.experts: 0, balance.pool: 0.0}\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.sweep.spec._read", lambda _: (text, "tiny"))
        runs = load_sweep("tiny").runs
    of = {(run.variant, run.seed): run.recipe for run in runs}
    device = torch.device("cpu")
    trunks = {name: dict(Trunk(recipe, device).named_parameters()) for name, recipe in of.items()}
    first = trunks["raw", 0]
    for name, trunk in trunks.items():
        same = {key for key in trunk.keys() & first.keys() if trunk[key].shape == first[key].shape}
        drawn = {key for key in same if first[key].ndim > 1}
        equal = {key for key in drawn if torch.equal(trunk[key], first[key])}
        assert len(drawn) > 4 * 2 and (equal == drawn if name[1] == 0 else not equal), name
    experts = {}
    for name, recipe in of.items():
        if recipe.model.ffn == "pool":
            placement = Placement(tuple(range(recipe.pool.experts)), 1)
            experts[name] = build_shard(recipe, placement, 0, device).w13_e2FD
    assert torch.equal(experts["vanilla", 0], experts["raw", 0])
    assert torch.equal(experts["half", 0], experts["raw", 0][:8])
    assert not torch.equal(experts["raw", 1], experts["raw", 0])
    assert (permutation(50, 1, 0) == permutation(50, 1, 0)).all() and (
        permutation(50, 1, 0) != permutation(50, 2, 0)
    ).any()


def test_other_data_than_the_baselines_is_said(tmp_path: Path) -> None:
    text = SWEEP.replace("raw: {}", "raw: {train.global_batch: 32, data.split: [8, 1, 1]}").partition("grid:")[0]
    (warning,) = load_sweep(write(tmp_path, text)).warnings()
    assert warning.startswith("raw: data.split, train.global_batch differs from vanilla; the two see")


LOSSES = {"vanilla": (2.0, 2.2, 2.5), "raw": (1.9, 2.0, 2.4), "normalized": (1.8, 2.1), "dense": (2.6, 2.7, 2.6)}


@pytest.fixture
def made_up(tmp_path: Path) -> Experiment:
    """Three seeds; one run of `normalized` is not done."""
    text = SWEEP.partition("grid:")[0].replace("[0, 1]", "[0, 1, 2]")
    text += "  dense: {model.ffn: dense, pool.experts: 0, balance.pool: 0.0}\n"
    experiment = load_sweep(write(tmp_path, text), folder=tmp_path / "mine")
    for run in experiment.runs:
        keys = {"model.ffn": "dense", "pool.experts": 0, "balance.pool": 0.0} if run.variant == "dense" else {}
        overrides = [f"{key}={value}" for key, value in {"train.steps": 12, **keys}.items()]
        losses = LOSSES[run.variant]
        write_run(run.folder, 12 if run.seed < len(losses) else 7, "small", overrides)
        file = run.folder / "metrics.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for record in records:
            if "val_loss" in record and run.seed < len(losses):
                record["val_loss"] = losses[run.seed] + (12 - record["step"]) / 10
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    experiment.save()
    return experiment


def test_rows_of_made_up_runs(made_up: Experiment) -> None:
    rows = {row.name: row for row in collect(made_up).variants}
    assert rows["raw"].losses == dict(enumerate(LOSSES["raw"]))
    assert rows["raw"].difference == paired(dict(enumerate(LOSSES["raw"])), dict(enumerate(LOSSES["vanilla"])))
    assert rows["vanilla"].difference is None
    assert rows["normalized"].val_loss.n == 2 and rows["normalized"].difference.n == 2
    lines = [json.loads(line) for line in (made_up.runs[0].folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    run = rows["vanilla"].runs[0]
    assert run.train_loss == pytest.approx(sum(line["loss"] for line in steps) / 12)
    assert run.tokens_per_second == pytest.approx(12 * 2048 / sum(line["seconds"] for line in steps))
    assert run.val_steps == tuple(range(2, 13, 2))
    probes = [line["random_routing"] for line in lines if "random_routing" in line]
    assert run.random_routing == probes[-1] and run.specialisation == pytest.approx(
        sum(line["specialisation"] for line in steps) / 12
    )
    assert math.isnan(rows["dense"].dead_experts) and rows["raw"].dead_experts >= 0


def test_report_of_made_up_runs(made_up: Experiment) -> None:
    """Table, JSON, CSV, pictures."""
    invoked = CliRunner().invoke(cli, ["sweep", str(made_up.folder), "--report"])
    assert invoked.exit_code == 0, invoked.output
    lines = {line.split()[0]: " ".join(line.split()) for line in invoked.output.splitlines() if line.strip()}
    assert "2.1000 0.2646" in lines["raw"] and "-0.1333" in lines["raw"] and "0.0572" in lines["raw"]
    assert (
        "2/3" in lines["normalized"] and "raw 2M 590.9K 3/3" in lines["raw"] and "dense 590.9K 590.9K" in lines["dense"]
    )
    assert "not corrected for 3 comparisons" in " ".join(invoked.output.split())
    tree = json.loads((made_up.folder / "result.json").read_text())
    assert tree == json.loads(json.dumps(to_json(collect(made_up))))
    raw = tree["variants"][1]
    assert raw["name"] == "raw" and raw["difference"]["p"] == pytest.approx(0.0571910) and raw["experts"] == 64
    assert tree["variants"][3]["dead_experts"] is None
    with (made_up.folder / "result.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["val_loss_mean"]) for line in table] == [v["val_loss"]["mean"] for v in tree["variants"]]
    assert table[0]["difference_mean"] == "" and float(table[1]["difference_p"]) == raw["difference"]["p"]
    for name in ("result", "curves"):
        assert (made_up.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(made_up.folder / f"{name}.svg")
    as_json = CliRunner().invoke(cli, ["sweep", str(made_up.folder), "--report", "--json"])
    assert json.loads(as_json.stdout) == tree


def test_a_result_file_is_enough_for_the_report(made_up: Experiment, tmp_path: Path) -> None:
    """A folder with nothing but result.json gives the same table and the same pictures; the file stays as it is."""
    first = CliRunner().invoke(cli, ["sweep", str(made_up.folder), "--report"])
    alone = tmp_path / "alone"
    alone.mkdir()
    text = (made_up.folder / "result.json").read_bytes()
    (alone / "result.json").write_bytes(text)
    again = CliRunner().invoke(cli, ["sweep", str(alone), "--report"])
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout and (alone / "result.json").read_bytes() == text
    for name in ("result.svg", "curves.svg"):
        assert (alone / name).read_bytes() == (made_up.folder / name).read_bytes()
    assert sorted(path.name for path in alone.iterdir()) == [
        *("curves.png", "curves.svg", "result.json", "result.png", "result.svg"),
    ]
    tree = json.loads(text)
    del tree["variants"][0]["tokens"], tree["picture"]
    (alone / "result.json").write_text(json.dumps(tree))
    error = str(CliRunner().invoke(cli, ["sweep", str(alone), "--report"]).exception)
    assert "variants.0.tokens is missing or wrong" in error and "\n" not in error


def with_picture(experiment: Experiment, **picture: Any) -> SweepResult:
    return replace(collect(experiment), picture=Picture(**picture))


def test_the_variants_are_drawn_by_effect_beside_what_is_known(made_up: Experiment) -> None:
    from trainer.sweep.plot import draw_variants

    result = with_picture(made_up, labels={"raw": "raw scores"}, reference={"raw": -0.3}, reference_name="paper")
    figure = draw_variants(result, result.variants)
    assert figure.get_suptitle().endswith(": 2 to 3 seeds, 95% confidence intervals of the mean")
    losses, differences = figure.axes
    names = [label.get_text() for label in losses.get_yticklabels()]
    assert names == ["normalized", "raw scores", "vanilla", "dense"]
    (known,) = [line for line in differences.lines if line.get_label() == "paper"]
    assert list(known.get_xdata()) == [-0.3] and list(known.get_ydata()) == [1]


def test_curves_are_also_drawn_against_the_baseline(made_up: Experiment) -> None:
    """The two that matter stand out, every curve is named once, and the differences end at the result."""
    from trainer.sweep.plot import draw_curves

    result = with_picture(made_up, highlight="raw")
    losses, differences = draw_curves(result, result.variants).axes
    assert [text.get_text() for text in losses.texts] == ["vanilla", "raw"]
    compared = [variant for variant in result.variants if variant.difference]
    assert {text.get_text() for text in differences.texts} == {variant.name for variant in compared}
    lines = [line for line in differences.lines if line.get_linestyle() == "-"]
    ends = sorted(float(np.asarray(line.get_ydata())[-1]) for line in lines)
    assert ends == pytest.approx(sorted(variant.difference.mean for variant in compared if variant.difference))
    thick = [line for line in losses.lines if line.get_linewidth() > 2]
    assert {line.get_color() for line in thick} == {INK, SERIES[1]}
    alone = [variant for variant in result.variants if variant.difference is None]
    assert len(draw_curves(result, alone).axes) == 1


def test_a_numeric_axis_has_points_on_one_scale(tmp_path: Path) -> None:
    """A panel for each point of the other axes; vanilla, which has no value on the axis, is a level line."""
    from trainer.sweep.plot import draw_axis, numeric_axis

    text = SWEEP.replace("train.lr: [1e-3, 2e-3]", "train.steps: [12, 24]").replace("{train.steps: 12, ", "{")
    experiment = load_sweep(write(tmp_path, text), folder=tmp_path / "runs")
    for run in experiment.runs:
        steps = run.recipe.train.steps
        write_run(run.folder, steps, "small", [f"train.steps={steps}", f"run.seed={run.seed}"])
    result = collect(experiment)
    assert numeric_axis(result) == "balance.pool"
    panels = draw_axis(result, result.variants, "balance.pool").axes
    assert [axes.get_title(loc="left") for axes in panels] == ["24.6K tokens", "49.2K tokens"]
    assert len({axes.get_ylim() for axes in panels}) == 1
    for axes in panels:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.01"]
        means = {str(line.get_label()): line for line in axes.lines if not str(line.get_label()).startswith("_")}
        assert set(means) == {"vanilla", "raw", "normalized"}
        assert set(means["vanilla"].get_ydata()) == {0.0} and means["vanilla"].get_linestyle() == "--"
        places = [float(np.asarray(means[name].get_xdata())[0]) for name in ("raw", "normalized")]
        assert places[0] < math.log(1e-3) < places[1], "dodged"
        assert not [line for line in axes.lines if line.get_linestyle() == "-" and line.get_alpha() is None]
