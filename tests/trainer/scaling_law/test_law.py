"""Laws of size, fitted to results with known laws, to noise, to too few results, and to incomparable ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from trainer.cli import cli
from trainer.common.errors import UserError
from trainer.planning.model_costs import count_parameters
from trainer.scaling_law import result as law_result
from trainer.scaling_law.law import Curve, fit, interval, left_out, match_seeds
from trainer.scaling_law.points import Family, read_families
from trainer.scaling_law.report import formula, notes
from trainer.scaling_law.result import Law, find_law, log_sizes
from trainer.sweep.result import MEASURES, RunResult, collect, variant_result, write_files
from trainer.sweep.spec import Cell, load_sweep

REPLICATES = 100
NOISE = 0.003
SIZES = "pool.experts: [16, 24, 32, 48, 64, 96]"


def write_result(folder: Path, sweep: str, loss: Callable[[Cell], float], seeds: int = 3) -> Path:
    """A sweep's result.json as if it had run, each run `noise` about loss(cell), and all of one seed shifted alike."""
    experiment = load_sweep(sweep, [], folder)
    random = np.random.default_rng(5)
    shifts = 0.05 * random.standard_normal(len(experiment.sweep.seeds))
    runs = {
        cell.name: [
            run_result(run.seed, loss(cell) + float(shift + NOISE * random.standard_normal()))
            for run, shift in list(zip(cell.runs, shifts, strict=True))[:seeds]
        ]
        for cell in experiment.cells
    }
    variants = [variant_result(cell, runs[cell.name], runs.get(cell.baseline or "")) for cell in experiment.cells]
    folder.mkdir(parents=True)
    write_files(folder, replace(collect(experiment), variants=tuple(variants)))
    return folder


def run_result(seed: int, loss: float) -> RunResult:
    nothing = dict.fromkeys(MEASURES, math.nan)
    return RunResult(seed=seed, folder="", val_loss=loss, val_steps=(), val_losses=(), **nothing)


def sweep_file(folder: Path, sizes: str = SIZES) -> str:
    path = folder / "mine.yaml"
    path.write_text(
        f"{{base: small, baseline: vanilla, set: {{train.steps: 10}}, variants: {{vanilla: {{model.groups: 8, "
        f"router.kind: softmax, balance.pool: 0.0, balance.layer: 1e-2, pool.experts: 64}}, unipool: {{}}}}, "
        f"grid: {{{sizes}}}}}"
    )
    return str(path)


def pool_law(cell: Cell) -> float:
    """Reaches the baseline's 2.4 at M = 36."""
    return 2.4 if cell.variant == "vanilla" else 2.0 + 4.8 * (12 * cell.recipe.pool.experts) ** -0.4096


def find(folder: Path) -> Law:
    return find_law(max(read_families([folder]), key=lambda family: len(family.points)), REPLICATES)


@pytest.fixture(scope="module")
def powers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("powers")
    return write_result(folder / "result", sweep_file(folder), pool_law)


def test_a_power_law_is_found_again(powers: Path) -> None:
    law = find(powers)
    (term,) = law.terms
    assert (term.factor, term.values, term.form) == ("experts", (16, 24, 32, 48, 64, 96), "power")
    assert term.exponent.low < 0.4096 < term.exponent.high and term.exponent.low > 0
    assert 0.5 * NOISE < law.noise["sd"] < 2 * NOISE, "without what seeds have in common"
    assert law.largest["size"] == 96 and abs(law.largest["predicted"] - law.largest["measured"]) < 0.02
    (crossing,) = law.crossings
    assert crossing.smallest and crossing.name == "vanilla" and crossing.at == {}
    smallest = (4.8 / 0.4) ** (1 / 0.4096) / 12
    assert crossing.smallest.low < smallest < crossing.smallest.high < 1.5 * smallest
    xs = np.geomspace(16, 96, 50)
    true = 2.0 + 4.8 * (12 * law.x_nK[:, 0]) ** -0.4096
    shift = np.mean([point.val_loss.mean for point in law.family.points] - true)
    assert abs(law.curve(log_sizes(law.terms, xs, {})) - 2.0 - 4.8 * (12 * xs) ** -0.4096 - shift).max() < 2 * NOISE
    text = " ".join(notes(law))
    assert "18 runs of 6 points" in text and "beyond 2 times that (192 experts)" in text
    assert f"{10 * 16 * 128:,} tokens" in text


