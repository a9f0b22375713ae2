"""Exports of locked models: each layer chooses from its own experts, behind the norm over all of its logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.export.test_transformers import difference, left_padded, model_with, some_tokens
from tests.training import Outcome, run_training, tiny, tokens
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe
from trainer.data.batches import SequenceStream
from trainer.data.tokenizer import train_tokenizer
from trainer.evaluate.loss import summed_loss
from trainer.export.initial import ExportedWeights
from trainer.export.loaded_model import load_model
from trainer.export.model_files.configuration_unipool import UniPoolConfig
from trainer.export.model_files.modeling_unipool import CACHE, UniPoolForCausalLM
from trainer.export.write import export

OWNERS = [2, 0, 0, 1, 2, 1]


def locked(factor: float = 0.0, top_k: int = 1, **settings: Any) -> UniPoolForCausalLM:
    """A model of 3 layers and 6 experts of which each layer owns two."""
    owned = {"expert_owners": OWNERS, "foreign_expert_factor": factor, "num_experts_per_tok": top_k}
    return model_with.__wrapped__(**owned, router_constant=1.7, **settings)


def by_hand(logits_M: list[float], layer: int, factor: float, top_k: int) -> list[tuple[float, int]]:
    """Scores and experts of a token, in order: all logits in the norm, the others' experts faded or out of reach."""
    norm = sum(z * z for z in logits_M) ** 0.5
    reached = [(z, i) for i, z in enumerate(logits_M) if OWNERS[i] == layer]
    faded = [(min(z, factor * z), i) for i, z in enumerate(logits_M) if OWNERS[i] != layer and factor]
    best = sorted(reached + faded, reverse=True)[:top_k]
    return [(1.7 * max(0.0, z) / (norm + 1e-8), i) for z, i in best]


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0])
def test_routing_is_that_of_a_loop_over_tokens(factor: float, top_k: int) -> None:
    model, foreign = locked(factor, top_k), 0
    x_TD = torch.randn(40, 16, generator=torch.Generator().manual_seed(4))
    for number, layer in enumerate(model.model.layers):
        logits_TM, scores_TK, ids_TK = layer.router(x_TD)
        torch.testing.assert_close(logits_TM, x_TD @ layer.router.weight.T)
        for row, scores, ids in zip(logits_TM.tolist(), scores_TK.tolist(), ids_TK.tolist(), strict=True):
            expected = by_hand(row, number, factor, top_k)
            assert ids == [i for _, i in expected] and scores == pytest.approx([s for s, _ in expected])
            foreign += sum(OWNERS[i] != number for i in ids)
    assert bool(foreign) == bool(factor)


def test_generation_and_compilation() -> None:
    """With and without cache, with a row of padding, and as one graph: the same numbers."""
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **left_padded()}
    assert torch.equal(locked().generate(**settings), locked().generate(**settings, use_cache=False))
    assert not torch.equal(locked().generate(**settings), locked(1.0).generate(**settings)), "the lock matters"
    torch._dynamo.reset()
    model, tokens, x_TD = locked(), some_tokens(2, 6), torch.randn(40, 16)
    with torch.no_grad():
        router = model.model.layers[1].router
        compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(compiled(x_TD), router(x_TD), strict=True))
        cached = model(tokens[:, :4]).get(CACHE)
        assert difference(model(tokens[:, 4:], **{CACHE: cached}).logits, model(tokens).logits[:, 4:]) < 1e-5


