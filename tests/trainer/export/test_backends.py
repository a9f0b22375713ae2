"""What serving back ends ask of an exported model: transformers' continuous batching, and those of vLLM and SGLang."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.trainer.export.test_transformers import difference, model_with, some_tokens

KINDS = {
    "pool": {},
    "vanilla": {"num_expert_groups": 3, "num_experts": 12},
    "private": {"private_intermediate_size": 4},
    "dense": {"ffn": "dense"},
    "all else": {"qk_norm": "all", "qkv_bias": True, "private_intermediate_size": 4, "private_gate": True},
}


@pytest.mark.parametrize(("kind", "attention"), [("pool", "sdpa"), ("vanilla", "eager")])
def test_continuous_batching_gives_the_tokens_of_generate(kind: str, attention: str) -> None:
    """Requests of 1 to 9 tokens, more than a batch holds, prefilled in pieces beside others that decode."""
    model = model_with(attention, **KINDS[kind])
    prompts = [some_tokens(1, length)[0].tolist() for length in (5, 1, 9, 2, 7)]
    config = ContinuousBatchingConfig(page_size=4, num_blocks=16, max_batch_tokens=6, max_requests_per_batch=3)
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=0)
    outputs = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=config)
    assert model.config._attn_implementation == attention, "it is put back"
    made = [output.generated_tokens for output in outputs.values()]
    alone = [model.generate(torch.tensor([prompt]), settings)[0, len(prompt) :].tolist() for prompt in prompts]
    assert made == alone
    assert len({token for tokens in made for token in tokens}) > 4, "the tokens differ among themselves"


def rows_per_token(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> tuple[Any, None]:
    """Attention as vLLM and SGLang register it: a table of layers finds the cache; the result has no batch."""
    assert kwargs["attention_instances"][module.layer_idx] == "cache"
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs["scaling"])
    return attended.transpose(1, 2).flatten(2)[0], None


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_other_attention_and_missing_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of vLLM's back end; then as on two ranks of a pipeline, where the identity stands for missing layers."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "served", rows_per_token)
    model = model_with("served", seed=3, **KINDS[kind]).model
    expected = model_with("eager", seed=3, **KINDS[kind]).model(some_tokens(1, 7)).last_hidden_state
    settings = {
        "use_cache": False,
        "position_ids": torch.arange(7)[None],
        "attention_instances": dict.fromkeys(range(3), "cache"),
        "return_dict": False,
    }
    (whole,) = model(input_ids=some_tokens(1, 7), **settings)
    assert difference(whole, expected) < 1e-5
    layers, norm = list(model.layers), model.norm
    try:
        model.layers[2], model.norm = First(), First()
        (between,) = model(input_ids=some_tokens(1, 7), **settings)
        model.layers[0], model.layers[1], model.layers[2], model.norm = First(), First(), layers[2], norm
        (last,) = model(inputs_embeds=between, **settings)
    finally:
        model.layers, model.norm = nn.ModuleList(layers), norm
    assert difference(last, expected) < 1e-5


class First(nn.Identity):
    """What the back ends put in the place of a layer that another rank has."""

    def forward(self, *args: Any, **_: Any) -> Tensor:
        return args[0]


@pytest.mark.parametrize("kind", KINDS)
def test_plans_name_modules_that_exist(kind: str) -> None:
    """Every rule of the plans matches modules or stacks, and every linear layer of the trunk is divided."""
    model = model_with(**KINDS[kind])
    base = model.model
    tensors = dict(base.named_modules()) | dict(base.named_parameters())
    used = {rule: [name for name in tensors if re.fullmatch(rule, name)] for rule in base.config.base_model_tp_plan}
    assert all(used.values()), used
    divided = {name for names in used.values() for name in names}
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in linear if not name.endswith("private_gate")} <= divided
    assert set(base.config.base_model_pp_plan) <= {name for name, _ in base.named_children()}
    assert set(model._tp_plan) >= {"lm_head", *(f"model.{rule}" for rule in used)}
    assert not {"base_model_tp_plan", "base_model_pp_plan"} & set(base.config.to_dict())


def test_the_pool_is_found_once() -> None:
    """vLLM and SGLang look for children called experts, of a ModuleList or of stacks, and build one layer for each."""
    found = [
        (name, child)
        for name, module in model_with().model.named_modules()
        for child_name, child in module.named_children()
        if child_name == "experts" and all(parameter.ndim == 3 for parameter in child.parameters())
    ]
    assert [name for name, _ in found] == [""]
    assert found[0][1].num_experts == model_with().config.num_experts
