"""Exports with other libraries: quantised by torchao, with adapters of peft, and generating with a draft."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

from tests.trainer.export.test_export import exported, invoke, refused
from tests.trainer.export.test_transformers import difference, model_with, some_tokens

INT8 = Int8WeightOnlyConfig()
MATRICES = r"re:.*\.(experts\.(gate_up|down)_proj|self_attn\.\w_proj)"
POOL = ["experts.gate_up_proj", "experts.down_proj"]


def distance(a: Tensor, b: Tensor) -> float:
    """The mean of the differences, relative to that of b: at a few tokens other experts may be chosen."""
    return float((a - b).abs().mean() / b.abs().mean())


def bytes_of(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def test_quantised_saved_and_used_by_commands(tmp_path: Path) -> None:
    """int8 of attention and pool, by transformers; `generate` and `eval` load what it saved."""
    plain, folder = exported("unipool"), tmp_path / "int8"
    settings = TorchAoConfig(FqnToConfig({MATRICES: INT8}))
    model = AutoModelForCausalLM.from_pretrained(plain, trust_remote_code=True, quantization_config=settings)
    types = {name: type(parameter).__name__ for name, parameter in model.named_parameters()}
    for name, kind in types.items():
        assert kind == ("Int8Tensor" if "_proj" in name else "Parameter"), name
    model.save_pretrained(folder)
    shutil.copy(plain / "tokenizer.json", folder)
    shutil.copy(plain / "tokenizer_config.json", folder)
    assert bytes_of(folder) < 0.8 * bytes_of(plain), "the embedding and torchao's notes are much of a tiny model"
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = some_tokens(2, 6)
    full = AutoModelForCausalLM.from_pretrained(plain, trust_remote_code=True)(tokens).logits
    assert torch.equal(again(tokens).logits, model(tokens).logits), "with gradients enabled too"
    assert 0 < distance(model(tokens).logits, full) < 0.1
    text = tmp_path / "text.txt"
    text.write_text("some text to compute a loss on")
    losses = []
    for path in (plain, folder):
        result = invoke("eval", str(path), "--text", str(text), "--json")
        assert result.exit_code == 0, result.output
        losses.append(json.loads(result.stdout)["text"]["loss"])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], abs=0.05)
    made = json.loads(invoke("generate", str(folder), "--prompt", "a", "--tokens", "3", "--json").stdout)
    assert made["tokens"] == 3
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert "the quantised model cannot be loaded" in refused("generate", str(folder), "--prompt", "a")


@torch.no_grad()
def test_experts_as_linear_layers(tmp_path: Path) -> None:
    """They compute the same, are saved as before, and torchao's 4-bit matrices take their place."""
    model = copy.deepcopy(model_with(hidden_size=32, intermediate_size=32))
    single, tokens = copy.deepcopy(model), some_tokens(2, 6)
    single.model.experts.unstack()
    assert difference(single(tokens).logits, model(tokens).logits) < 1e-6
    model.save_pretrained(tmp_path / "stacked")
    single.save_pretrained(tmp_path / "single")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("stacked", "single")]
    assert files[0] == files[1]
    config = PrototypeInt4WeightOnlyConfig(group_size=32)
    quantize_(single, config, lambda module, name: isinstance(module, nn.Linear) and "experts" in name)
    kinds = {type(expert.up_proj.weight).__name__ for expert in single.model.experts.children()}
    assert kinds == {"Int4OpaqueTensor"}
    assert 0 < distance(single(tokens).logits, model(tokens).logits) < 0.5


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_parameters": ["router.weight"]},
        {"target_parameters": POOL},
    ],
    ids=["attention", "routers", "pool"],
)
def test_adapters(targets: dict[str, list[str]], tmp_path: Path) -> None:
    """They learn while the model stays as it is, are saved alone, and can be merged into it."""
    torch.manual_seed(0)  # of the adapters
    model, tokens = copy.deepcopy(model_with()), some_tokens(2, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=2, **targets))
    optimizer = torch.optim.SGD([parameter for parameter in adapted.parameters() if parameter.requires_grad], 0.1)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = adapted(tokens).logits
        assert difference(logits, model_with()(tokens).logits) > 1e-4
        base = copy.deepcopy(model_with())
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(tokens).logits, logits)
        assert difference(adapted.merge_and_unload()(tokens).logits, logits) < 1e-5


def test_adapters_over_an_int8_pool(tmp_path: Path) -> None:
    model_with().save_pretrained(tmp_path)
    settings = TorchAoConfig(FqnToConfig({r"re:.*\.experts\.(gate_up|down)_proj": INT8}))
    model = type(model_with()).from_pretrained(tmp_path, quantization_config=settings)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    tokens = some_tokens(2, 6)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    grads = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(grads) == 6 and any(float(grad.abs().max()) > 0 for grad in grads)