def test_the_formula_is_the_law(powers: Path) -> None:
    law = find(powers)
    text = (
        formula(law).replace("loss = ", "").replace(" experts", " * experts").replace("^", "**").replace("experts", "x")
    )
    for x in (16.0, 50.0, 96.0):
        (value,) = law.curve(np.array([[math.log(x / law.terms[0].centre)]]))
        assert eval(text, {"x": x}) == pytest.approx(value, abs=2e-3)


def test_noise_alone_is_no_law(tmp_path: Path) -> None:
    law = find(write_result(tmp_path / "result", sweep_file(tmp_path), lambda _: 2.4))
    (term,) = law.terms
    assert term.form == "none" and set(law.curve.slopes_K) == {0.0}
    text = " ".join(notes(law))
    assert "no pool size that reaches its loss of" in text


def family_of(losses: dict[int, list[float]]) -> Family:
    """Points that have these losses, by experts."""
    cell = load_sweep("small-law").cells[0]
    points = []
    for experts, values in losses.items():
        runs = [run_result(seed, value) for seed, value in enumerate(values)]
        variant = replace(variant_result(cell, runs, None), name=f"m{experts}", experts=experts)
        points.append(variant)
    return Family("m", tuple(points), (None,) * len(points), ())


def test_noise_is_seldom_a_law() -> None:
    """Of 8 draws; intervals that leave out 5 % let hardly one pass."""
    random = np.random.default_rng(0)
    draws = [{m: random.normal(2, 0.01, 2).tolist() for m in (16, 24, 32, 48, 64)} for _ in range(8)]
    assert sum(find_law(family_of(draw), 40).terms[0].form != "none" for draw in draws) <= 2


def test_a_straight_line_is_no_power_law() -> None:
    random = np.random.default_rng(1)
    losses = {m: (3 - 0.1 * math.log(m) + random.normal(0, 0.003, 3)).tolist() for m in (16, 24, 32, 48, 64, 96)}
    law = find_law(family_of(losses), REPLICATES)
    (term,) = law.terms
    assert term.form == "line" and term.exponent.low <= 0
    assert term.doubling.low < -0.1 * math.log(2) < term.doubling.high < 0


def test_one_seed_is_said_and_is_wider() -> None:
    random = np.random.default_rng(2)
    sizes = (8, 16, 32, 64, 128)
    many = {m: (2 + 2 * m**-0.5 + random.normal(0, 0.004, 6)).tolist() for m in sizes}
    six, one = (find_law(family_of({m: runs[:n] for m, runs in many.items()}), REPLICATES) for n in (6, 1))
    assert "with 1 seed" in " ".join(notes(one)) and "with 1 seed" not in " ".join(notes(six))
    widths = [law.terms[0].doubling.high - law.terms[0].doubling.low for law in (six, one)]
    assert widths[1] > 1.5 * widths[0]
    assert one.noise["freedom"] == 2 and six.noise["freedom"] == 2 + 5 * 4


def test_points_off_the_law_are_its_noise() -> None:
    """Runs agree to 1e-4, points do not lie on any law of the kind."""
    off = {16: 2.5, 24: 2.46, 32: 2.35, 48: 2.34, 64: 2.2, 96: 2.19}
    law = find_law(family_of({m: [loss, loss + 1e-4, loss - (m % 3) * 1e-4] for m, loss in off.items()}), REPLICATES)
    assert law.noise["freedom"] == 3 and law.noise["sd"] > 0.01


