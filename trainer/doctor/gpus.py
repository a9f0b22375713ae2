"""Checks of GPUs: what torch can use, whether a recipe fits, and what nvidia-smi says of them."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.cluster.devices import Devices, check_machine
from trainer.common.errors import UserError
from trainer.common.format import plural, size
from trainer.common.gpus import GpuFacts, check_queues, gpus_on_machine, look, why_none
from trainer.common.machine import usable_memory
from trainer.config.recipe import Recipe
from trainer.doctor.findings import Finding, error, ok, warning
from trainer.planning.fit import FILLED, memory_warnings
from trainer.planning.memory import estimate_memory
from trainer.planning.schedule import make_schedule

_SMI = "nvidia-smi"
_SMI_SECONDS = 20.0
_FIELDS = (
    *("index", "driver_version", "memory.total", "memory.used", "mig.mode.current", "ecc.mode.current"),
    "ecc.errors.uncorrected.volatile.total",
)
_PROCESS = 450 * 10**6
"""Assumed: bytes of a rank's process with torch and deepspeed loaded, which the estimate leaves out."""
_BUSY_MIB = 1024
"""Memory in use of a GPU from which on somebody else computes there: a driver's own takes some hundred MiB."""


def torch_and_gpus(recipe: Recipe | None) -> Iterator[Finding]:
    """What torch is built for and which GPUs it can use; with a recipe, whether its ranks fit on them."""
    import torch

    facts = look()
    built = "without CUDA"
    if facts.built_for is not None:
        nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
        built = f"for CUDA {facts.built_for}, NCCL {'.'.join(map(str, nccl)) or 'is missing'}"
    yield ok("torch", f"{facts.torch}, built {built}")
    properties = [torch.cuda.get_device_properties(number) for number in range(len(facts.gpus))]
    yield from _gpus(facts, properties, recipe is not None and recipe.parallel.device == "cpu")
    if facts.gpus:
        yield from _compiler()
    try:
        check_queues()
    except UserError as problem:
        yield Finding("environment", "error", str(problem))
    if recipe is not None:
        yield from _recipe(recipe, facts, [properties.total_memory for properties in properties])


def _gpus(facts: GpuFacts, properties: Sequence[Any], unwanted: bool) -> Iterator[Finding]:
    if not facts.gpus:
        why = why_none(facts)
        if facts.on_machine and not unwanted:
            mend = "see docs/installation.md, GPUs; with parallel.device=cpu they are not wanted"
            yield error("GPUs", f"torch can use none of {facts.on_machine}: {why}", mend)
        else:
            yield ok("GPUs", f"none, so ranks compute on the CPU ({why})")
        return
    kinds = Counter(f"{p.name}, compute capability {p.major}.{p.minor}, {size(p.total_memory)}" for p in properties)
    yield ok("GPUs", "; ".join(f"{number} x {kind}" for kind, number in kinds.items()))


