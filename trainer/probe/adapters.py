"""The mixture-of-experts layers of a model, seen and rerouted: the only file of the probes that knows model classes.

In all of them a layer's router is a module that returns (..., topk_scores_TK, topk_expert_ids_TK), and its experts are
a module that is called with these and keeps its weights as stacks over the experts. What differs is inside the router:
softmax, sigmoid or eq. 7; gate values that are renormalised or scaled; a choice limited to groups of experts, or moved
by a bias. So one hook on the router sees and replaces the choice of each, and gate values stay what the family makes
them. Shared experts, which every token meets, are beside the router and never touched; layers with one FFN are left
out.

Letters: T tokens, D hidden, F expert width, K choices a token, E experts of a bank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from trainer.common.errors import UserError
from trainer.common.machine import limit_threads
from trainer.export.configuration_unipool import UniPoolConfig
from trainer.export.folder import first_line, load_export, read_object
from trainer.export.generate import load_run
from trainer.export.source import SavedRun, find_run

UNIPOOL = UniPoolConfig.model_type
FAMILIES = ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "mixtral")
"""Values of `model_type` that are known beside our own: in each a layer has experts of its own."""


@dataclass(frozen=True)
class Bank:
    """Experts that one or more layers choose among: the pool, a sub-pool, or a layer's own.

    Attributes:
        first: global id of its first expert; ids go on from bank to bank.
        module: the model's own, which may hold other banks too.
        offset: number of the bank's first expert within the module.
    """

    first: int
    experts: int
    module: Any
    offset: int

    @property
    def width(self) -> int:
        """F of its experts."""
        return int(self.module.down_proj.shape[-1])

    def weights(self, units: slice) -> Tensor:
        """What some hidden units of each expert read and write, fp32: (E, 3 * D * units)."""
        own = slice(self.offset, self.offset + self.experts)
        w1_EFD, w3_EFD = self.module.gate_up_proj[own].chunk(2, dim=1)
        stacks = [w1_EFD[:, units], w3_EFD[:, units], self.module.down_proj[own, :, units]]
        return torch.cat([stack.flatten(1).float() for stack in stacks], dim=1)

    def run(self, expert: int, x_TD: Tensor) -> Tensor:
        """e(x) of its expert number `expert`, from 0, for every token: without gate values."""
        ids_T1 = torch.full((len(x_TD), 1), self.offset + expert, device=x_TD.device)
        gates_T1 = torch.ones_like(ids_T1, dtype=x_TD.dtype)
        y_TD: Tensor = self.module(x_TD, ids_T1, gates_T1)
        return y_TD


@dataclass(frozen=True)
class MoELayer:
    """A layer that chooses experts.

    Attributes:
        number: of the decoder layer, from 0; layers with one FFN count.
        bank: what its router chooses among.
    """

    number: int
    router: nn.Module
    bank: Bank
    top_k: int


@dataclass(frozen=True)
class MoEModel:
    """A model and its mixture-of-experts layers.

    Attributes:
        name: for titles.
        depth: decoder layers, those with one FFN too.
        banks: in the order of their layers.
        any_expert: whether a layer can run the experts of another bank too.
        window: positions that the model was made for.
    """

    name: str
    model: Any
    depth: int
    layers: tuple[MoELayer, ...]
    banks: tuple[Bank, ...]
    any_expert: bool
    window: int

    @property
    def experts(self) -> int:
        """Of all banks."""
        return sum(bank.experts for bank in self.banks)

    @property
    def top_k(self) -> int:
        """K, the same in all layers."""
        return self.layers[0].top_k

    @property
    def layer_private(self) -> bool:
        """Whether no two layers choose among the same experts."""
        return len(self.banks) == len(self.layers) > 1


@dataclass(frozen=True)
class Choice:
    """What a router made of some tokens.

    Attributes:
        x_TD: what it read, and the experts get.
        topk_scores_TK: gate values.
        topk_expert_ids_TK: global ids.
    """

    x_TD: Tensor
    topk_scores_TK: Tensor
    topk_expert_ids_TK: Tensor


@dataclass(frozen=True)
class Source:
    """What is probed. `run` is None for an export or a Hugging Face model."""

    model: MoEModel
    tokenizer: Any
    run: SavedRun | None


@contextmanager
def observed(model: MoEModel, see: Callable[[MoELayer, Choice], None]) -> Iterator[None]:
    """Shows `see` every layer's choices, in the order of the layers, in each forward inside the `with`.

    Reroutings that were entered before are seen as they came out.
    """

    def show(layer: MoELayer) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_router: nn.Module, inputs: Any, output: Any) -> None:
            *_, scores_TK, ids_TK = output
            see(layer, Choice(inputs[0].flatten(0, -2), scores_TK, ids_TK + _to_global(layer)))

        return hook

    with ExitStack() as hooks:
        for layer in model.layers:
            hooks.callback(layer.router.register_forward_hook(show(layer)).remove)
        yield


@contextmanager
def rerouted(layer: MoELayer, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Lets `choose` replace the experts of a layer in each forward inside the `with`; gate values stay.

    Args:
        choose: from the learned global ids (T, K) to those to use, of the layer's bank, or where the model has
            `any_expert` of any bank; the k-th gets the gate value of the learned k-th.
    """

    def hook(_router: nn.Module, _inputs: Any, output: Any) -> tuple[Tensor, ...]:
        *kept, ids_TK = output
        return (*kept, choose(ids_TK + _to_global(layer)) - _to_global(layer))

    handle = layer.router.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _to_global(layer: MoELayer) -> int:
    """A router numbers its experts from 0."""
    return layer.bank.first


