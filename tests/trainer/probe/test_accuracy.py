"""Task accuracy with random experts, on handmade models: the answer to "... a" is yes, and to "... b" it is no.

In layer 0 the router sends a to expert 0, which makes the model say yes, and b to expert 1, which makes it say no. What
layer 1 chooses changes nothing.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.local_tasks import write_own
from tests.tools import need_package
from tests.trainer.probe.tiny_models import adapted, fresh
from trainer.cli import cli
from trainer.common.errors import UserError
from trainer.evaluate.scores import Score, Scores, TaskScores
from trainer.probe.accuracy import Accuracies, accuracy
from trainer.probe.adapters import MoEModel
from trainer.probe.randomize import randomize
from trainer.probe.text import Text

HARNESS = "pip install -c constraints.txt -r requirements-eval.txt"
FILLERS = [f"w{number}" for number in range(40)]
WORDS = ["end", "a", "b", "yes", "no", *FILLERS]
END, A, B, YES, NO = range(5)
SHAPE = {"num_hidden_layers": 2, "num_experts_per_tok": 1, "vocab_size": len(WORDS), "eos_token_id": END}


@cache
def made(name: str) -> Any:
    """Return a "mixtral", whose layers have their own experts, or a "unipool", whose layers share them."""
    model = fresh(name, **SHAPE, **{"num_experts" if name == "unipool" else "num_local_experts": 2})
    for key, parameter in model.named_parameters():
        parameter.data.fill_(1 if "norm" in key or "sigma" in key else 0)
    embed, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embed[A, 0] = embed[B, 1] = head[YES, 2] = head[NO, 3] = 1
    embed[END, 4] = 1
    embed[[YES, NO, *range(5, len(WORDS))], 5] = 1
    for expert in range(2):
        own = model.model.experts if name == "unipool" else model.model.layers[0].mlp.experts
        own.gate_up_proj.data[expert, [0, own.gate_up_proj.shape[1] // 2], :2] = 1
        own.down_proj.data[expert, 2 + expert, 0] = 1
    first, second = (block.router if name == "unipool" else block.mlp.gate for block in model.model.layers)
    first.weight.data[0, 0] = first.weight.data[1, 1] = 1
    second.weight.data[:, :2] = -1  # gate values are 0 in the UniPool model; in the other, its experts output 0
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="end"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="end")


def docs(letters: str) -> list[dict[str, Any]]:
    """Return a question per letter; no two are the same."""
    choices = [" yes", " no"]
    return [{"q": f"{w} {x}", "a": choices, "right": "ab".index(x)} for w, x in zip(FILLERS, letters, strict=False)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with models, a text of only b, and tasks."""
    folder = tmp_path_factory.mktemp("accuracy")
    for name in ("mixtral", "unipool"):
        made(name).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    (folder / "b.txt").write_text("b " * 100)
    write_own(folder, "mixed", docs("aaab"))
    write_own(folder, "same", docs("bbbb"))
    write_own(folder, "many", docs("ab" * 20))
    write_own(folder, "normed", docs("ab"), metrics=["acc_norm"])
    return folder


def arguments(home: Path, model: str, *more: str) -> list[str]:
    return ["probe", "randomize", str(home / model), "--text", str(home / "b.txt"), "--layers", "all", *more]


def probed(home: Path, model: str, *more: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli, arguments(home, model, "--json", *more))
    assert done.exit_code == 0, (done.output, done.exception)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(*given: str) -> str:
    error = CliRunner().invoke(cli, given).exception
    assert isinstance(error, UserError), error
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize("name", ["mixtral", "unipool"])
def test_a_layer_with_a_single_expert(home: Path, name: str, tmp_path: Path) -> None:
    """The text's most used expert is that of b, so only questions that end in a are lost, and none by layer 1."""
    need_package("lm_eval", HARNESS)
    one = ("--over", "matched", "--matched", "1", "--draws", "2")
    tasks = ("--tasks", "mixed,same", "--include-path", str(home))
    found = probed(home, name, *one, *tasks, "--csv", str(tmp_path / "a.csv"), "--out", str(tmp_path / "a.png"))
    drops = found["accuracy"]
    assert drops["learned"]["mean"]["acc"] == 1
    first, second = drops["layers"]
    lost, kept = {"mean": 0.625, "tasks": {"mixed": 0.25, "same": 1}}, {"mean": 1, "tasks": {"mixed": 1, "same": 1}}
    assert first == {"layer": 0, "over": "matched", "accuracies": [lost, lost], "drop": 37.5, "spread": 0}
    assert second == {"layer": 1, "over": "matched", "accuracies": [kept, kept], "drop": 0, "spread": 0}
    (mean,) = drops["means"]
    assert (mean["drop"], mean["spread"]) == (18.75, 0)
    assert {task: drop["drop"] for task, drop in mean["tasks"].items()} == {"mixed": 37.5, "same": 0}
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [(row["layer"], float(row["drop"]), float(row["accuracy:mixed"])) for row in rows] == [
        *(("0", 37.5, 0.25), ("0", 37.5, 0.25)),
        *(("1", 0, 1), ("1", 0, 1)),
    ]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    alone = probed(home, name, *one)
    assert alone.pop("accuracy") is None
    assert alone == {key: value for key, value in found.items() if key != "accuracy"}