def _compiler() -> Iterator[Finding]:
    """Triton needs a C compiler and Python's headers, for torch.compile."""
    compiler = next(filter(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc"))), None)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    absent = [name for name, there in (("C compiler", compiler), ("Python.h", headers.exists())) if not there]
    if absent:
        mend = "install gcc and python3-dev, or set train.compile=false"
        yield warning("compiler", f"no {' and no '.join(absent)} for torch.compile", mend)
    else:
        yield ok("compiler", f"{compiler}, and Python's headers")


def _recipe(recipe: Recipe, facts: GpuFacts, memory: Sequence[int]) -> Iterator[Finding]:
    try:
        devices = check_machine(recipe.grid, recipe.parallel.device, facts)
    except UserError as problem:
        several = "or start it on several machines (docs/operations/hostfile.md)"
        yield error("ranks", str(problem), several if facts.gpus else "see GPUs")
        return
    line = devices.lines[0].removeprefix("devices: ")
    yield ok("ranks", f"{plural(recipe.grid.world_size, 'rank')} of {recipe.run.dir} on {line}")
    yield from _fit(recipe, devices, memory)


def _fit(recipe: Recipe, devices: Devices, memory: Sequence[int]) -> Iterator[Finding]:
    """Whether the memory that `plan` estimates is there: on every GPU, or on the machine if ranks use the CPU."""
    lanes = make_schedule(recipe).lanes
    needs = [part for part in estimate_memory(recipe, lanes) for _ in range(part.ranks)]
    usable = usable_memory()
    on_gpus: Counter[int] = Counter()
    on_host = _PROCESS * len(needs)
    for need, ordinal in zip(needs, devices.ordinals, strict=True):
        if ordinal is None:
            on_host += need.tensors
        else:
            on_gpus[ordinal] += need.total
            on_host += need.host
    found = [f"{size(max(on_gpus.values()))} of {size(min(memory))} on a GPU"] if on_gpus else []
    found.append(f"{size(on_host)} of {size(usable)} on the host")
    text = f"by the estimate of unipool plan: {', '.join(found)}"
    short = [ordinal for ordinal, need in on_gpus.items() if need > FILLED * memory[ordinal]]
    if short:
        lines = memory_warnings(recipe, lanes, min(memory), "a GPU")
        yield error("fit", text, lines[0] if lines else "give each rank a GPU of its own, or lower train.micro_batch")
    elif on_host > FILLED * usable:
        yield error("fit", text, "lower train.micro_batch, or use a machine with more memory")
    else:
        yield ok("fit", text)


def state(recipe: Recipe | None) -> Iterator[Finding]:
    """What nvidia-smi says: the driver, who uses the GPUs, instances, errors of the memory, links."""
    if not gpus_on_machine():
        return
    if shutil.which(_SMI) is None:
        yield warning("driver", f"{_SMI} is not here, so GPUs in use, ECC and links are not known", "install it")
        return
    gpus = [dict(zip(_FIELDS, row, strict=True)) for row in _table(f"--query-gpu={','.join(_FIELDS)}")]
    yield ok("driver", f"NVIDIA {', '.join(sorted({gpu['driver_version'] for gpu in gpus}))}")
    yield from _users(gpus)
    yield from _instances_and_errors(gpus)
    if len(gpus) > 1:
        yield from _links(_say("topo", "-m"))


def _users(gpus: Sequence[dict[str, str]]) -> Iterator[Finding]:
    busy = [gpu for gpu in gpus if gpu["memory.used"].isdecimal() and int(gpu["memory.used"]) > _BUSY_MIB]
    if not busy:
        yield ok("GPUs in use", "none by others")
        return
    held = ", ".join(f"{size(int(gpu['memory.used']) << 20)} of GPU {gpu['index']}" for gpu in busy)
    processes = ", ".join(sorted({pid for (pid,) in _table("--query-compute-apps=pid")}))
    who = f" by process {processes}" if processes else ", by processes that cannot be seen from here"
    yield warning("GPUs in use", f"{held}{who}", "end them, or choose others with CUDA_VISIBLE_DEVICES")


def _instances_and_errors(gpus: Sequence[dict[str, str]]) -> Iterator[Finding]:
    def where(field: str, value: str) -> str:
        return ", ".join(gpu["index"] for gpu in gpus if gpu[field] == value)

    if divided := where("mig.mode.current", "Enabled"):
        yield ok("MIG", f"on GPU {divided}, whose instances count as one GPU")
    wrong = ", ".join(gpu["index"] for gpu in gpus if (gpu[_FIELDS[-1]].isdecimal() and int(gpu[_FIELDS[-1]])))
    if wrong:
        yield error("ECC", f"errors that could not be corrected on GPU {wrong}", "drain the machine and reset the GPU")
    elif off := where("ecc.mode.current", "Disabled"):
        yield warning("ECC", f"off on GPU {off}: errors of its memory go unnoticed", f"{_SMI} -e 1, then restart")
    elif where("ecc.mode.current", "Enabled"):
        yield ok("ECC", "on, no errors that could not be corrected")


def _links(topology: str) -> Iterator[Finding]:
    """The links between GPUs, from the matrix of `nvidia-smi topo -m`."""
    rows = [line.split() for line in re.sub(r"\x1b\[[\d;]*m", "", topology).splitlines()]
    matrix = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    kinds = Counter(row[1 + other] for place, row in enumerate(matrix) for other in range(place))
    if not kinds:
        yield ok("links", "not known")
        return
    counted = ", ".join(f"{kind} between {plural(pairs, 'pair')}" for kind, pairs in kinds.items())
    if all(kind.startswith("NV") for kind in kinds):
        yield ok("links", f"NVLink ({counted})")
    else:
        yield ok("links", f"{counted} of GPUs: not all by NVLink, so tokens and gradients take PCIe")


def _say(*arguments: str) -> str:
    done = subprocess.run([_SMI, *arguments], capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    if done.returncode:
        text = (done.stdout + done.stderr).strip()
        raise UserError(f"{_SMI} {' '.join(arguments)}: {text.splitlines()[0] if text else 'failed'}")
    return done.stdout


def _table(query: str) -> list[list[str]]:
    said = _say(query, "--format=csv,noheader,nounits")
    with suppress(csv.Error):
        return [[cell.strip() for cell in row] for row in csv.reader(said.splitlines()) if row]
    return []