def test_fit_against_known_curves() -> None:
    """Two factors, exact losses; and a curve that is left alone by its own leave-one-out."""
    u_nK = np.random.default_rng(0).uniform(-1, 1, (12, 2))
    true = Curve(3.0, np.array([0.1, 0.2]), np.array([0.5, 1.2]))
    exact_n = 3.0 + 0.1 * (np.exp(-0.5 * u_nK[:, 0]) - 1) / 0.5 + 0.2 * (np.exp(-1.2 * u_nK[:, 1]) - 1) / 1.2
    assert true(u_nK) == pytest.approx(exact_n)
    (found,) = fit(u_nK, exact_n[:, None], np.ones(12), ("power", "power"))
    assert found.level == pytest.approx(3.0, abs=1e-5)
    assert found.exponents_K == pytest.approx(true.exponents_K, abs=1e-3)
    assert left_out(u_nK, exact_n, np.ones(12), ("power", "power")) < 1e-4
    assert interval([*np.arange(1, 100), math.inf]) == (3.0, 98.0)


def test_seeds_are_matched() -> None:
    """Means 1, 2, 4 and seeds -0.3, 0, 0.3; the last point lacks a seed, which shall not move it."""
    full = [{seed: mean + shift for seed, shift in enumerate((-0.3, 0.0, 0.3))} for mean in (1, 2, 4)]
    del full[2][0]
    means, squares, freedom = match_seeds(full)
    assert means == pytest.approx([1, 2, 4]) and squares == pytest.approx(0) and freedom == 8 - 5
    means, squares, freedom = match_seeds([{0: 1.0, 1: 2.0}, {2: 5.0}])
    assert means == pytest.approx([1.5, 5.0]) and (squares, freedom) == (0.5, 1)


def test_pool_and_active_parameters_each_have_a_term(tmp_path: Path) -> None:
    """The paper's scales: depth goes with the other two."""

    def loss(cell: Cell) -> float:
        active, pool = count_parameters(cell.recipe).active, count_parameters(cell.recipe).pool
        return 1.05 + 900 * active**-0.37 + 60 * (pool if cell.variant == "unipool" else 0.6 * pool) ** -0.28

    folders = [write_result(tmp_path / s, f"figure-2a-{s}", loss, seeds=2) for s in ("182m", "469m", "650m", "830m")]
    family = max(read_families(folders), key=lambda family: len(family.points))
    law = find_law(family, 80)
    pool, active = law.terms
    assert (pool.factor, active.factor) == ("pool parameters", "active parameters") and "layers" in law.combined
    assert pool.exponent.low < 0.28 < pool.exponent.high and active.exponent.low < 0.37 < active.exponent.high
    assert pool.form == active.form == "power"
    assert len(law.crossings) == 4
    for crossing in law.crossings:
        own = [p for p in family.points if p.parameters["active"] == crossing.at["active parameters"]]
        true = 0.6 * max(3 * p.experts * p.hidden * p.settings["model.ffn_hidden"] for p in own)
        assert crossing.smallest and crossing.smallest.low / 1.1 < true < crossing.smallest.high * 1.1
    assert "balance.pool differs between sizes (0.01, 0.02)" in " ".join(notes(law))


def test_terms_of_several_forms(tmp_path: Path) -> None:

    def loss(cell: Cell) -> float:
        found = count_parameters(cell.recipe)
        return 4 + 50 * found.pool**-0.5 - 0.13 * math.log(found.active) - 0.5 / cell.recipe.model.layers

    (family,) = read_families([write_result(tmp_path / "result", "small-law", loss)])
    law = find_law(family, 40)
    assert [term.form for term in law.terms] == ["power", "line", "power"]
    assert law.curve.exponents_K == pytest.approx([0.5, 0, 1], abs=0.4)
    assert law.curve.slopes_K[1] == pytest.approx(0.13, abs=0.01)


TOO_LITTLE = {
    "pool.experts: [32, 64]": "2 sizes (experts 32, 64); a law needs at least 4 sizes, and 3 values of everything",
    "balance.scores: [raw, normalized]": "all of one size; a law needs at least 4 sizes",
    "pool.experts: [8, 16, 32, 64], balance.pool: [1e-3, 1e-2]": "the same size and differ in balance.pool; choose",
}