@pytest.mark.parametrize(("name", "over"), [("mixtral", "layer"), ("unipool", "pool")])
def test_random_experts_answer_at_random(home: Path, name: str, over: str) -> None:
    """With two experts, half of the questions are lost, within five standard deviations of a binomial."""
    need_package("lm_eval", HARNESS)
    tasks = ("--tasks", "many", "--include-path", str(home))
    found = probed(home, name, "--over", over, *tasks, "--layers", "0", "--batch-size", "16")["accuracy"]
    values = [draw["mean"] for draw in found["layers"][0]["accuracies"]]
    assert all((40 * value) % 1 == pytest.approx(0, abs=1e-9) for value in values) and len(set(values)) > 1
    assert abs(sum(values) * 40 - 60) < 5 * (120 / 4) ** 0.5
    assert found["means"][0]["drop"] == pytest.approx(100 - 100 * statistics.fmean(values))
    assert found["means"][0]["spread"] == pytest.approx(100 * statistics.stdev(values))


def test_the_learned_routing_has_the_scores_of_eval(home: Path) -> None:
    need_package("lm_eval", HARNESS)
    tasks = ("--tasks", "many", "--include-path", str(home), "--limit", "7")
    found = probed(home, "unipool", "--over", "pool", *tasks, "--layers", "1", "--draws", "1")["accuracy"]["learned"]
    done = CliRunner().invoke(cli, ["eval", str(home / "unipool"), *tasks, "--json"])
    assert json.loads(done.stdout)["tasks"] == found
    assert (found["tasks"][0]["examples"], found["limit"], found["precision"]) == (7, 7, "fp32")


def test_tables(home: Path) -> None:
    need_package("lm_eval", HARNESS)
    one = ("--over", "matched", "--matched", "1", "--draws", "2", "--tasks", "mixed,same", "--include-path", str(home))
    lines = CliRunner().invoke(cli, arguments(home, "mixtral", *one)).stdout.splitlines()
    cells = [line.split() for line in lines]
    assert ["0", "37.50", "±", "0.00"] in cells and ["mean", "18.75", "±", "0.00"] in cells
    assert ["mixed", "4", "1.0000", "±", "0.0000", "37.50", "±", "0.00"] in cells


