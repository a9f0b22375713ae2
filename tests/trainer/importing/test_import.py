"""Imported models compute what transformers' own classes do, and train on from there; the others are refused."""

from __future__ import annotations

import json
import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.trainer.importing.checkpoints import (
    FAMILIES,
    MOE,
    SHAPE,
    VOCAB,
    assert_close,
    checkpoint,
    refusal,
    some_tokens,
    unipool,
)
from tests.training import run_training, tokens
from trainer.config.recipe import Recipe, load_recipe
from trainer.export.loaded_model import load_model
from trainer.planning.model_costs import count_parameters


def tiny_recipe(path: Path) -> Recipe:
    """The recipe of an import, for a run of a few steps without data."""
    train = ("steps=2", "global_batch=4", "micro_batch=2", "lr=1e-30", "min_lr=0.0", "precision=fp32")
    settings = [f"train.{key}" for key in train] + ["parallel.trunk_zero=0", "parallel.pool_zero=0"]
    return load_recipe(str(path), settings)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """From files in shards; and the number of parameters is that of the class, a tied matrix counted twice."""
    theirs = checkpoint(family, tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    done = unipool("import", tmp_path / "theirs", tmp_path / "ours", "--json")
    assert done.exit_code == 0, done.exception
    ours = load_model(tmp_path / "ours").model
    assert_close(ours(some_tokens()).logits, theirs(some_tokens()).logits)
    parameters = json.loads(done.stdout)["parameters"]
    tied = VOCAB * 24 if theirs.config.tie_word_embeddings else 0
    assert parameters == sum(p.numel() for p in theirs.parameters()) + tied
    assert parameters == count_parameters(load_recipe(str(tmp_path / "ours" / "recipe.yaml"))).total


def test_the_recipe_trains_on_from_it(tmp_path: Path) -> None:
    """Its loss is that of the class in transformers, with the pool on a rank of its own."""
    theirs = checkpoint("qwen2_moe", tmp_path / "theirs")
    assert unipool("import", tmp_path / "theirs", tmp_path / "ours", "--seq-len", "9").exit_code == 0
    recipe = tiny_recipe(tmp_path / "ours" / "recipe.yaml")
    assert recipe.train.init_from == recipe.data.tokenizer == str(tmp_path / "ours")
    assert recipe.run.dir == "runs/ours-tuned"
    sequences = torch.from_numpy(tokens(recipe)[: recipe.train.global_batch])
    with torch.no_grad():
        logits = theirs(sequences[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
    assert run_training(recipe, 0).val_loss == pytest.approx(loss.item(), rel=1e-5)


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    r"kv_lora_rank = 512 \(model_type = 'deepseek_v3'\): latent attention": ("DeepseekV3", {"kv_lora_rank": 512}),
    r"kv_lora_rank = 8 \(model_type = 'deepseek_v2'\): latent attention": ("DeepseekV2", {"kv_lora_rank": 8}),
    r"model_type = 'gpt2': must be one of llama": ("GPT2", {}),
    r"hidden_act = 'gelu': the backbone has only 'silu'": ("Llama", {"hidden_act": "gelu"}),
    r"attention_bias = True: .* only False": ("Llama", {"attention_bias": True}),
    r"mlp_bias = True: .* only False": ("Llama", {"mlp_bias": True}),
    r"rope_scaling \(rope_parameters.rope_type\) = 'linear'": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    r"clip_qkv = 8.0: .* only None": ("Olmoe", {"clip_qkv": 8.0}),
    r"mlp_only_layers = \[1\]: .* only \[\]": ("Qwen3Moe", MOE | {"mlp_only_layers": [1]}),
    r"decoder_sparse_step = 2: .* only 1": ("Qwen3Moe", MOE | {"decoder_sparse_step": 2}),
    r"sliding_window = 16: .* import with --seq-len 16 or less": ("Mistral", {"sliding_window": 16}),
    r"router.renormalize = True: must be false with router.top_k = 1": (
        "Mixtral",
        {"num_experts_per_tok": 1, "num_local_experts": 4},
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_the_backbone_lacks_is_refused(said: str, tmp_path: Path) -> None:
    """In one line, with the field of config.json, before anything is written."""
    name, fields = REFUSED[said]
    getattr(transformers, f"{name}Config")(**(SHAPE | fields)).save_pretrained(tmp_path)
    save_file({"unused": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert re.search(said, refusal("import", tmp_path, tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "theirs")
    arguments = ("import", tmp_path / "theirs", tmp_path / "ours")
    assert "--seq-len 64: must be at most max_position_embeddings (32)" in refusal(*arguments, "--seq-len", "64")
    assert "--set model.hidden: must be left out" in refusal(*arguments, "--set", "model.hidden=32")
    save_file({"lm_head.weight": torch.zeros(300, 24)}, tmp_path / "theirs" / "model.other.safetensors")
    assert re.search(r"has lm_head.weight, and so has model\S+; remove one of them", refusal(*arguments))
    (tmp_path / "theirs" / "model.other.safetensors").unlink()
    file = tmp_path / "theirs" / "config.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"vocab_size": 301}))
    assert "lm_head.weight is (300, 24), but (301, 24) by config.json" in refusal(*arguments)
    file.write_text(json.dumps(json.loads(whole) | {"num_hidden_layers": 2}))
    assert "model.layers.2.input_layernorm.weight is (24,), but unknown by config.json" in refusal(*arguments)
    file.write_text(whole)
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    assert "give the model's tokenizer with --tokenizer FILE" in refusal(*arguments)
    next((tmp_path / "theirs").glob("model-00002*")).unlink()
    assert "is missing, but" in refusal(*arguments)
    for shard in (tmp_path / "theirs").glob("*.safetensors"):
        shard.unlink()
    assert "has no model*.safetensors" in refusal(*arguments)
    assert not (tmp_path / "ours").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "theirs")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # all other files are smaller
    try:
        said = refusal("import", tmp_path / "theirs", tmp_path / "ours")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert re.search(r"ours: cannot be written \(.*File too large", said)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
