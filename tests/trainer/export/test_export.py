"""Exports compute the trainer's numbers without this project, and runs and exports generate the same text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor

from pool.placement import contiguous
from pool.shard import ExpertShard
from router import Routing
from tests.distributed import TIME_LIMIT
from tests.saved_weights import load_weights
from tests.tools import folder_of_process
from tests.training import run_training, tiny
from trainer.checkpoint.format import newest
from trainer.checkpoint.reshard import SavedCheckpoint, convert
from trainer.cli import cli
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe
from trainer.data.tokenizer import train_tokenizer
from trainer.export.exported_model import load_export, stored_tensors
from trainer.export.loaded_model import LoadedModel
from trainer.export.saved_run import find_run, load_run
from trainer.model.micro_batch import PoolMap, Reroute, hidden_states
from trainer.model.pool_client import LocalPool, PoolClient
from trainer.model.random_routing import random_routing
from trainer.model.trunk import Trunk

GROUPS: dict[str, Any] = {"model": {"groups": 3}, "pool": {"experts": 12}}
MODELS: dict[str, dict[str, Any]] = {
    "unipool": {"router": {"constant_factor": 0.5}},
    "sigmoid_bias, groups, 1+2 ranks, ZeRO": GROUPS
    | {
        "router": {"kind": "sigmoid_bias", "bias_rate": 0.3},
        "parallel": {"pool_ranks": 2, "trunk_zero": 2, "pool_zero": 1},
    },
    "norm_bias, private expert": {
        "model": {"private_ffn": 7, "private_gate": True, "head_dim": 8, "qk_norm": "head", "qkv_bias": True},
        "router": {"kind": "norm_bias", "bias_rate": 0.3},
        "balance": {"pool": 0.0},
    },
    "softmax, groups": GROUPS
    | {"router": {"kind": "softmax", "renormalize": True, "logit_bias": True}, "parallel": {"trunk_zero": 3}},
    "dense": {"model": {"ffn": "dense"}, "pool": {"experts": 0}, "balance": {"pool": 0.0}},
}
VOCAB = 300


@cache
def home() -> Path:
    """Return a folder for this module."""
    return folder_of_process()


@cache
def tokenizer_file() -> Path:
    path = home() / "tokenizer.json"
    tokenizer = train_tokenizer(["def main(argument):\n    return argument\n" * 20], VOCAB)
    path.write_text(tokenizer.to_str())
    return path


def recipe_of(model: str) -> Recipe:
    sections = {name: dict(values) for name, values in MODELS[model].items()}
    sections["model"] = {**sections.get("model", {}), "vocab": VOCAB, "seq_len": 24}
    sections["parallel"] = {"trunk_zero": 0, "pool_zero": 1, **sections.get("parallel", {})}
    return tiny(**sections, data={"source": "gone", "tokenizer": str(tokenizer_file())})


@cache
def trained(model: str) -> tuple[Path, dict[str, Tensor]]:
    """Return the folder of a run after one step, and its weights."""
    recipe, folder = recipe_of(model), home() / model
    return folder, run_training(recipe, 1, save_to=folder / "checkpoints").weights


@cache
def exported(model: str) -> Path:
    out = home() / f"{model}-hf"
    assert invoke("export", str(trained(model)[0]), str(out)).exit_code == 0
    return out


def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, arguments, input=stdin)


@torch.no_grad()
def trainer_logits(model: str, tokens_BS: Tensor, reroute: Reroute | None = None) -> Tensor:
    """Return the logits of the trainer's own forward pass, from the checkpoint."""
    recipe = recipe_of(model)
    found = newest(trained(model)[0] / "checkpoints")
    assert found
    with tempfile.TemporaryDirectory() as work:
        convert(found[1], Path(work))
        saved = SavedCheckpoint(found[1], Path(work))
        trunk = Trunk(recipe, torch.device("cpu"))
        if recipe.model.ffn == "dense":
            load_weights(saved, trunk, None)
            ((h_BSD, _),) = PoolClient().run([hidden_states(trunk, None, tokens_BS, 0)], (0,), 0)
        else:
            m = recipe.model
            order = contiguous(recipe.pool.experts, 1, 1)
            shard = ExpertShard(order.order, m.hidden, m.ffn_hidden, torch.float32)
            load_weights(saved, trunk, shard)
            pool_map = PoolMap(order.position_M, recipe.experts_per_layer, m.layers // m.groups)
            coroutine = hidden_states(trunk, pool_map, tokens_BS, 0, reroute)
            ((h_BSD, _),) = LocalPool(shard).run([coroutine], (0,), 0)
        logits_BSV: Tensor = trunk.head(h_BSD)
        return logits_BSV


def some_tokens() -> Tensor:
    return torch.randint(1, VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_logits_are_the_trainers(model: str) -> None:
    """The run loaded in memory and the export compute the same logits, with an expert bias that has moved."""
    expected = trainer_logits(model, some_tokens())
    assert expected.std() > 0.1
    for loaded, _ in (load_run(find_run(trained(model)[0])), load_export(exported(model))):
        assert_close(loaded.eval()(some_tokens()).logits, expected)
    if "_bias" in model:
        assert loaded.model.layers[0].router.expert_bias.abs().max() > 0.2


@pytest.mark.parametrize("model", [name for name in MODELS if name != "dense"])
@torch.no_grad()
def test_logits_with_random_experts_are_those_of_the_probes(model: str) -> None:
    """The trainer's randomisation of layer 1 agrees with the export's layer 1, given the same experts."""
    from trainer.probe.adapters import adapt, rerouted

    recipe, seen = recipe_of(model), []
    reroute = random_routing(1, recipe.experts_per_layer, seed=5, sequences=range(3))

    def look(layer: int, routing: Routing) -> Routing:
        done = reroute(layer, routing)
        seen.append((layer, done.topk_expert_ids_TK, done is routing))
        return done

    random = trainer_logits(model, some_tokens(), look)
    assert [same for _, _, same in seen] == [True, False, True], "of layers 0, 1, 2"
    loaded, _ = load_export(exported(model))
    layer = adapt(LoadedModel(exported(model), loaded.eval(), None, None)).layers[1]
    with rerouted(layer, lambda _: seen[1][1] + layer.bank.first):
        assert_close(loaded(some_tokens()).logits, random)
    assert (loaded(some_tokens()).logits - random).abs().max() > 0.01 * random.abs().max()


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_the_runs_bit_for_bit_and_stored_once(model: str) -> None:
    """Both formats have the same tensors, which together are as many values as were trained."""
    run, weights = trained(model)
    bare = home() / f"{model}-bare"
    found = newest(run / "checkpoints")
    assert found
    as_json = invoke("export", str(found[1]), str(bare), "--format", "safetensors", "--json")
    report = json.loads(as_json.stdout)
    tensors = load_file(bare / "model.safetensors")
    assert sorted(report["files"]) == ["model.safetensors", "recipe.yaml"]
    assert report["files"]["model.safetensors"] < 4 * sum(t.numel() for t in tensors.values()) + 20_000

    again = load_file(exported(model) / "model.safetensors")
    assert tensors.keys() == again.keys() and all(torch.equal(t, again[name]) for name, t in tensors.items())
    learned = [t for name, t in tensors.items() if not name.endswith("expert_bias")]
    assert report["parameters"] == sum(t.numel() for t in learned) == sum(t.numel() for t in weights.values())
    pieces = sorted(learned_rows(weights.values()))
    assert sorted(learned_rows(learned)) == pieces


def learned_rows(tensors: Any) -> list[bytes]:
    """Return every row of every tensor; fused and split tensors have the same rows."""
    return [row.numpy().tobytes() for t in tensors for row in t.reshape(-1, t.shape[-1] if t.ndim > 1 else 1)]


@torch.no_grad()
def test_a_dense_model_is_a_llama(tmp_path: Path) -> None:
    """transformers' own LLaMA loads it without any code of ours, and gives the same logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "llama"
    assert invoke("export", str(trained("dense")[0]), str(out), "--format", "llama").exit_code == 0
    assert not list(out.glob("*.py")) and "trust_remote_code" not in (out / "README.md").read_text()
    llama = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(llama).__name__ == "LlamaForCausalLM"
    assert_close(llama(some_tokens()).logits, load_export(exported("dense"))[0](some_tokens()).logits)
    ours, own = (AutoTokenizer.from_pretrained(path) for path in (exported("dense"), out))
    assert own("def main(argument)")["input_ids"] == ours("def main(argument)")["input_ids"]
    assert llama.generation_config.eos_token_id == own.eos_token_id == 0
    assert "not a LLaMA's" in refused("export", str(trained("unipool")[0]), str(tmp_path / "no"), "--format", "llama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


ALONE = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("trainer", "pool", "router"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
found = {}
tokens = torch.load("tokens.pt")
for name, folder in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    logits = model(tokens).logits
    assert type(model).__module__.startswith("transformers_modules")
    loss = model(tokens, labels=tokens).loss
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    states = model(tokens, output_hidden_states=True, use_cache=False)

    def generate(**settings):
        return model.generate(max_new_tokens=9, min_new_tokens=9, do_sample=False, **settings)

    prompts = [tokens[0, :7], tokens[1, :3], tokens[2, :1]]
    alone = [generate(input_ids=prompt[None])[0, len(prompt):] for prompt in prompts]
    padded = torch.zeros(3, 7, dtype=torch.long)
    mask = torch.zeros(3, 7, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, 7 - len(prompt):], mask[row, 7 - len(prompt):] = prompt, 1
    together = generate(input_ids=padded, attention_mask=mask)[:, 7:]
    cached = model(tokens[:, :10], use_cache=True).past_key_values
    rest = model(tokens[:, 10:], past_key_values=cached).logits
    shifted, seen = (torch.cat((t[:, :1] * 0, t), dim=1) for t in (tokens, torch.ones_like(tokens)))
    cached = model(shifted[:, :11], attention_mask=seen[:, :11], use_cache=True).past_key_values
    padded_rest = model(shifted[:, 11:], attention_mask=seen, past_key_values=cached).logits
    found[name] = {
        "logits": logits,
        "loss": (loss - by_hand).abs() / by_hand,
        "states": (model.lm_head(states.hidden_states[-1]) - logits).abs().max(),
        "number of states": torch.tensor(len(states.hidden_states)),
        "padded": (together == torch.stack(alone)).float().mean(),
        "uncached": (generate(input_ids=prompts[0][None], use_cache=False)[0, 7:] == alone[0]).float().mean(),
        "static": (generate(input_ids=prompts[0][None], cache_implementation="static", disable_compile=True)[0, 7:]
            == alone[0]).float().mean(),
        "in two parts": (rest - logits[:, 10:]).abs().max(),
        "in two parts, padded": (padded_rest - logits[:, 10:]).abs().max(),
        "last only": (model(tokens, logits_to_keep=1).logits - logits[:, -1:]).abs().max(),
    }
    found[name] = {key: value.detach() for key, value in found[name].items()}
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    kept = {str(p.dtype) for name, p in half.named_parameters() if "router" in name}
    assert half.lm_head.weight.dtype == torch.bfloat16 and kept <= {"torch.float32"}, kept
    found[name]["half"] = half.eval()(tokens).logits.detach().float()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found[name]["ids"] = tokenizer("def main(argument)", return_tensors="pt")["input_ids"][0]
    assert tokenizer.decode(tokenizer("def main(argument)")["input_ids"]) == "def main(argument)"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, model.generation_config.eos_token_id) == (0, 0, 0)
torch.save(found, "found.pt")
"""


def test_without_this_project(tmp_path: Path) -> None:
    """transformers alone loads every export and computes the same logits, also with caches and left padding."""
    torch.save(some_tokens(), tmp_path / "tokens.pt")
    folders = {model: str(exported(model)) for model in MODELS}
    in_files = str(tmp_path / "in files")
    assert invoke("export", str(trained("unipool")[0]), in_files, "--shard-size", "20KB").exit_code == 0
    folders["unipool in files"] = in_files
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, json.dumps(folders)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    for model, values in found.items():
        expected = trainer_logits(model.removesuffix(" in files"), some_tokens())
        assert_close(values["logits"], expected)
        assert values["number of states"] == 4, model
        for exact in ("padded", "uncached", "static"):
            assert values[exact] == 1, (model, exact)
        for small in ("loss", "states", "in two parts", "in two parts, padded", "last only"):
            assert values[small] < 1e-5, (model, small, values[small])
        assert (values["half"] - expected).pow(2).mean() < 0.01 * expected.pow(2).mean(), model
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(tokenizer_file())).encode("def main(argument)").ids
        assert values["ids"].tolist() == ids


def test_large_weights_are_split_and_small_types_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    out = [str(trained("unipool")[0]), str(tmp_path / "out"), "--shard-size", "20KB"]
    report = invoke("export", *out, "--dtype", "bfloat16", "--json")
    files = {name: size for name, size in json.loads(report.stdout)["files"].items() if name.endswith(".safetensors")}
    assert len(files) > 3 and all(size < 25_000 for size in files.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    whole = load_file(exported("unipool") / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    model, _ = load_export(tmp_path / "out")
    for name, tensor in stored_tensors(model).items():
        dtype = torch.float32 if ".router." in name else torch.bfloat16
        assert tensor.dtype == dtype and torch.equal(tensor, whole[name].to(dtype)), name


def test_generate_from_a_run_and_from_its_export() -> None:
    """Both generate the same text, which stops at the window. Only sampled text depends on the seed."""
    run, out = (str(path) for path in (trained("unipool")[0], exported("unipool")))

    def text(source: str, *arguments: str) -> dict[str, Any]:
        done = invoke("generate", source, "--prompt", "def main", "--json", *arguments)
        assert done.exit_code == 0, done.output
        made: dict[str, Any] = json.loads(done.stdout)
        return made

    sampled = text(run, "--tokens", "8")
    assert sampled["tokens"] == 8 and sampled["prompt"] == "def main" and sampled["seconds"] > 0
    assert text(out, "--tokens", "8")["text"] == sampled["text"] != text(out, "--tokens", "8", "--seed", "1")["text"]
    greedy = text(out, "--tokens", "8", "--temperature", "0")["text"]
    assert greedy == text(run, "--tokens", "8", "--temperature", "0", "--seed", "5")["text"]
    assert greedy == text(run, "--tokens", "8", "--top-k", "1", "--seed", "5")["text"]
    assert greedy == text(run, "--tokens", "8", "--top-p", "1e-9", "--seed", "5")["text"]

    streamed = invoke("generate", out, "--prompt", "-", "--tokens", "8", "--temperature", "0", stdin="def main")
    assert streamed.stdout == f"def main{greedy}\n"
    full = invoke("generate", out, "--prompt", "def main", "--tokens", "99", "--seed", "2")
    assert "the model's window of 24" in full.stderr
    empty = invoke("generate", out, "--prompt", "", "--tokens", "3", "--json")
    assert json.loads(empty.stdout)["tokens"] == 3


def refused(*arguments: str, stdin: bytes | None = None) -> str:
    """Return the error message of a command, which must be one line."""
    error = invoke(*arguments, stdin=stdin).exception
    assert isinstance(error, UserError), error
    line = str(error)
    assert "\n" not in line
    return line


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    kept = tmp_path / "out" / "file"
    kept.write_text("kept")
    run = str(trained("dense")[0])
    assert "already exists" in refused("export", run, str(kept.parent))
    assert "already exists" in refused("export", run, str(kept))
    assert "cannot be written" in refused("export", run, str(kept / "below"))
    assert kept.read_text() == "kept" and [kept.parent] == list(tmp_path.iterdir())


def test_other_folders_are_refused(tmp_path: Path) -> None:
    for command in (["export", str(tmp_path / "out")], ["generate", "--prompt", "x"]):
        name, *rest = command
        for folder, problem in (("nothing", "no such folder"), (".", "has no complete checkpoint")):
            message = refused(name, str(tmp_path / folder), *rest)
            assert problem in message and ("an export of format hf" in message) == (name == "generate")


@pytest.mark.parametrize("file", ["trunk/state/mp_rank_00_model_states.pt", "layout.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_leaves_nothing_behind(file: str, damage: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("unipool")[0], run)
    broken = run / "checkpoints" / "step_00000001" / file
    content = broken.read_bytes()
    broken.unlink()
    if damage == "cut":
        broken.write_bytes(content[: len(content) // 2])
    line = refused("export", str(run), str(tmp_path / "out"))
    assert "checkpoint" in line and "run" in line
    assert list(tmp_path.iterdir()) == [run]


def test_the_tokenizer_is_that_of_the_run(tmp_path: Path) -> None:
    """The tokenizer in the run's folder takes precedence over the one that the recipe names."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(trained("dense")[0], run)
    own = train_tokenizer(["another text\n" * 20], VOCAB)
    (run / "tokenizer.json").write_text(own.to_str())
    assert invoke("export", str(run), str(out)).exit_code == 0
    assert json.loads((out / "tokenizer.json").read_text())["model"] == json.loads(own.to_str())["model"]


def test_prompts_that_generate_refuses() -> None:
    assert "not UTF-8" in refused("generate", str(exported("dense")), "--prompt", "-", stdin=b"\xff")
    long = refused("generate", str(exported("dense")), "--prompt", "=" * 24)
    assert "24 tokens" in long and "shorten it to 23 or fewer" in long
