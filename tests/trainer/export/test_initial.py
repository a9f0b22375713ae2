"""Fine-tuning: runs that start from an export, with or without a frozen role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training import Outcome, assert_same, run_training, tiny
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe, load_recipe, save_recipe
from trainer.data.tokenizer import train_tokenizer
from trainer.export.initial import ExportedWeights
from trainer.export.write import export

ROUTER = {"kind": "sigmoid_bias", "top_k": 2, "bias_rate": 0.05}
DEDICATED = {"pool_ranks": 2, "trunk_zero": 2, "pool_zero": 1}
COLOCATED = {"trunk_zero": 0, "pool_zero": 0}


def recipe(parallel: dict[str, Any], **train: Any) -> Recipe:
    # Without clipping, a step of one role does not depend on the gradients of the other.
    return tiny(router=ROUTER, parallel=parallel, train={"clip": 0.0, **train}, data={"tokenizer": "gone"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def before(run: Path) -> Outcome:
    return run_training(recipe(DEDICATED), 2, save_to=run / "checkpoints")


@pytest.fixture(scope="module")
def exported(run: Path, before: Outcome) -> str:
    (run / "tokenizer.json").write_text(train_tokenizer(["some text"], 300).to_str())
    export(run, run / "hf", "hf", "float32", "10KB")
    assert (run / "hf" / "model.safetensors.index.json").is_file()
    return str(run / "hf")


def is_expert(name: str) -> bool:
    return name.startswith("expert/")


def test_a_run_starts_from_the_export(before: Outcome, exported: str) -> None:
    """The layout may differ from that of the exported run; the expert bias is loaded too."""
    tuned = run_training(recipe(COLOCATED, init_from=exported), 0)
    assert tuned.val_loss == pytest.approx(before.val_loss, rel=1e-5)
    for name, weight in before.weights.items():
        assert weight.equal(tuned.weights[name]), name


@pytest.mark.parametrize("frozen", ["pool", "trunk"])
def test_frozen_weights_stay_and_the_others_learn(frozen: str, before: Outcome, exported: str, tmp_path: Path) -> None:
    whole = run_training(recipe(COLOCATED, init_from=exported), 1)
    saved = tmp_path / "saved"
    train = {"init_from": exported, "freeze": frozen, "loss_chunk": 5}
    tuned = run_training(recipe(DEDICATED, **train), 1, save_to=saved)
    scalars = {name: value for name, value in whole.scalars[0].items() if name != "grad_norm"}
    assert {name: tuned.scalars[0][name] for name in scalars} == pytest.approx(scalars, rel=1e-5)
    assert tuned.scalars[0]["grad_norm"] < whole.scalars[0]["grad_norm"]
    for name, weight in tuned.weights.items():
        if is_expert(name) == (frozen == "pool"):
            assert weight.equal(before.weights[name]), name
        else:
            assert weight.allclose(whole.weights[name], rtol=1e-5, atol=1e-6), name
    assert any(not weight.equal(before.weights[name]) for name, weight in tuned.weights.items())
    # It resumes bit for bit in its own layout, in another one, and unfrozen with moments of zero.
    undisturbed = run_training(recipe(DEDICATED, **train), 3)
    resumed = run_training(recipe(DEDICATED, **train), 3, resume_from=saved)
    assert resumed.scalars == undisturbed.scalars[1:]
    elsewhere = run_training(recipe(COLOCATED, **train), 3, resume_from=saved)
    assert_same(resumed, elsewhere)
    thawed = run_training(recipe(DEDICATED, init_from=exported), 2, resume_from=saved)
    moved = {n: float((w - tuned.weights[n]).abs().max()) for n, w in thawed.weights.items()}
    rate = thawed.scalars[0]["lr"]
    assert max(moved[n] for n in moved if is_expert(n) == (frozen == "pool")) == pytest.approx(rate, rel=0.3)


def test_exports_of_other_models_are_refused(exported: str, run: Path, tmp_path: Path) -> None:
    ExportedWeights(recipe(COLOCATED, init_from=exported)).check()
    other = tiny(router=ROUTER, pool={"experts": 6}, train={"init_from": exported})
    with pytest.raises(UserError, match=r"pool.experts is 8 in the export, but 6 in the recipe"):
        ExportedWeights(other).check()
    wider = tiny(router=ROUTER, model={"ffn_hidden": 24}, train={"init_from": exported})
    with pytest.raises(UserError, match=r"model.ffn_hidden is 20 in the export, but 24 in the recipe"):
        ExportedWeights(wider).check()
    more = tiny(router=ROUTER | {"top_k": 3}, train={"init_from": exported})
    with pytest.raises(UserError, match=r"router.top_k is 2 in the export, but 3 in the recipe"):
        ExportedWeights(more).check()
    export(run, run / "bare", "safetensors", "float32")
    ExportedWeights(recipe(COLOCATED, init_from=str(run / "bare"))).check()
    base = tiny(router=ROUTER, model={"rope_base": 1e4}, train={"init_from": str(run / "bare")})
    with pytest.raises(UserError, match=r"model.rope_base is 1000000.0 in the export, but 10000.0 in the recipe"):
        ExportedWeights(base).check()
    with pytest.raises(UserError, match="is not an export"):
        ExportedWeights(recipe(COLOCATED, init_from=str(run)))
    save_recipe(recipe(COLOCATED), tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=r"train.freeze = 'pool': needs train.init_from"):
        load_recipe(str(tmp_path / "recipe.yaml"), ["train.freeze=pool"])
