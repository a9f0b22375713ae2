"""Exported models in transformers: generation, attention functions, training, files and compilation."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from trainer.export.model_files.configuration_unipool import UniPoolConfig
from trainer.export.model_files.experts_unipool import UniPoolExperts
from trainer.export.model_files.modeling_unipool import CACHE, UniPoolForCausalLM

VOCAB, WINDOW = 40, 8


@cache
def model_with(attention: str = "sdpa", seed: int = 0, **settings: Any) -> UniPoolForCausalLM:
    """Return a random model in evaluation mode whose choices of experts and tokens have no near ties."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "initializer_range": 0.5,
    }
    config = UniPoolConfig(**sizes | settings, eos_token_id=0, pad_token_id=0, attn_implementation=attention)
    with torch.random.fork_rng():  # whether a test is the first to ask for a model changes nothing else in it
        torch.manual_seed(seed)
        return UniPoolForCausalLM(config).eval()


def some_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def left_padded() -> dict[str, Tensor]:
    """Return three prompts of 7, 4 and 1 tokens."""
    tokens, mask = some_tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = mask[2, :6] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


GENERATE: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": dict,
    "past the window": lambda: {"max_new_tokens": WINDOW + 2, "min_new_tokens": WINDOW + 2},
    "left padding": left_padded,
    "beams": lambda: {"num_beams": 3, **left_padded()},
    "sampled": lambda: {"do_sample": True, "top_k": 5, **left_padded()},
    "inputs_embeds": lambda: {"inputs_embeds": model_with().get_input_embeddings()(some_tokens(2, 5))},
    "static cache": lambda: {"cache_implementation": "static", "disable_compile": True, **left_padded()},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3, "input_ids": some_tokens(1, 3).repeat(1, 3)},
    "assistant": lambda: {"assistant_model": model_with(seed=1), "input_ids": some_tokens(1, 5)},
}
ONLY_WITH_CACHE = ("cache_implementation", "disable_compile", "prompt_lookup_num_tokens", "assistant_model")


@pytest.mark.parametrize("kind", GENERATE)
def test_generate_gives_the_same_tokens_with_and_without_cache(kind: str) -> None:
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | GENERATE[kind]()
    if kind == "assistant":  # transformers 5.0 refuses both together
        del settings["min_new_tokens"]
    if "inputs_embeds" not in settings:
        settings = {"input_ids": some_tokens(2, 5)} | settings
    torch.manual_seed(5)
    cached = model_with().generate(**settings)
    torch.manual_seed(5)
    plain = {name: value for name, value in settings.items() if name not in ONLY_WITH_CACHE}
    assert torch.equal(cached, model_with().generate(**plain, use_cache=False))
    assert len(cached[0].unique()) > 4, "the tokens differ among themselves"