def test_bad_tasks_are_refused_before_the_work(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks are checked even before the model is looked for."""
    need_package("lm_eval", HARNESS)
    # The harness's own 14,000 tasks are not read.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "harness" / "manager.py"))
    gone = arguments(home, "gone", "--include-path", str(home), "--tasks")
    assert "--tasks mixt: no such task; did you mean mixed?" in refused(*gone, "same,mixt")
    assert "--tasks: no task has an accuracy" in refused(*gone, "normed")
    assert "gone: no such folder" in refused(*gone, "same")


def test_options_that_need_tasks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = arguments(home, "gone")
    assert "--limit 3: requires --tasks" in refused(*gone, "--limit", "3")
    assert "names no task" in refused(*gone, "--tasks", ",")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "trainer.evaluate.tasks", raising=False)
    assert HARNESS in refused(*gone, "--tasks", "piqa")


def scored(**by_task: float | None) -> Scores:
    """Return scores as the harness would; None stands for a task without an accuracy."""
    tasks = [
        TaskScores(task, 4, 0, None, {"x": Score(1, None)} if value is None else {"acc": Score(value, 0.1)}, part=False)
        for task, value in by_task.items()
    ]
    values = [value for value in by_task.values() if value is not None]
    mean = {"acc": statistics.fmean(values), "tasks": len(values)} if values else {}
    return Scores(tasks, mean, None, 2, "fp32", "0")


class Examiner:
    """Scores without the harness, with one forward pass per question."""

    def __init__(self, model: MoEModel, letters: str):
        self._model, self._letters = model, letters
        self.brief: list[bool] = []

    @torch.no_grad()
    def __call__(self, brief: bool) -> Scores:
        self.brief.append(brief)
        right = []
        for letter in self._letters:
            logits_V = self._model.model(torch.tensor([[A if letter == "a" else B]])).logits[0, -1]
            right.append(bool(logits_V[YES] > logits_V[NO]) == (letter == "a"))
        return scored(questions=sum(right) / len(right), other=None)


@pytest.mark.parametrize("name", ["mixtral", "unipool"])
def test_losses_are_the_same_with_tasks(name: str) -> None:
    """The draws of a layer do not depend on the other layers, on the tasks, or on the length of the text."""
    model = adapted(made(name), name)
    text = Text("b", torch.full((3, 9), B))
    overs = ["pool" if name == "unipool" else "layer", "matched"]
    examiner = Examiner(model, "aab")
    found = randomize(model, text, model.layers, overs, matched=1, score=examiner)
    assert examiner.brief == [False] + [True] * 12
    alone = randomize(model, text, model.layers, overs, matched=1)
    assert (alone.loss, alone.layers, alone.means) == (found.loss, found.layers, found.means)
    assert found.accuracy and alone.accuracy is None
    random, matched, *harmless = found.accuracy.layers
    assert {a.mean for a in random.accuracies} <= {0, 1 / 3, 2 / 3, 1} and random.spread > 0
    assert [a.tasks for a in matched.accuracies] == [{"questions": 1 / 3}] * 3
    assert matched.drop == pytest.approx(200 / 3) and [d.drop for d in harmless] == [0, 0]
    assert any("Tasks without an accuracy are left out: other." in note for note in found.notes())
    assert any("2 requests were longer" in note for note in found.notes())
    longer = Text("b", torch.full((7, 9), B))
    other = randomize(model, longer, model.layers[:1], overs, matched=1, score=Examiner(model, "aab"))
    assert other.accuracy and other.accuracy.layers == found.accuracy.layers[:2]


def test_tasks_without_an_accuracy_are_refused() -> None:
    model = adapted(made("unipool"))
    with pytest.raises(UserError, match="--tasks: no task has an accuracy"):
        randomize(model, Text("b", torch.full((1, 9), B)), model.layers, score=lambda brief: scored(other=None))


def test_means_and_spreads_of_drops() -> None:
    """Means and spreads over draws, and over layers and draws, of two tasks, two layers and three draws."""
    by_layer = [[(0.5, 0.25), (0.5, 0.5), (0.25, 0.0)], [(0.75, 0.5), (1.0, 0.5), (0.5, 0.75)]]

    def taken(draws: Sequence[tuple[float, float]]) -> list[Accuracies]:
        return [Accuracies((x + y) / 2, {"x": x, "y": y}) for x, y in draws]

    found = accuracy(scored(x=0.75, y=0.5), [(4, "pool", taken(by_layer[0])), (5, "pool", taken(by_layer[1]))])
    assert [d.drop for d in found.layers] == pytest.approx([100 * (0.625 - 2 / 6), 100 * (0.625 - 4 / 6)])
    assert found.layers[0].spread == pytest.approx(100 * statistics.stdev([0.375, 0.5, 0.125]))
    (mean,) = found.means
    assert (mean.drop, mean.spread) == pytest.approx((12.5, 100 * statistics.stdev([0.5, 0.625, 0.375])))
    x, y = mean.tasks["x"], mean.tasks["y"]
    assert (x.drop, x.spread) == pytest.approx((100 * (0.75 - 3.5 / 6), 100 * statistics.stdev([0.625, 0.75, 0.375])))
    assert (y.drop, y.spread) == pytest.approx((100 * (0.5 - 2.5 / 6), 100 * statistics.stdev([0.375, 0.5, 0.375])))
    assert [row["drop"] for row in found.rows()] == pytest.approx([25, 12.5, 50, 0, -12.5, 0])
    columns = ("accuracy", "accuracy_baseline", "drop", "accuracy:x", "accuracy:y")
    assert {tuple(row) for row in found.rows()} == {(*columns, "accuracy_baseline:x", "accuracy_baseline:y")}