@pytest.mark.parametrize("sizes", TOO_LITTLE)
def test_too_little_is_one_line(sizes: str, tmp_path: Path) -> None:
    folder = write_result(tmp_path / "result", sweep_file(tmp_path, sizes), pool_law)
    error = CliRunner().invoke(cli, ["law", str(folder)]).exception
    assert isinstance(error, UserError) and TOO_LITTLE[sizes] in str(error) and "\n" not in str(error)
    assert not list(folder.glob("*law*"))


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    first = write_result(tmp_path / "first", sweep_file(tmp_path), pool_law)
    tree = json.loads((first / "result.json").read_text())
    for place, value in enumerate((40_960, 20_480)):
        tree["variants"][-1 - place]["tokens"] = value
    other = tmp_path / "other.json"

    def said(changed: object, *options: str) -> str:
        other.write_text(changed if isinstance(changed, str) else json.dumps(changed))
        error = CliRunner().invoke(cli, ["law", str(other), *options]).exception
        assert isinstance(error, UserError) and "\n" not in str(error)
        return str(error)

    assert "unipool: tokens differs (20480, 40960); a law of size needs it to be equal" in said(tree)
    assert (
        "not a sweep's result, or one of an older version (its top level is missing or wrong)" in said("{")
        and "(sweep is missing or wrong)" in said({"variants": [{}]})
        and "variants.0" in said(json.dumps(tree).replace('"layers"', '"depth"'))
    )
    del tree["variants"][0]["settings"]["model.vocab"]
    assert "it is of an older version, without the setting model.vocab; make it with: unipool sweep" in said(tree)
    tree["variants"][0]["settings"]["model.vocab"] = 2048
    tree["variants"][0]["runs"][0]["val_loss"] = None
    assert "the validation loss of vanilla seed 0 is not finite" in said(tree)
    assert "--variant uni: has no finished run; choose from: unipool, " in said_of(first, "--variant", "uni")
    assert "cannot be written" in said_of(first, "--out", str(tmp_path / "none" / "law.png"))


def test_groups_of_unequal_size_in_older_results_are_another_method(tmp_path: Path) -> None:
    folder = write_result(tmp_path / "result", sweep_file(tmp_path), pool_law)
    families = len(read_families([folder]))
    tree = json.loads((folder / "result.json").read_text())
    tree["variants"][-1]["settings"]["model.groups"] = [1, 6, 1]
    (folder / "result.json").write_text(json.dumps(tree))
    assert len(read_families([folder])) == families + 1


def said_of(folder: Path, *options: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(law_result, "REPLICATES", 20)
        return str(CliRunner().invoke(cli, ["law", str(folder), *options]).exception)


def test_the_command(powers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table, notes, pictures, JSON; the same each time. Vanilla, of one size, is said to have no law."""
    monkeypatch.setattr(law_result, "REPLICATES", 40)
    first = CliRunner().invoke(cli, ["law", str(powers), str(powers / "result.json")])
    assert first.exit_code == 0, first.output
    assert "16 to 96" in first.output and "power law" in first.output
    assert "not fitted: vanilla: 1 point with finished runs, all of one size" in first.output
    assert (powers / "law.png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(powers / "law.svg")
    out = powers / "again.png"
    tree = json.loads(CliRunner().invoke(cli, ["law", str(powers), "--json", "--out", str(out)]).stdout)
    assert out.exists() and out.with_suffix(".svg").read_bytes() == (powers / "law.svg").read_bytes()
    (found,) = tree["laws"]
    assert found["terms"][0]["form"] == "power" and (found["points"], found["runs"]) == (6, 18)
    assert found["baselines"][0]["smallest"]["value"] == pytest.approx(36, abs=3) and len(tree["not_fitted"]) == 1
    assert all(note.split()[0] in first.output for note in found["notes"])
