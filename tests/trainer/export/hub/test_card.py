"""The model card says what the run's files say, in a form that huggingface_hub reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.trainer.export.test_export import trained
from trainer.common.errors import UserError
from trainer.config.recipe import load_recipe
from trainer.export.hub.card import write_card
from trainer.export.saved_run import SavedRun, find_run

STEP = "step_00000001"


def copied(model: str, tmp_path: Path, **files: str) -> Path:
    run = tmp_path / "run"
    shutil.copytree(trained(model)[0], run)
    for name, text in files.items():
        (run / name.replace("_", ".")).write_text(text)
    return run


def card_of(run: SavedRun, out: Path) -> ModelCard:
    out.mkdir()
    write_card(run, out, "bfloat16", code=True)
    return ModelCard.load(out / "README.md")


def score(value: float | None, stderr: float | None = None) -> dict[str, Any]:
    return {"value": value, "stderr": stderr}


def test_the_card_has_the_facts(tmp_path: Path) -> None:
    records = [{"step": 1, "loss": 4.5, "load_imbalance": 2.0}, {"step": 1, "val_loss": 4.25}]
    later = [{"step": 2, "loss": 9.0}, {"step": 2, "val_loss": 9.0}]
    tasks = [{"task": "a|b", "metrics": {"acc": score(0.5, 0.125), "perplexity": score(None)}}]
    run = copied(
        "unipool",
        tmp_path,
        metrics_jsonl="".join(json.dumps(record) + "\n" for record in records + later) + '{"step": 3, "lo',
        plan_json=json.dumps({"software": {"unipool": "0.0.9", "commit": "abc"}}),
        eval_json=json.dumps({STEP: {"tasks": {"tasks": tasks, "harness": "0.4"}}, "step_00000002": {"tasks": 5}}),
    )
    recipe = run / "checkpoints" / STEP / "recipe.yaml"
    text = recipe.read_text()
    assert "  source: gone\n" in text
    mixed = "  source:\n  - {source: 'hub:owner/texts:en', weight: 2}\n  - {source: /home/me/private.txt}\n"
    recipe.write_text(text.replace("  source: gone\n", mixed))
    card = card_of(find_run(run), tmp_path / "a")
    content = card.content
    assert "| parameters | 12.1K" in content or "| parameters |" in content
    assert "| data | 2 x owner/texts:en, 1 x private.txt |" in content and "/home" not in content
    assert "| tokens | 192 in 1 of 4 steps of 8 sequences |" in content
    assert "| validation loss | 4.2500 nats per token, perplexity 70.1 |" in content and "9.0" not in content
    assert "| layout | 1 trunk rank, colocated |" in content and "| weights | bfloat16, routers float32 |" in content
    assert "| trained by | unipool 0.0.9, commit abc |" in content and "| exported by | unipool 0." in content
    assert "| a\\|b | acc | 0.5000 ± 0.1250 |" in content and "By lm-evaluation-harness 0.4." in content
    assert "perplexity | -" not in content and "curves.png" in content
    assert card.data.license is None and "No licence is stated" in content
    assert card.data.datasets == ["owner/texts"] and card.data.tags == ["unipool", "mixture-of-experts"]
    assert {(r.dataset_type, r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("a|b", "acc", 0.5),
        ("held-out", "loss", 4.25),
    }
    card_of(find_run(run), tmp_path / "b")
    for file in ("README.md", "curves.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_card_without_records(tmp_path: Path) -> None:
    """A checkpoint alone has a card as well."""
    run = copied("dense", tmp_path)
    card = card_of(find_run(run), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["README.md"]
    assert card.data.eval_results is None and card.data.tags == ["dense"] and "UniPool]" not in card.content
    assert "validation loss" not in card.content and "not evaluated on tasks" in card.content
    assert load_recipe(str(run / "checkpoints" / STEP / "recipe.yaml")).model.ffn == "dense"


def test_a_damaged_record_of_evaluations_is_refused(tmp_path: Path) -> None:
    damaged = json.dumps({STEP: {"tasks": {"tasks": [{"task": "t", "metrics": {"acc": {"value": "high"}}}]}}})
    run = copied("dense", tmp_path, eval_json=damaged)
    with pytest.raises(UserError, match=r"eval.json: is not a record of `eval`"):
        card_of(find_run(run), tmp_path / "out")