def test_left_padding_does_not_change_continuations() -> None:
    together = model_with().generate(**left_padded(), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for row, start in enumerate((0, 3, 6)):
        prompt = some_tokens(3, 7)[row : row + 1, start:]
        alone = model_with().generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert torch.equal(together[row, 7:], alone[0, 7 - start :])


@torch.no_grad()
def test_unknown_keywords_are_refused() -> None:
    model, tokens = model_with(), some_tokens(2, 6)
    for unknown in ("kv", "labels_", "pasts"):
        with pytest.raises(TypeError, match=unknown):
            model(tokens, **{unknown: torch.ones(1)})
    expected = model(tokens, labels=tokens)
    known = {"num_items_in_batch": torch.tensor(10), "cu_seq_lens_q": None, "is_causal": True, "unknown": None}
    loss = model(tokens, labels=tokens, cache_position=torch.arange(6), **known).loss
    torch.testing.assert_close(loss, expected.loss)
    cached = expected.get(CACHE)
    with pytest.raises(TypeError, match="give one"):
        model(tokens, past_key_values=cached, cache=cached)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_expert_groups": [1, 2]}, "num_expert_groups is [1, 2]: "),
        ({"num_expert_groups": 2}, "num_hidden_layers is 3: it must be a multiple of num_expert_groups"),
        ({"num_expert_groups": 3}, "num_experts is 8: it must be a multiple of num_expert_groups"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9: a layer has fewer experts"),
    ],
)
def test_groups_that_no_model_has(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        UniPoolConfig(**{"num_hidden_layers": 3, "num_experts": 8} | settings)


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_has_two_names(name: str) -> None:
    model, tokens = model_with(), some_tokens(2, 6)
    expected = model(tokens, use_cache=False)
    assert expected.get(CACHE) is None
    cached = model(tokens[:, :4]).get(CACHE)
    assert difference(model(tokens[:, 4:], **{name: cached}).logits, expected.logits[:, 4:]) < 1e-5
    cached = StaticCache(config=model.config, max_cache_len=9)
    parts = [model(part, **{name: cached}).logits for part in (tokens[:, :4], tokens[:, 4:])]
    assert difference(torch.cat(parts, dim=1), expected.logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_functions_of_transformers_agree(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Flex attention computes the same without compilation, which takes a minute.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = model_with(attention)
    expected = model_with()
    model.load_state_dict(expected.state_dict())
    seen = left_padded()["attention_mask"].bool()
    for inputs in ({"input_ids": some_tokens(3, 7)}, left_padded()):
        logits = model(**inputs).logits
        kept = seen if "attention_mask" in inputs else slice(None)
        assert difference(logits[kept], expected(**inputs).logits[kept]) < 1e-5


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other() -> None:
    first, second = some_tokens(2, 5).split(1)
    positions = torch.arange(5).repeat(2)[None]
    packed = model_with()(torch.cat((first, second), dim=1), position_ids=positions).logits
    assert difference(packed, torch.cat([model_with()(part).logits for part in (first, second)], dim=1)) < 1e-5


@torch.no_grad()
def test_outputs_beside_the_logits() -> None:
    """Hidden states, router logits, and attention weights, which only eager attention returns."""
    model, tokens = model_with("eager"), some_tokens(2, 6)
    out = model(tokens, output_hidden_states=True, output_router_logits=True, output_attentions=True, labels=tokens)
    assert len(out.hidden_states) == 4 and difference(model.lm_head(out.hidden_states[-1]), out.logits) < 1e-6
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(tokens))
    assert [logits.shape for logits in out.router_logits] == [(12, 6)] * 3 and out.aux_loss is None
    with torch.no_grad():
        chosen: list[Tensor] = []
        hooks = [
            layer.router.register_forward_hook(lambda *call: chosen.append(call[2][2])) for layer in model.model.layers
        ]
        model(tokens)
        for hook in hooks:
            hook.remove()
    assert all(torch.equal(logits.topk(2).indices, ids) for logits, ids in zip(out.router_logits, chosen, strict=True))
    assert [weights.shape for weights in out.attentions] == [(2, 4, 6, 6)] * 3
    torch.testing.assert_close(out.attentions[0].sum(dim=-1), torch.ones(2, 4, 6))
    plain = model(tokens, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], model(tokens).logits)
    dense = model_with(ffn="dense")(tokens, output_router_logits=True)
    assert dense.router_logits is None and dense.hidden_states is None and dense.attentions is None


@torch.no_grad()
def test_the_loss_leaves_out_labels_of_minus_100() -> None:
    tokens = some_tokens(2, 8)
    labels = tokens.clone()
    labels[0, :5] = labels[1, 6:] = -100
    out = model_with()(tokens, labels=labels)
    by_hand = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, by_hand)
    total = model_with()(tokens, labels=labels, num_items_in_batch=2).loss
    torch.testing.assert_close(total, by_hand * int((labels[:, 1:] != -100).sum()) / 2)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_is_all_padding_is_finite(attention: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model_with(attention)).to(dtype)
    inputs = left_padded()
    inputs["attention_mask"][2] = 0
    assert model(**inputs).logits.isfinite().all()


