"""The command `probe` on a run, an export and a Hugging Face model: its output, files and refusals."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import PreTrainedTokenizerFast

from tests.tools import folder_of_process
from tests.trainer.probe.tiny_models import VOCAB, built
from tests.training import Outcome, run_training, tiny, tokens
from trainer.cli import cli
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe
from trainer.data.prepare import prepare_for
from trainer.data.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_tokenizer
from trainer.probe.adapters import load
from trainer.probe.text import Text, mean_loss, read_text

PROBES = ("randomize", "reuse", "load", "redundancy")
DOCUMENT = "def main(argument):\n    return argument + 1\n"


@cache
def home() -> Path:
    """Return a folder for this module, with a tokenizer and 60 documents."""
    folder = folder_of_process()
    (folder / "tokenizer.json").write_text(train_tokenizer([DOCUMENT * 20], VOCAB).to_str())
    (folder / "text").mkdir()
    for number in range(60):
        (folder / "text" / f"{number:02d}.py").write_text(f"{DOCUMENT}main({number})\n")
    return folder


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=load_tokenizer(str(home() / "tokenizer.json")), eos_token=END_OF_DOCUMENT
    )


@cache
def saved(name: str) -> str:
    """Return a folder as `export` or Hugging Face write it."""
    folder = home() / name
    built(name).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def recipe() -> Recipe:
    data = {"source": str(home() / "text"), "tokenizer": str(home() / "tokenizer.json"), "split": (1, 1, 0)}
    return tiny(model={"vocab": VOCAB, "seq_len": 24}, data=data | {"dir": str(home() / "data")})


@cache
def run() -> tuple[str, Outcome]:
    """Return the folder of a run after one step, and its outcome."""
    folder = home() / "run"
    return str(folder), run_training(recipe(), 1, save_to=folder / "checkpoints")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["probe", *arguments])


def refused(*arguments: str) -> str:
    error = invoke(*arguments).exception
    assert isinstance(error, UserError), error
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name", ["unipool", "qwen2_moe"])
def test_table_json_csv_and_plot(probe: str, name: str, tmp_path: Path) -> None:
    """All outputs exist for an export and a Hugging Face model; repeating the command gives the same numbers."""
    arguments = [probe, saved(name), "--text", str(home() / "text"), "--tokens", "200"]
    if probe == "randomize":
        arguments += ["--layers", "1", "--draws", "2", "--matched", "3"]
    shown = invoke(*arguments, "--csv", str(tmp_path / "a.csv"), "--out", str(tmp_path / "a.png"))
    as_json = invoke(*arguments, "--json", "--csv", str(tmp_path / "b.csv"))
    assert shown.exit_code == 0, shown.output
    assert name in shown.stdout and str(tmp_path / "a.png") in shown.stdout
    found = json.loads(as_json.stdout)
    assert found["model"] == name
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert (
        len(rows)
        == {
            "randomize": 4,  # 2 protocols, 2 draws
            "reuse": 7,  # 0 to 6 different experts
            "load": 18,  # 3 layers, 6 experts
            "redundancy": 15 * (1 if name == "unipool" else 3),
        }[probe]
    )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"a.csv", "a.png", "b.csv"}
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()


def test_a_run_is_probed_on_its_held_out_text() -> None:
    """The loss of a checkpoint is that of training, and the default text is the validation split."""
    folder, outcome = run()
    model = load(folder, own_text=True)
    batch = tokens(recipe())[: recipe().train.global_batch]
    loss = mean_loss(model, Text("the same", torch.from_numpy(batch)))
    assert loss == pytest.approx(outcome.val_loss, rel=1e-5)
    rows_NS1 = read_text(model.loaded, None, 100).rows_NS1
    held_out = prepare_for(recipe()).training[0][0].rows("validation")
    assert rows_NS1.tolist() == held_out[range(4)].tolist()
    assert read_text(model.loaded, None, 10**9).rows_NS1.tolist() == held_out[range(len(held_out))].tolist()
    found = json.loads(invoke("reuse", f"{folder}/checkpoints/step_00000001", "--tokens", "100", "--json").stdout)
    assert (found["text"], found["tokens"], found["layers"]) == ("held-out text", 96, 3)


def test_a_text_is_packed_as_for_training(tmp_path: Path) -> None:
    """Documents end with their token, rows overlap by one token, and a short text is one row."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("ab" * 40, "cd" * 40)))
    source = load(saved("unipool"), own_text=False).loaded
    ids = [*tokenizer()("ab" * 40)["input_ids"], 0, *tokenizer()("cd" * 40)["input_ids"], 0]
    rows = read_text(source, tmp_path / "a.jsonl", 1000).rows_NS1.tolist()
    assert rows == [ids[start : start + 33] for start in range(0, len(ids) - 32, 32)] and len(rows) >= 2
    assert len(read_text(source, tmp_path / "a.jsonl", 32).rows_NS1) == 1
    (tmp_path / "b.txt").write_text("ab")
    assert read_text(source, tmp_path / "b.txt", 1000).rows_NS1.tolist() == [[*tokenizer()("ab")["input_ids"], 0]]


def tokenizer_with_another_end(folder: Path) -> Path:
    """Copy a model, and name an end-of-text token that it does not have."""
    shutil.copytree(saved("qwen2_moe"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<end>"}))
    return folder


def test_refusals(tmp_path: Path) -> None:
    text = ["--text", str(home() / "text")]
    assert "only a run has held-out text" in refused("load", saved("unipool"))
    assert refused("load", f"{tmp_path}/nothing", *text) == f"{tmp_path}/nothing: no such folder"
    assert "has no complete checkpoint" in refused("load", str(tmp_path), *text)
    assert "no folder" in refused("load", saved("unipool"), "--out", str(tmp_path / "no" / "a.png"))
    assert "layer 3 has no router" in refused("randomize", saved("unipool"), *text, "--layers", "3")
    broken: dict[str, Any] = json.loads((Path(saved("qwen2_moe")) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(broken))
    assert "is not a complete model" in refused("load", str(tmp_path), *text)
    odd = tokenizer_with_another_end(tmp_path / "odd")
    assert "tokenizer_config.json: eos_token is '<end>', which is not in" in refused("load", str(odd), *text)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "models of type llama are not supported" in refused("load", str(tmp_path), *text)


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no such folder, and not available" in refused("load", "no/such-model", "--text", str(home() / "text"))


def test_data_of_another_tokenizer() -> None:
    """Data prepared with another tokenizer are refused, because their ids have another meaning."""
    loaded = load(run()[0], own_text=True).loaded
    other = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(["another text\n" * 20], VOCAB))
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        read_text(replace(loaded, tokenizer=other), None, 100)