@torch.no_grad()
def test_saved_and_loaded_again(tmp_path: Path) -> None:
    """The owners are in config.json, not among the tensors, and every type of weights routes alike."""
    locked().save_pretrained(tmp_path / "locked")
    config = json.loads((tmp_path / "locked" / "config.json").read_text())
    assert config["expert_owners"] == OWNERS and config["foreign_expert_factor"] == 0.0
    again, report = UniPoolForCausalLM.from_pretrained(tmp_path / "locked", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(again(some_tokens(2, 6)).logits, locked()(some_tokens(2, 6)).logits)
    half = UniPoolForCausalLM.from_pretrained(tmp_path / "locked", dtype=torch.bfloat16)
    for layer, other in zip(half.model.layers, locked().model.layers, strict=True):
        assert torch.equal(layer.router.foreign_M, other.router.foreign_M)
    model_with().save_pretrained(tmp_path / "open")
    names = json.loads((tmp_path / "open" / "config.json").read_text()).keys()
    assert not {"expert_owners", "foreign_expert_factor", "private_intermediate_size"} & names


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"expert_owners": [0, 0, 0, 1, 1, 2]}, "equally many experts"),
        ({"expert_owners": [0, 0, 1, 1, 2]}, "equally many experts"),
        ({"expert_owners": [0, 0, 1, 1, 2, True]}, "equally many experts"),
        ({"expert_owners": "001122"}, "equally many experts"),
        ({"num_experts_per_tok": 3}, "a layer owns fewer experts"),
        ({"router": "softmax"}, "router is 'softmax': it must be norm with expert_owners"),
        ({"num_expert_groups": 3}, "num_expert_groups is 3: it must be 1 with expert_owners"),
        ({"ffn": "dense"}, "ffn is 'dense': it must be pool with expert_owners"),
        ({"foreign_expert_factor": 1.5}, "foreign_expert_factor is 1.5: it must be from 0 to 1"),
    ],
)
def test_owners_that_no_model_has(settings: dict[str, Any], said: str) -> None:
    sizes = {"num_hidden_layers": 3, "num_experts": 6, "expert_owners": OWNERS, "num_experts_per_tok": 1}
    with pytest.raises(ValueError, match=said):
        UniPoolConfig(**sizes | settings)


def recipe(**sections: Any) -> Recipe:
    """6 steps: two of each stage; 4 of 12 experts a layer."""
    lock = {"full_fraction": 0.4, "anneal_fraction": 0.3, "entropy": 0.3}
    pool, train = {"experts": 12}, {"steps": 6, **sections.pop("train", {})}
    parallel = {"pool_ranks": 1, "trunk_zero": 0, "pool_zero": 0}
    return tiny(
        **{"model": {"vocab": 300}, "pool": pool, "parallel": parallel, "train": train, "lock": lock} | sections
    )


@pytest.fixture(scope="module", params=[2, 3, 6], ids=["full", "anneal", "locked"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, Outcome]:
    """A run that has been saved in one of the stages: its folder, its steps, and what the trainer says of it."""
    folder = tmp_path_factory.mktemp("run")
    outcome = run_training(recipe(), request.param, save_to=folder / "checkpoints")
    (folder / "tokenizer.json").write_text(train_tokenizer(["some text"], 300).to_str())
    return folder, request.param, outcome


@torch.no_grad()
def test_losses_of_run_and_export_are_the_trainers(run: tuple[Path, int, Outcome], tmp_path: Path) -> None:
    """In each stage; at the end of the first one experts are not assigned yet."""
    folder, steps, outcome = run
    export(folder, tmp_path / "hf", "hf", "float32")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config.get("expert_owners") == (list(outcome.owners or ()) if steps > 2 else None)
    assert config.get("foreign_expert_factor") == pytest.approx({2: None, 3: 0.5, 6: 0.0}[steps])
    stream = SequenceStream([tokens(recipe())], None)
    rows_BS1 = torch.cat(list(stream.micro_batches(0, 8, 0, 1, 8)))
    for source in (folder, tmp_path / "hf"):
        model = load_model(source).model
        loss = summed_loss(model, rows_BS1, None) / rows_BS1[:, 1:].numel()
        assert loss == pytest.approx(outcome.val_loss, rel=1e-5)
        if steps > 2:  # what the lock changes is much more than that
            for layer in model.model.layers:
                layer.router.foreign_M = None
            assert summed_loss(model, rows_BS1, None) / rows_BS1[:, 1:].numel() != pytest.approx(loss, rel=1e-3)


def test_a_run_starts_from_a_locked_export_in_its_own_stages(run: tuple[Path, int, Outcome], tmp_path: Path) -> None:
    """Without a lock it would be another model, which is refused."""
    folder, steps, outcome = run
    for form in ("hf", "safetensors"):
        out = tmp_path / form
        export(folder, out, form, "float32")
        open_run = recipe(train={"steps": 6, "init_from": str(out)}).model_copy(update={"lock": None})
        if steps == 2:
            ExportedWeights(open_run).check()
        else:
            with pytest.raises(UserError, match="the layers of this model own their experts, but without"):
                ExportedWeights(open_run).check()
    again = run_training(recipe(train={"steps": 6, "init_from": str(out)}), 0)
    assert again.owners is None
    for name, weight in outcome.weights.items():
        assert weight.equal(again.weights[name]), name
