"""What the kernels of a graph would be on a GPU: inductor's own scheduler for CUDA, on tensors without values.

The graphs that torch.compile would give to inductor on a CPU are lowered and fused as for an H100, and their code is
generated, without GPU, CUDA or Triton. A kernel is one fused group of operations, or one call of a library, which on a
GPU may launch several (a sort does).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch._guards
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import scheduler
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V

CUDA = torch.device("cuda:0")
H100 = {
    "major": 9,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}


@contextmanager
def _made_up_gpu() -> Iterator[None]:
    sizes = {"total_memory": 80 * 2**30, "shared_memory_per_block_optin": 227 * 2**10, "L2_cache_size": 50 * 2**20}
    properties = SimpleNamespace(name="NVIDIA H100", minor=0, gcnArchName="", **sizes, **H100)
    hints = DeviceProperties(type="cuda", index=0, cc=90, **H100)
    with (
        mock.patch.object(DeviceProperties, "create", return_value=hints),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(scheduler, "has_triton", return_value=True),
        mock.patch("torch.utils._triton.triton_hash_with_backend", return_value="none"),
    ):
        yield


class _OnCuda(torch.fx.Interpreter):
    """Gives every node of a graph the value it has on CUDA."""

    def run_node(self, n: torch.fx.Node) -> Any:
        if "masked_index_put" in str(n.target):  # decomposes into what fake tensors do not know
            n.meta["val"] = torch.empty_like(n.args[0].meta["val"])  # type: ignore[union-attr]
        else:
            n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def kernels(gm: torch.fx.GraphModule) -> list[str]:
    """The kernels of one graph, each by the operations in it. None may add in the order in which its threads come."""
    gm = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
    fake = torch._guards.detect_fake_mode()
    assert fake is not None
    inputs = []
    with _made_up_gpu():
        with fake:
            for node in gm.graph.nodes:
                if node.op == "placeholder":
                    v = node.meta["val"]
                    inputs.append(torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=CUDA))
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": CUDA}
            _OnCuda(gm).run(*inputs)
        with V.set_fake_mode(fake), V.set_debug_handler(mock.MagicMock()):
            view_to_reshape(gm)
            post_grad_passes(gm, is_inference=False)
            graph = GraphLowering(gm, example_inputs=inputs)
            with V.set_graph_handler(graph):
                graph.run(*inputs)
                code, _ = graph.codegen()
    assert "def call(" in str(code.value)
    assert "tl.atomic" not in str(code.value), f"a sum depends on timing: {code.value}"
    found = []
    for node in graph.scheduler.nodes:
        if isinstance(node, scheduler.NopKernelSchedulerNode) or isinstance(node.node, MultiOutput):
            continue
        operations = [str(origin) for part in node.get_nodes() for origin in getattr(part.node, "origins", ())]
        found.append(" ".join(operations))
    return found


class Counter:
    """A back end of torch.compile that runs graphs as they are, and keeps what `kernels` finds in each.

    Attributes:
        forward, backward: By graph, in the order of compilation.
    """

    def __init__(self) -> None:
        self.forward: list[list[str]] = []
        self.backward: list[list[str]] = []
        self.backend = aot_autograd(
            fw_compiler=self._keep(self.forward),
            inference_compiler=self._keep(self.forward),
            bw_compiler=self._keep(self.backward),
            decompositions=select_decomp_table(),
            partition_fn=_partition,
        )

    @staticmethod
    def _keep(found: list[list[str]]) -> Callable[..., Any]:
        def compile_(gm: torch.fx.GraphModule, _inputs: Any) -> Any:
            found.append(kernels(gm))
            return make_boxed_func(gm.forward)

        return compile_


def _partition(gm: torch.fx.GraphModule, *arguments: Any, **options: Any) -> Any:
    joint_graph_passes(gm)
    return min_cut_rematerialization_partition(gm, *arguments, compiler="inductor", **options)