def adapt(model: Any, name: str) -> MoEModel:
    """Finds the mixture-of-experts layers of a transformers model.

    Raises:
        UserError: a model of no known type, or a dense one.
    """
    _check_type(name, model.config.model_type)
    blocks = model.model.layers
    found = _unipool_layers(model) if model.config.model_type == UNIPOOL else _layers_with_own_experts(blocks)
    if not found:
        raise UserError(f"{name}: is a dense model; probes look at how a mixture of experts routes")
    banks = tuple({layer.bank.first: layer.bank for layer in found}.values())
    window = model.config.max_position_embeddings
    return MoEModel(name, model, len(blocks), tuple(found), banks, model.config.model_type == UNIPOOL, window)


def _unipool_layers(model: Any) -> list[MoELayer]:
    """Of one of our models: all banks are parts of its one pool."""
    if model.config.ffn == "dense":
        return []
    size = model.config.num_experts // model.config.num_expert_groups
    return [
        MoELayer(
            number,
            block.router,
            Bank(block.first_expert, size, model.model.experts, block.first_expert),
            block.router.top_k,
        )
        for number, block in enumerate(model.model.layers)
    ]


def _layers_with_own_experts(blocks: Any) -> list[MoELayer]:
    """Of one of FAMILIES. The first layers, or every few, may have one FFN."""
    found: list[MoELayer] = []
    first = 0
    for number, block in enumerate(blocks):
        if not hasattr(block.mlp, "experts"):
            continue
        bank = Bank(first, block.mlp.experts.num_experts, block.mlp.experts, 0)
        first += bank.experts
        found.append(MoELayer(number, block.mlp.gate, bank, block.mlp.gate.top_k))
    return found


def load(source: str, own_text: bool) -> Source:
    """Model (for evaluation, on the GPU where there is one) and tokenizer of what is to be probed.

    Args:
        source: a run, a checkpoint of it, an export of format hf, or a model of FAMILIES: its folder, or its name on
            the Hugging Face hub.
        own_text: whether text of its own will be read, which only a run has.

    Raises:
        UserError: it is none of these, or not whole, or has no text of its own.
    """
    limit_threads()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    path, run = Path(source), None
    if path.is_dir() and not (path / "config.json").is_file():
        run = find_run(path)
        model, tokenizer = load_run(path)
    elif own_text:
        raise UserError(f"{source}: give a text to read with --text: only a run knows what it has held out")
    elif _type_in(path) == UNIPOOL:
        model, tokenizer = load_export(path)
    elif not path.is_dir() and path.parent != Path() and path.parent.is_dir():  # NAME/NAME may be on the hub
        raise UserError(f"{source}: no such folder")
    else:
        model, tokenizer = _load_hugging_face(source, is_folder=path.is_dir())
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Source(adapt(model, path.name), tokenizer, run)


def _type_in(path: Path) -> str | None:
    """`model_type` by a folder's config.json; None where there is no such file."""
    return read_object(path / "config.json").get("model_type") if path.is_dir() else None


def _load_hugging_face(source: str, is_folder: bool) -> tuple[Any, Any]:
    """Runs no code that comes with the model."""
    try:
        _check_type(source, AutoConfig.from_pretrained(source, local_files_only=is_folder).model_type)
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=is_folder)
        return model, AutoTokenizer.from_pretrained(source, local_files_only=is_folder)
    except UserError:
        raise
    except Exception as error:  # transformers, the hub, safetensors and tokenizers each have their own
        reason = f"({type(error).__name__}: {first_line(error)})"
        if is_folder:
            raise UserError(f"{source}: no whole model of Hugging Face transformers {reason}") from error
        raise UserError(f"{source}: no such folder, and not to be had from the Hugging Face hub {reason}") from error


def _check_type(name: str, kind: str) -> None:
    if kind not in (UNIPOOL, *FAMILIES):
        raise UserError(f"{name}: is a model of type {kind}; probes know runs, their exports, {', '.join(FAMILIES)}")
