"""Damaged exports, exports of other models, and exports of an older version."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.export.test_export import VOCAB, exported, invoke, refused, some_tokens, trained
from tests.trainer.fuzzing import fuzz
from trainer.common.errors import UserError
from trainer.export.exported_model import load_export
from trainer.export.model_files.modeling_unipool import UniPoolForCausalLM


def change(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_damaged_exports_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert invoke("export", str(trained("unipool")[0]), str(whole), "--shard-size", "40KB").exit_code == 0

    def line_after(damage: Callable[[Path], object]) -> str:
        broken = tmp_path / "broken"
        shutil.copytree(whole, broken)
        damage(broken)
        line = refused("generate", str(broken), "--prompt", "x")
        assert line == refused("eval", str(broken), "--text", str(whole / "config.json"))
        assert str(broken) in refused("probe", "reuse", str(broken), "--text", str(whole / "config.json"))
        shutil.rmtree(broken)
        assert str(broken) in line
        return line

    config = "config.json"
    shard = next(whole.glob("model-00001*")).name
    assert "JSONDecodeError" in line_after(lambda folder: (folder / config).write_text("{"))
    assert "must hold a JSON object" in line_after(lambda folder: (folder / config).write_text("[]"))
    assert "type llama" in line_after(lambda folder: change(folder / config, model_type="llama"))
    assert "export_version in its config.json is 9" in line_after(
        lambda folder: change(folder / config, export_version=9)
    )
    assert "hidden_size is -1" in line_after(lambda folder: change(folder / config, hidden_size=-1))
    assert "head_dim" in line_after(lambda folder: change(folder / config, head_dim=3))
    assert "multiple of num_key_value_heads" in line_after(lambda f: change(f / config, num_attention_heads=5))
    assert "is missing in the files" in line_after(lambda folder: change(folder / config, num_hidden_layers=4))
    assert "missing by its config.json" in line_after(lambda folder: change(folder / config, num_hidden_layers=2))
    assert "fewer tensors than" in line_after(lambda folder: change(folder / config, num_experts=10**9))
    assert "by its config.json" in line_after(lambda folder: change(folder / config, vocab_size=VOCAB + 1))
    assert "is missing in the files" in line_after(lambda folder: (folder / shard).unlink())
    assert f"{shard}: damaged file" in line_after(lambda folder: (folder / shard).write_bytes(b"no weights"))
    assert "tokenizer.json: cannot be read" in line_after(lambda folder: (folder / "tokenizer.json").write_text("{}"))
    for name in ("eos_token", "bos_token"):
        line = line_after(lambda folder, name=name: change(folder / "tokenizer_config.json", **{name: "x!"}))
        assert f"{name} is 'x!', which is not in tokenizer.json" in line
    assert "eos_token_id" in line_after(lambda folder: change(folder / "generation_config.json", eos_token_id="x"))


def test_a_quantised_export_names_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would fetch the kernel of attention that its config.json names, and run it."""
    folder = shutil.copytree(exported("unipool"), tmp_path / "quantised")
    quantised = {"quant_method": "torchao", "quant_type": {}}
    change(folder / "config.json", attn_implementation="some/kernel", dtype="bfloat16", quantization_config=quantised)
    configs: list[Any] = []

    def fail(*_: Any, config: Any = None, **__: Any) -> None:
        configs.append(config)
        raise ValueError

    monkeypatch.setattr(UniPoolForCausalLM, "from_pretrained", fail)
    with pytest.raises(UserError, match="the quantised model cannot be loaded"):
        load_export(folder)
    (config,) = configs
    assert config._attn_implementation is None
    assert (config.dtype, config.quantization_config) == (torch.bfloat16, quantised)


@fuzz(25)
@given(
    file=st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json"]),
    place=st.integers(0, 99),
    value=st.one_of(
        st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=3), st.lists(st.none(), max_size=1)
    ),
)
def test_any_value_in_json_works_or_is_refused_in_one_line(file: str, place: int, value: Any) -> None:
    """With any value anywhere, the model generates text or a UserError says why not."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "export"
        shutil.copytree(exported("unipool"), folder)
        stored = json.loads((folder / file).read_text())
        stored[sorted(stored)[place % len(stored)]] = value
        (folder / file).write_text(json.dumps(stored))
        done = invoke("generate", str(folder), "--prompt", "def", "--tokens", "2")
    error = done.exception
    assert error is None or (isinstance(error, UserError) and "\n" not in str(error) and str(folder) in str(error)), (
        done
    )


def test_exports_of_an_older_version_work_and_say_how_to_make_them_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    shutil.copytree(exported("unipool"), old)
    config = json.loads((old / "config.json").read_text())
    del config["export_version"]
    (old / "config.json").write_text(json.dumps(config))
    model, _ = load_export(old)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "unipool export RUN --format hf DIR" in line and str(old) in line
    new, _ = load_export(exported("unipool"))
    assert capsys.readouterr().err == ""
    assert torch.equal(model(some_tokens()).logits, new(some_tokens()).logits)
