"""Credentials reach neither a recipe's copies nor a line that is shown."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.trainer.job import ROOT
from trainer import cli
from trainer.cluster import fault_watch as faults
from trainer.common.credentials import redacted
from trainer.common.errors import UserError
from trainer.config.recipe import load_recipe

SECRET = "Zq7-tR55xWv0"
URL = f"https://alice:{SECRET}@example.com/corpus.jsonl"


@pytest.mark.parametrize(
    "text",
    [
        URL,
        f"s3://{SECRET}@bucket/corpus",
        f"https://alice:p@{SECRET}@example.com",
        f"https://example.com/x?part=1&X-Amz-Signature={SECRET}",
        f"https://example.com/x?access_token={SECRET}&part=1",
        f"hub:org/name:hf_{SECRET.replace('-', '') * 2}",
        f"hub:{SECRET}",
    ],
)
def test_what_is_hidden(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if text == f"hub:{SECRET}":  # as by --set data.source=hub:$HF_TOKEN
        monkeypatch.setenv("HF_TOKEN", SECRET)
    assert SECRET.replace("-", "") not in redacted(f"in '{text}', line 3").replace("-", "")


@pytest.mark.parametrize(
    "text",
    [
        "hub:org/name:config",
        "https://example.com/corpus.jsonl",
        "/data/user@host/*.parquet",
        "me@example.com, s3://b/c",
    ],
)
def test_what_is_not_hidden(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_TOKEN", "org")  # a switch, not a secret
    assert redacted(text) == text


@pytest.mark.parametrize("key", ["data.source", "data.tokenizer", "run.dir", "train.init_from", "parallel.hardware"])
def test_a_recipe_with_a_credential_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"recipe quickstart: {key}: contains a credential") as refused:
        load_recipe("quickstart", [f"{key}={URL}"])
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        (f"data: {{source: ['{URL}']}}", []),
        (f"data: {{source: {URL}", []),
        ("data: {}", [f"data.{URL}"]),
        (None, []),
    ],
    ids=["of another type", "not YAML", "no key", "in the recipe's name"],
)
def test_no_error_line_repeats_a_credential(
    recipe: str | None,
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe or "")
    name = URL if recipe is None else str(path)
    monkeypatch.setattr(sys, "argv", ["unipool", "prepare", name, *(f"--set={text}" for text in overrides)])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert len(shown.splitlines()) == 1
    assert SECRET not in shown


def test_a_traceback_does_not_repeat_a_credential(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    faults._say(f"ConnectionError: {URL}: key {SECRET} is wrong")
    assert capsys.readouterr().err == "ConnectionError: https://***@example.com/corpus.jsonl: key *** is wrong\n"


def test_what_is_deployed_holds_no_credential() -> None:
    files = [
        path for folder in ("deploy", "ds_configs", "trainer/config/recipes") for path in (ROOT / folder).rglob("*")
    ]
    texts = {path: path.read_text() for path in files if path.suffix not in {".pyc", ".png"} and path.is_file()}
    assert len(texts) > 10
    assert [path for path, text in texts.items() if redacted(text) != text] == []
