"""Models with more experts compute the same, and both halves get tokens; what is pruned is what adds least."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.trainer.importing.checkpoints import (
    VOCAB,
    assert_close,
    checkpoint,
    refusal,
    some_tokens,
    tokenizer,
    unipool,
)
from tests.training import run_training, tiny
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe, load_recipe, save_recipe
from trainer.export.exported_model import filled_model
from trainer.export.loaded_model import load_model
from trainer.export.names import exported_shapes
from trainer.export.saved_run import model_config
from trainer.importing.merge import clustered
from trainer.importing.resize import TOKENS, Usage, measured, resized
from trainer.importing.source import SECTIONS, Source, opened
from trainer.importing.upcycle import How
from trainer.probe.text import read_text

EXPERTS = 12
LOAD = np.array([5, 9, 0, 1, 3, 8, 2, 6, 4, 7, 10, 3])
ADDED = np.array([5.0, 9, 1, 1.5, 3, 8, 2, 6, 4, 7, 10, 3.5])
ROUTERS: dict[str, dict[str, Any]] = {
    "norm": {"kind": "norm"},
    "norm_bias": {"kind": "norm_bias"},
    "softmax": {"kind": "softmax"},
    "softmax with biases": {"kind": "softmax", "logit_bias": True},
    "softmax, renormalised": {"kind": "softmax", "renormalize": True},
    "sigmoid_bias": {"kind": "sigmoid_bias"},
}


@dataclass
class Model:
    """A model of random weights that are so large that all of them matter."""

    recipe: Recipe
    weights: dict[str, Tensor]

    @property
    def source(self) -> Source:
        tree = self.recipe.model_dump(mode="json")
        sections = {name: tree[name] for name in SECTIONS}
        return Source(Path("model"), sections, lambda name: self.weights[name].clone(), lambda _: None, "", Path())

    def logits(self, source: Source) -> Tensor:
        """The logits of what has been made of this model."""
        recipe = Recipe.model_validate(self.recipe.model_dump() | source.sections)
        model = filled_model(model_config(recipe), source.read, torch.float32).eval()
        with torch.no_grad():
            found: Tensor = model(some_tokens()[:, :9]).logits
        return found


def model_of(router: dict[str, Any], groups: int = 1) -> Model:
    recipe = tiny(model={"vocab": VOCAB, "groups": groups}, router=router, pool={"experts": EXPERTS})
    generator = torch.Generator().manual_seed(2)
    shapes = exported_shapes(recipe).items()
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes}
    for name in weights:
        if name.endswith(("norm.weight", "sigma")):
            weights[name] = 1 + 0.3 * weights[name]
        elif name.endswith(".expert_bias") and router["kind"] == "norm_bias":  # the layers of a sub-pool share it
            layer = int(name.split(".")[2]) // (3 // groups) * (3 // groups)
            weights[name] = weights[f"model.layers.{layer}.router.expert_bias"]
    return Model(recipe, weights)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", ROUTERS)
def test_growing_keeps_the_logits(name: str, top_k: int, groups: int) -> None:
    """Whether all experts are split or some, by equal halves or by waiting ones."""
    if name == "softmax, renormalised" and top_k == 1:
        pytest.skip("gate values of 1 teach a router nothing, so that recipes may not have them")
    model = model_of(ROUTERS[name] | {"top_k": top_k}, groups)
    expected = model.logits(model.source)
    for experts in (EXPERTS + 3, 2 * EXPERTS):
        made, summary = resized(model.source, experts, Usage(LOAD), How())
        assert made.sections["pool"]["experts"] == experts
        assert_close(model.logits(made), expected)
        equal = top_k == 1 and (experts == 2 * EXPERTS or name == "sigmoid_bias")
        assert summary.endswith("equal halves" if equal else "waiting halves")


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", ROUTERS)
def test_experts_that_no_token_chooses_leave_no_trace(name: str, groups: int) -> None:
    """Those that add least in each sub-pool go, whatever the load; here rows or biases keep all tokens from them."""
    model = model_of(ROUTERS[name] | {"top_k": 2, "logit_bias": name.startswith("softmax")}, groups)
    gone = [2, 6, 11] if groups == 3 else [2, 3, 6]
    gone_GE = torch.isin(torch.arange(EXPERTS), torch.tensor(gone)).reshape(groups, -1)
    for tensor_name, tensor in model.weights.items():
        _, found, part = tensor_name.partition(".router.")
        if found and part in ("weight", "bias", "expert_bias"):
            without = gone_GE[int(tensor_name.split(".")[2]) * groups // 3]
            if part == "weight" and name.startswith("norm"):
                tensor[without] = 0
            elif part != "weight" and name != "norm_bias":
                tensor[without] = -60
    expected = model.logits(model.source)
    made, summary = resized(model.source, EXPERTS - 3, Usage(10 - LOAD, ADDED), How())
    added, load = ADDED[gone].sum() / ADDED.sum(), (10 - LOAD)[gone].sum() / (10 - LOAD).sum()
    assert summary == f"12 -> 9 experts: the 3 that add least ({added:.1%}, at {load:.1%} of the load) are gone"
    assert_close(model.logits(made), expected)


def test_noise_is_that_of_the_second_halves() -> None:
    """Relative to their weights and rows; with it a NormRouter takes equal halves although not all are split."""
    model = model_of(ROUTERS["norm"] | {"top_k": 1})
    made, summary = resized(model.source, EXPERTS + 1, Usage(LOAD), How(noise=0.1))
    assert summary.endswith("equal halves")
    split = int(LOAD.argmax())
    row_MD = made.read("model.layers.1.router.weight")
    second = made.read(f"model.experts.{EXPERTS}.up_proj.weight")
    for half, first in ((row_MD[EXPERTS], row_MD[split]), (second, made.read(f"model.experts.{split}.up_proj.weight"))):
        assert float((half - first).std() / first.std()) == pytest.approx(0.1, rel=0.3)


def test_a_run_goes_on_with_both_halves(tmp_path: Path) -> None:
    """Noise breaks the tie, so that both halves have tokens."""
    how = {"router": {"kind": "norm", "top_k": 1}, "data": {"source": "gone", "tokenizer": "train"}}
    zero = {"trunk_zero": 0, "pool_zero": 0}
    run_training(tiny(**how, model={"vocab": VOCAB}, parallel=zero), 1, save_to=tmp_path / "checkpoints")
    (tmp_path / "tokenizer.json").write_text(tokenizer())
    done = unipool("resize", tmp_path, tmp_path / "12", "--experts", "12", "--noise", "0.01")
    assert done.exit_code == 0, done.exception
    assert done.output.startswith("8 -> 12 experts: the busiest 4 (")
    recipe = load_recipe(str(tmp_path / "12" / "recipe.yaml"))
    load_LM = run_training(recipe, 2).load_LM
    split = np.sort(np.load(next(tmp_path.glob("checkpoints/*/load.npy"))).sum(0).argsort()[-4:])
    for half in (split, range(8, 12)):
        assert int(load_LM.sum(0)[half].min()) > 0
    assert "train.freeze = pool: the halves" in refusal(
        *("resize", tmp_path, tmp_path / "no", "--experts", "12", "--set", "train.freeze=pool")
    )


def test_sizes_that_cannot_be_are_refused() -> None:
    vanilla = model_of(ROUTERS["softmax"] | {"top_k": 2}, 3).source
    for experts in (0, 3, 12, 13, 27):
        with pytest.raises(UserError, match=rf"--experts {experts}: must be a multiple of the 3 .* from 6 to 24, and"):
            resized(vanilla, experts, Usage(LOAD), How())
    dense = replace(vanilla, sections={"model": {"ffn": "dense"}})
    with pytest.raises(UserError, match="is dense; `unipool upcycle` makes it a model with a pool"):
        resized(dense, 12, Usage(LOAD), How())
    broken = Usage(LOAD, np.where(ADDED > 8, np.nan, ADDED))
    with pytest.raises(UserError, match="the outputs of 2 of its 12 experts are not finite on this text"):
        resized(vanilla, 6, broken, How())


def text_file(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("def main(argument):\n    return argument\n" * 20)
    return file


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    found: Tensor = load_model(folder).model(some_tokens()[:, :9]).logits
    return found


def test_equal_experts_become_one(tmp_path: Path) -> None:
    """Layers whose experts are the same need them once, and the logits stay the same; then the most alike follow."""
    model = checkpoint("mixtral", tmp_path / "theirs")
    first, second = (layer.mlp.experts for layer in model.model.layers[:2])
    with torch.no_grad():
        for name, weight in first.named_parameters():
            second.get_parameter(name).copy_(weight)
    model.save_pretrained(tmp_path / "theirs")
    text = text_file(tmp_path)
    assert unipool("upcycle", tmp_path / "theirs", tmp_path / "12").exit_code == 0
    for experts in (8, 3):
        arguments = ("resize", tmp_path / "12", tmp_path / str(experts), "--experts", str(experts), "--merge")
        done = unipool(*arguments, "--text", text)
        assert done.exit_code == 0, done.exception
    assert_close(logits(tmp_path / "8"), logits(tmp_path / "12"))
    assert load_model(tmp_path / "3").model.config.num_experts == 3 and logits(tmp_path / "3").isfinite().all()


def test_exports_and_checkpoints_need_a_text(tmp_path: Path) -> None:
    """To count the load on: also those of Hugging Face, whose layers have their own experts."""
    checkpoint("mixtral", tmp_path / "theirs")
    text = text_file(tmp_path)
    assert unipool("upcycle", tmp_path / "theirs", tmp_path / "12").exit_code == 0
    resize = ("resize", tmp_path / "12", tmp_path / "more", "--experts")
    assert "has no record of its experts' load; count it on a text with --text" in refusal(*resize, "13")
    assert "--merge: needs --text" in refusal(*resize, "11", "--merge")
    assert "--merge: --experts 13: must be from 2 to 11" in refusal(*resize, "13", "--merge", "--text", text)
    assert "--noise: no expert is split; leave it out" in refusal(*resize, "11", "--noise", "0")
    assert "share no pool" in refusal(
        *("resize", tmp_path / "theirs", tmp_path / "no", "--experts", "6", "--merge", "--text", text)
    )
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")(some_tokens()[:, :9]).logits
    for name, experts in (("theirs", "15"), ("12", "13")):
        done = unipool("resize", tmp_path / name, tmp_path / experts, "--experts", experts, "--text", text)
        assert done.exit_code == 0, done.exception
        assert_close(logits(tmp_path / experts), expected)


def test_an_export_with_groups_of_unequal_size_is_refused_in_one_line(tmp_path: Path) -> None:
    """As an older version made them."""
    checkpoint("mixtral", tmp_path / "theirs")
    assert unipool("import", tmp_path / "theirs", tmp_path / "ours").exit_code == 0
    config = tmp_path / "ours" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_expert_groups": [1, 2]}))
    for command, *options in (("upcycle",), ("resize", "--experts", "6")):
        said = refusal(command, tmp_path / "ours", tmp_path / "out", *options)
        assert "model.groups = [1, 2]: must be a valid integer" in said
    with pytest.raises(UserError, match=r"num_expert_groups is \[1, 2\]: it must be a whole number of at least 1"):
        load_model(tmp_path / "ours")


@torch.no_grad()
def assert_measured(folder: Path, text: Path) -> None:
    """What each expert adds is what the pool's own module computes for it alone, gate value included."""
    loaded, added_M = load_model(folder), torch.zeros(12)

    def see(router: nn.Module, inputs: Any, output: Any) -> None:
        x_TD, (*_, scores_TK, ids_TK) = inputs[0].flatten(0, -2), output
        for k in range(ids_TK.shape[1]):
            y_TD = loaded.model.model.experts(x_TD, ids_TK[:, k : k + 1], scores_TK[:, k : k + 1])
            added_M.index_add_(0, ids_TK[:, k], y_TD.square().sum(1))

    for layer in loaded.model.model.layers:
        layer.router.register_forward_hook(see)
    loaded.model(read_text(loaded, text, TOKENS).rows_NS1[:, :-1])
    with opened(folder) as source:
        np.testing.assert_allclose(measured(source, text).added_M, added_M.numpy(), rtol=1e-4)