def gradients(model: UniPoolForCausalLM, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def test_gradients_are_those_of_all_experts_in_a_loop_and_with_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = copy.deepcopy(model_with()).train(), {"input_ids": some_tokens(2, 6)}
    plain = gradients(model, **inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = gradients(model, **inputs)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=9))
    model.gradient_checkpointing_disable()

    def loop(experts: UniPoolExperts, x_TD: Tensor, ids_TK: Tensor, scores_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for expert, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            gate, up = (x_TD @ gate_up.T).chunk(2, dim=-1)
            gates_T1 = (scores_TK * (ids_TK == expert)).sum(dim=1, keepdim=True)
            y_TD = y_TD + gates_T1 * ((F.silu(gate) * up) @ down.T)
        return y_TD

    monkeypatch.setattr(UniPoolExperts, "forward", loop)
    expected = gradients(model, **inputs)
    assert expected.keys() == plain.keys() == recomputed.keys() == dict(model.named_parameters()).keys()
    for name, grad in expected.items():
        assert difference(plain[name], grad) < 1e-4 and difference(recomputed[name], grad) < 1e-4, name


class Products(TorchDispatchMode):
    """Records which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::bmm"):
            self.seen.append((args[1].data_ptr(), args[1].numel()))
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_a_decode_step_visits_only_the_experts_that_were_chosen() -> None:
    model = model_with(num_experts=48)
    experts = model.model.experts
    weights = {w.data_ptr() for stack in (experts.gate_up_proj, experts.down_proj) for w in stack}
    model(some_tokens(1, 1))
    with Products() as products:
        model(some_tokens(1, 1))
    visited = [place for place, _ in products.seen if place in weights]
    assert len(visited) == 3 * 2 * 2, "3 layers, 2 experts per token, 2 matrices per expert"
    x_ND, ids_N = torch.randn(9, 16), torch.randint(0, 48, (9,))
    torch.testing.assert_close(experts.row_by_row(x_ND, ids_N), experts.expert_by_expert(x_ND, ids_N))


@pytest.mark.parametrize("autocast", [False, True])
def test_experts_under_autocast_and_in_halves(autocast: bool) -> None:
    """In bf16, by autocast or by weights, gradients are close to those of fp32; routers still compute in fp32."""
    model, tokens = copy.deepcopy(model_with()), some_tokens(2, 8)
    expected = gradients(model, input_ids=tokens)
    if not autocast:
        model = model.to(torch.bfloat16)
        for layer in model.model.layers:
            layer.router.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradients(model, input_ids=tokens)
    grad = found["model.experts.down_proj"]
    assert grad.dtype == (torch.float32 if autocast else torch.bfloat16)
    assert F.cosine_similarity(grad.float().flatten(), expected["model.experts.down_proj"].flatten(), dim=0) > 0.9


def test_saved_in_shards_and_loaded_again(tmp_path: Path) -> None:
    """Files store tensors by the expert's number; routers stay fp32 in both half precisions."""
    for kind in ("norm", "sigmoid_bias"):
        model, folder = model_with(router=kind), tmp_path / kind
        model.save_pretrained(folder, max_shard_size="4KB")
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(set(index.values())) > 2
        for part, shape in (("gate", [8, 16]), ("up", [8, 16]), ("down", [16, 8])):
            for expert in range(6):
                name = f"model.experts.{expert}.{part}_proj.weight"
                with safe_open(folder / index[name], "pt") as file:
                    assert file.get_slice(name).get_shape() == shape
        again, report = UniPoolForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert again.config.rope_theta == model.config.rope_theta and again.config.router == kind
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
        for dtype in (torch.bfloat16, torch.float16):
            half = UniPoolForCausalLM.from_pretrained(folder, dtype=dtype)
            for name, tensor in half.state_dict().items():
                assert tensor.dtype == (torch.float32 if "router" in name else dtype), name
            assert half(some_tokens(1, 4)).logits.isfinite().all()


def test_compiles_as_one_graph() -> None:
    """Forward and backward of many rows, and a decoding step with a static cache, compile without graph breaks."""
    torch._dynamo.reset()
    model, tokens = copy.deepcopy(model_with(num_hidden_layers=1)), some_tokens(2, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, found = gradients(model, input_ids=tokens), gradients(compiled, input_ids=tokens)
    assert expected.keys() == {name.removeprefix("_orig_mod.") for name in found}
    for name, grad in expected.items():
        assert difference(found[f"_orig_mod.{name}"], grad) < 1e-4, name
    with torch.no_grad():
        cached = StaticCache(config=model.config, max_cache_len=9)
        model(tokens[:, :5], **{CACHE: cached})
        step = compiled(tokens[:, 5:], **{CACHE: cached}, position_ids=torch.tensor([[5]])).logits
        assert difference(step, model(tokens).logits[:, 5:]) < 1e-5
