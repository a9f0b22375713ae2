"""Which modules may import which (docs/design.md): trainer -> {router, pool}; heavy libraries in one file each."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import TIME_LIMIT
from trainer.data.packing import SplitWriter
from trainer.export.folder import MODEL_FILES

ROOT = Path(__file__).parent.parent
OURS = {"trainer", "router", "pool"}
EXPORTED = {ROOT / "trainer" / "export" / "model_files" / file for file in MODEL_FILES}


def imports(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # The exported model's files know each other by their places in the same folder.
            assert node.level == 0 or (node.level == 1 and path in EXPORTED), f"{path}: relative import"
            found.add("." * node.level + str(node.module))
    return found


def importers(module: str) -> set[str]:
    """Files of the product that import `module` or something in it."""
    return {
        str(path.relative_to(ROOT))
        for package in OURS
        for path in (ROOT / package).rglob("*.py")
        if any(name == module or name.startswith(module + ".") for name in imports(path))
    }


@pytest.mark.parametrize(("package", "allowed"), [("router", {"router"}), ("pool", {"pool"}), ("trainer", OURS)])
def test_direction(package: str, allowed: set[str]) -> None:
    for path in (ROOT / package).rglob("*.py"):
        ours = {name.split(".")[0] for name in imports(path)} & OURS
        assert ours <= allowed, f"{path} imports {ours - allowed}"


ROOMS = (
    *("common", "config", "data", "model", "cluster", "telemetry", "engine", "checkpoint", "planning", "bench"),
    *("doctor", "export", "serve", "train", "evaluate", "probe", "importing", "view", "sweep", "scaling_law"),
    *("cli", "__main__"),
)
"""The rooms of trainer/, from the lowest up: a room imports from itself and from lower ones."""


def test_rooms_import_only_downwards() -> None:
    trainer = ROOT / "trainer"
    assert {path.stem for path in trainer.iterdir() if not path.name.startswith("__")} == set(ROOMS) - {"__main__"}
    for path in trainer.rglob("*.py"):
        room = path.relative_to(trainer).parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "trainer" and len(parts) > 1 and room in ROOMS:
                assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{path} imports {name} from a room above"


def test_no_room_is_crowded() -> None:
    for folder in {path.parent for package in ("trainer", "pool") for path in (ROOT / package).rglob("*.py")}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 12, f"{folder} has {len(files)} files"


def test_no_private_name_is_imported() -> None:
    for package in OURS:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
                    private = [alias.name for alias in node.names if alias.name.startswith("_")]
                    assert private in ([], ["__version__"]), f"{path} imports {private}"


def test_libraries_with_one_home() -> None:
    assert importers("deepspeed") == {"trainer/engine/role_engine.py"}
    assert importers("prometheus_client") == {"trainer/telemetry/prometheus.py", "trainer/serve/metrics.py"}
    assert importers("fastapi") == {"trainer/serve/application.py"}
    assert importers("uvicorn") == {"trainer/serve/server.py"}
    assert importers("safetensors") == {"trainer/export/folder.py", "trainer/export/write.py"}
    exports = {str(path.relative_to(ROOT)) for path in EXPORTED}
    own = ("exported_model", "saved_run", "loaded_model", "write", "generate")
    exports |= {f"trainer/export/{name}.py" for name in own}
    exports |= {f"trainer/serve/{name}.py" for name in ("engine", "sampling")}
    # Probes read other people's models through it, in one adapter.
    assert importers("transformers") == exports | {"trainer/probe/adapters.py", "trainer/importing/families.py"}
    assert importers("wandb") == {"trainer/engine/weights_and_biases.py"}
    assert importers("lm_eval") == {"trainer/evaluate/tasks.py"}
    assert importers("torch.distributed") == {
        "trainer/cluster/process_groups.py",
        "trainer/cluster/rendezvous.py",
    }


def test_the_exported_model_stands_alone() -> None:
    """Its files go to people who have torch and transformers, and nothing of ours."""
    own = {f".{path.stem}" for path in EXPORTED}
    for path in EXPORTED:
        foreign = imports(path) - own
        assert {name.split(".")[0] for name in foreign} <= sys.stdlib_module_names | {"torch", "transformers"}, path


def test_router_and_pool_know_no_collectives() -> None:
    """router/ is pure; only the wire uses process groups, which it is given."""
    wires = {ROOT / "pool" / "wire" / f"{transport}.py" for transport in ("host", "device", "nccl")}
    for package in ("router", "pool"):
        for path in (ROOT / package).rglob("*.py"):
            uses_groups = bool(re.search(r"\.(send|recv|allreduce|alltoall\w*|broadcast)\b", path.read_text()))
            assert uses_groups == (path in wires), path


def test_no_file_is_too_long() -> None:
    for package in (*OURS, "tests"):
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path


def test_start_up_path_is_light() -> None:
    """`--help`, a recipe's check and `import trainer` load nothing heavy; `watch` and `load_run` no torch."""
    code = (
        "import sys; from trainer.cli import cli; from trainer.config.recipe import load_recipe;"
        "load_recipe('quickstart');"
        "print(*{'torch', 'deepspeed', 'datasets', 'transformers', 'lm_eval', 'matplotlib', 'numpy', 'rich'}"
        " & set(sys.modules)); import trainer.view.watch; from trainer import load_run;"
        "print(*{'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=TIME_LIMIT
    )
    assert done.stdout.split() == []


def test_the_engine_leaves_the_compiler_on(tmp_path: Path) -> None:
    """It is away while DeepSpeed is imported; what is compiled afterwards, such as SwiGLU on a GPU, is compiled.

    Before that a rank on the CPU loads neither it nor what else would take seconds until its first step.
    """
    writer = SplitWriter(tmp_path / "split.arrow", seq_len=2, vocab=9)
    writer.add(np.arange(9), text_bytes=9)
    writer.close()
    code = (
        "import os, sys; os.environ['DS_ACCELERATOR'] = 'cpu'; import torch, trainer.engine.role_engine as engine\n"
        "from pathlib import Path; from trainer.data.packing import SplitRows; from trainer.train import loop, start\n"
        "start.use_deterministic_kernels(); engine._import_deepspeed()\n"
        f"print(SplitRows(Path({str(tmp_path)!r}) / 'split.arrow', 9)[[1]])\n"
        "print(torch.are_deterministic_algorithms_enabled())\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'datasets', 'pandas', 'transformers', 'matplotlib', 'rich'}\n"
        "print(*heavy & set(sys.modules)); calls = []\n"
        "torch.compile(torch.nn.functional.silu, backend=lambda graph, _: calls.append(1) or graph)(torch.ones(2))\n"
        "print(len(calls))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=TIME_LIMIT
    )
    assert done.stdout.splitlines()[-4:] == ["[[2 3 4]]", "True", "", "1"]