def test_an_expert_that_adds_nothing_goes_first(tmp_path: Path) -> None:
    """Whether it gets tokens or not."""
    model = checkpoint("mixtral", tmp_path / "theirs")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] = 0
    model.save_pretrained(tmp_path / "theirs")
    assert unipool("upcycle", tmp_path / "theirs", tmp_path / "12").exit_code == 0
    # The layout must fit the new number of experts only.
    save_recipe(load_recipe("quickstart", ["parallel.pool_ranks=11", "pool.experts=66"]), tmp_path / "eleven.yaml")
    resize = ("resize", tmp_path / "12", tmp_path / "11", "--experts", "11", "--recipe", tmp_path / "eleven.yaml")
    done = unipool(*resize, "--text", text_file(tmp_path))
    assert done.exit_code == 0, done.exception
    found = re.match(r"12 -> 11 experts: the 1 that add least \(0\.0%, at (.+)% of the load\) are gone", done.output)
    assert found and float(found[1]) > 1
    assert_measured(tmp_path / "12", text_file(tmp_path))
    kept, before = (load_model(tmp_path / name).model.model.experts.down_proj for name in ("11", "12"))
    torch.testing.assert_close(kept, torch.cat([before[:6], before[7:]]), rtol=0, atol=0)


def test_clusters_by_mean_cosine() -> None:
    """Two pairs and one alone; the middle one of three stays."""
    cosine = np.full((5, 5), 0.1)
    cosine[0, 3] = cosine[3, 0] = 0.9
    cosine[1, 2] = cosine[2, 1] = cosine[2, 4] = cosine[4, 2] = 0.8
    cosine[1, 4] = cosine[4, 1] = 0.5
    assert clustered(cosine, 2) == [([0, 3], 0), ([1, 2, 4], 1)]
