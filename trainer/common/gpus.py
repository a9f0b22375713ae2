"""The GPUs of this process, and why it has none.

`look` is the only function that asks torch and the system. Everything else works on what it returns.
"""

from __future__ import annotations

import os
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.common.errors import UserError, short_line

VISIBLE = "CUDA_VISIBLE_DEVICES"

_GRANTED = "NVIDIA_VISIBLE_DEVICES"
"""Environment variable from which NVIDIA's container runtime takes the GPUs of a container."""

_DEVICES = Path("/dev")

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables that configure torch's allocator, the newer one first."""

_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Environment variable with the number of a process's hardware queues: 1 to 32, by default 8."""

_FEWEST_QUEUES, _MOST_QUEUES = 8, 32


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process can use.

    Attributes:
        uuid: What identifies it on any machine.
        place: The boot of its machine and its address on the PCI bus, by which NCCL tells GPUs apart: instances of one
            GPU (MIG) share it.
    """

    name: str
    uuid: str
    place: str

    @property
    def uuid_of_tools(self) -> str:
        """The UUID as NVIDIA's tools write it, such as nvidia-smi and DCGM: "GPU-...", or "MIG-..." of an instance."""
        return f"{'MIG' if ' MIG ' in self.name else 'GPU'}-{self.uuid.removeprefix('GPU-').removeprefix('MIG-')}"


@dataclass(frozen=True)
class GpuFacts:
    """What torch and the system say about GPUs.

    Attributes:
        gpus: The GPUs that torch can use in this process, by ordinal.
        torch: torch's version.
        built_for: The CUDA version that torch is built for, such as "13.0"; None: it is built without CUDA.
        driver: The newest CUDA version that the driver supports, 1000 * major + 10 * minor; 0: there is no driver.
        on_machine: Number of GPUs whose device files this process sees, or that the container was granted, whether or
            not torch can use them.
        visible: The value of CUDA_VISIBLE_DEVICES; None if it is not set.
        message: What torch said when it found no GPU.
    """

    gpus: tuple[Gpu, ...] = ()
    torch: str = ""
    built_for: str | None = None
    driver: int = 0
    on_machine: int = 0
    visible: str | None = None
    message: str = ""


def look() -> GpuFacts:
    """Ask torch and the system. It initialises CUDA, but makes no context on any GPU."""
    import torch

    gpus: tuple[Gpu, ...] = ()
    with warnings.catch_warnings(record=True) as caught:  # torch warns where the driver cannot be initialised
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                torch.cuda.init()
                gpus = tuple(_gpu(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count()))
        except (RuntimeError, AssertionError) as error:
            caught.clear()
            warnings.warn(str(error), stacklevel=1)
    # A build without CUDA has no such function.
    driver_version = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)
    return GpuFacts(
        gpus=gpus,
        torch=torch.__version__,
        built_for=torch.version.cuda,
        driver=driver_version(),
        on_machine=gpus_on_machine(),
        visible=os.environ.get(VISIBLE),
        message=str(caught[0].message) if caught else "",
    )


def _gpu(properties: Any) -> Gpu:
    p = properties
    return Gpu(p.name, str(p.uuid), f"{boot_id()} {p.pci_domain_id:x}:{p.pci_bus_id:x}:{p.pci_device_id:x}")


def boot_id() -> str:
    """Identify the boot of this machine; its host name, where a sandbox does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def gpus_on_machine() -> int:
    """Count the GPUs of this machine, or of this container, whether or not torch can use them. torch is not asked."""
    return _device_files() or _granted() or int((_DEVICES / "dxg").exists())  # dxg: under Windows


def _device_files() -> int:
    return len(list(_DEVICES.glob("nvidia[0-9]*")))


def _granted() -> int:
    """Count the GPUs that Kubernetes' device plugin of NVIDIA names, which a container without its runtime lacks."""
    return sum(name.startswith(("GPU-", "MIG-")) for name in os.environ.get(_GRANTED, "").split(","))


def share_of_gpus(place: int, places: int) -> str | None:
    """Return a CUDA_VISIBLE_DEVICES for one of several jobs that share this machine; None: it has no GPUs to divide.

    Each job gets an equal part of the GPUs that this process may use. With fewer GPUs than jobs, some get the same one.

    Args:
        place: The job's place among all `places`, from 0.
    """
    visible = os.environ.get(VISIBLE)
    gpus = [str(number) for number in range(_device_files())] if visible is None else visible.split(",")
    if not any(gpus):
        return None
    each = max(1, len(gpus) // places)
    first = place % (len(gpus) // each) * each
    return ",".join(gpus[first : first + each])


def set_allocator() -> None:
    """Let torch's allocator grow its segments, unless the user configures it. Call it before torch is imported.

    Tensors of many sizes otherwise leave gaps between them that no other tensor fits into.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def load_kernels_at_start() -> None:
    """Let CUDA load all kernels when it starts, unless the user configures it. Call it before CUDA is initialised.

    By default a kernel is loaded when it is first launched, with the context locked until the GPU has nothing to do. A
    message under way ends when its peer launches its own end, for which a locked context has no time: two ranks that
    exchange messages both ways and load kernels at the same time would wait for each other.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


def use_many_queues() -> None:
    """Let CUDA have as many hardware queues as it can, unless the user configures it. Call it as the function above.

    Streams in excess of them share queues. What waits for a message in a queue then holds up other messages behind it,
    and two ranks that launch messages in different orders would wait for each other.
    """
    os.environ.setdefault(_QUEUES, str(_MOST_QUEUES))


def check_queues() -> None:
    """Check that there are enough hardware queues for messages between GPUs.

    Raises:
        UserError: The environment limits them to fewer than there are streams.
    """
    queues = os.environ.get(_QUEUES, "")
    if queues.isdecimal() and int(queues) < _FEWEST_QUEUES:
        raise UserError(
            f"{_QUEUES}={queues} in the environment: ranks whose GPUs exchange tokens may wait for each other "
            f"with fewer than {_FEWEST_QUEUES} queues: leave it out, or set parallel.wire=gloo"
        )


def why_none(facts: GpuFacts) -> str:
    """Say in a few words why torch can use no GPU."""
    if facts.built_for is None:
        return f"torch {facts.torch} is built without CUDA"
    if facts.visible is not None and facts.visible.split(",")[0].strip() in ("", "-1", "NoDevFiles"):
        return f"{VISIBLE}={facts.visible} hides all GPUs"
    if facts.driver <= 0 and facts.on_machine:
        return (
            "the NVIDIA driver's library is not found (libcuda.so.1; a container needs NVIDIA's runtime, as with "
            "docker run --gpus all)"
        )
    if facts.driver <= 0:
        return "there is no NVIDIA driver"
    if facts.driver // 1000 < int(facts.built_for.split(".")[0]):
        supported = f"{facts.driver // 1000}.{facts.driver % 1000 // 10}"
        return (
            f"the NVIDIA driver supports CUDA {supported}, but torch {facts.torch} is built for CUDA "
            f"{facts.built_for}: update the driver, or install a torch for CUDA {supported}"
        )
    if facts.message:
        return f"torch says: {short_line(facts.message)}"
    if facts.visible is not None:
        return f"{VISIBLE}={facts.visible} names no GPU of this machine"
    return "the driver finds no GPU"
