"""The mixture-of-experts layers of a model: the only file of the probes that knows model classes.

In all supported models, a layer's router is a module that returns (..., topk_scores_TK, topk_expert_ids_TK), and its
experts are a module that is called with these and keeps its weights as stacks. The families differ inside the router,
so a hook on it can observe and replace the choice in all of them, and gate values stay what the family makes them.
Shared experts, which process every token, are separate from the router; they and layers with one FFN stay untouched.

Dimensions: T tokens, D hidden size, F expert width, K experts per token, E experts of a bank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer.common.errors import UserError
from trainer.common.machine import pick_device
from trainer.common.safe_read import refuse_unreadable
from trainer.export.folder import first_line, read_object
from trainer.export.loaded_model import LoadedModel, load_model, prepare_libraries
from trainer.export.model_files.configuration_unipool import UniPoolConfig

UNIPOOL = UniPoolConfig.model_type
FAMILIES = ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "mixtral")
"""Supported values of `model_type` besides our own. In these models, each layer has its own experts."""


@dataclass(frozen=True)
class Bank:
    """The experts that one or more layers choose from: the pool, a sub-pool, or a layer's own experts.

    Attributes:
        first: The global id of the first expert; ids count through all banks.
        experts: The number of experts, E.
        module: The model's module of experts, which may contain other banks too.
        offset: The index of the bank's first expert in the module.
    """

    first: int
    experts: int
    module: Any
    offset: int

    @property
    def width(self) -> int:
        """The width F of an expert."""
        return int(self.module.down_proj.shape[-1])

    def weights(self, units: slice) -> Tensor:
        """Return the weights of some hidden units of each expert, fp32, (E, 3 * D * units)."""
        own = slice(self.offset, self.offset + self.experts)
        w1_EFD, w3_EFD = self.module.gate_up_proj[own].chunk(2, dim=1)
        stacks = [w1_EFD[:, units], w3_EFD[:, units], self.module.down_proj[own, :, units]]
        return torch.cat([stack.flatten(1).float() for stack in stacks], dim=1)

    def run(self, expert: int, x_TD: Tensor) -> Tensor:
        """Return the output e(x) of the bank's expert number `expert`, without gate values."""
        ids_T1 = torch.full((len(x_TD), 1), self.offset + expert, device=x_TD.device)
        gates_T1 = torch.ones_like(ids_T1, dtype=x_TD.dtype)
        y_TD: Tensor = self.module(x_TD, ids_T1, gates_T1)
        return y_TD


@dataclass(frozen=True)
class MoELayer:
    """A layer with a router: its number among all layers of the model, and the bank that it chooses from.

    Attributes:
        own: The global ids of the experts that the layer owns, if it chooses from these only (UniPool-lock).
    """

    number: int
    router: nn.Module
    bank: Bank
    own: tuple[int, ...] | None = None

    @property
    def choices(self) -> tuple[int, ...]:
        """The global ids of the experts that the layer can choose."""
        return self.own or tuple(range(self.bank.first, self.bank.first + self.bank.experts))


@dataclass(frozen=True)
class MoEModel:
    """A model and its mixture-of-experts layers."""

    loaded: LoadedModel
    layers: tuple[MoELayer, ...]

    @property
    def name(self) -> str:
        """The name in titles."""
        return self.loaded.path.name

    @property
    def model(self) -> Any:
        """The model of transformers."""
        return self.loaded.model

    @property
    def banks(self) -> tuple[Bank, ...]:
        """All banks, in the order of their layers."""
        return tuple(dict.fromkeys(layer.bank for layer in self.layers))

    @property
    def experts(self) -> int:
        """The number of experts in all banks."""
        return sum(bank.experts for bank in self.banks)

    @property
    def top_k(self) -> int:
        """The number of experts per token, K."""
        return int(self.layers[0].router.top_k)  # type: ignore[arg-type]

    @property
    def any_expert(self) -> bool:
        """Whether a layer can use the experts of other banks."""
        return bool(self.model.config.model_type == UNIPOOL)

    @property
    def layer_private(self) -> bool:
        """Whether no two layers share experts."""
        return (len(self.banks) == len(self.layers) > 1) or self.owners is not None

    @property
    def owners(self) -> tuple[int, ...] | None:
        """The layer that owns each expert, if layers choose from their own experts only."""
        if not all(layer.own for layer in self.layers):
            return None
        return tuple(self.model.config.expert_owners)


@dataclass(frozen=True)
class Choice:
    """A router's choice for some tokens: its inputs, gate values, and global ids of experts."""

    x_TD: Tensor
    topk_scores_TK: Tensor
    topk_expert_ids_TK: Tensor


Observer = Callable[[MoELayer, Choice], None]


@contextmanager
def observed(model: MoEModel, see: Observer) -> Iterator[None]:
    """Call `see` for every layer, in order, in each forward pass inside the `with`.

    Choices are seen as replaced by an outer `rerouted`.
    """

    def hook_of(layer: MoELayer) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_router: nn.Module, inputs: Any, output: Any) -> None:
            *_, scores_TK, ids_TK = output
            see(layer, Choice(inputs[0].flatten(0, -2), scores_TK, ids_TK + layer.bank.first))

        return hook

    with ExitStack() as hooks:
        for layer in model.layers:
            hooks.callback(layer.router.register_forward_hook(hook_of(layer)).remove)
        yield


@contextmanager
def rerouted(layer: MoELayer, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the experts of a layer, but not the gate values, in each forward pass inside the `with`.

    Args:
        layer: The layer.
        choose: Maps the learned global ids (T, K) to the ids to use, which must be of the layer's bank unless the model
            has `any_expert`. The k-th expert gets the gate value of the learned k-th expert.
    """

    def hook(_router: nn.Module, _inputs: Any, output: Any) -> tuple[Tensor, ...]:
        *kept, ids_TK = output
        return (*kept, choose(ids_TK + layer.bank.first) - layer.bank.first)

    handle = layer.router.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def adapt(loaded: LoadedModel) -> MoEModel:
    """Find the mixture-of-experts layers of a model.

    Raises:
        UserError: The model's type is not supported, or the model is dense.
    """
    model, layers, first = loaded.model, list[MoELayer](), 0
    _check_type(loaded.path, model.config.model_type)
    for number, block in enumerate(model.model.layers):
        if model.config.model_type == UNIPOOL and model.config.ffn == "pool":
            size = model.config.num_experts // model.config.num_expert_groups
            router, bank = block.router, Bank(block.first_expert, size, model.model.experts, block.first_expert)
            own = _own(model.config, number)
        elif hasattr(block.mlp, "experts"):
            router, bank = block.mlp.gate, Bank(first, block.mlp.experts.num_experts, block.mlp.experts, 0)
            own = None
            first += bank.experts
        else:
            continue
        layers.append(MoELayer(number, router, bank, own))
    if not layers:
        raise UserError(f"{loaded.path}: is a dense model; probes require a mixture of experts")
    return MoEModel(loaded, tuple(layers))


def _own(config: UniPoolConfig, layer: int) -> tuple[int, ...] | None:
    """Return the experts that a layer owns; None if it can still choose others."""
    if config.expert_owners is None or config.foreign_expert_factor:
        return None
    return tuple(expert for expert, owner in enumerate(config.expert_owners) if owner == layer)


def load(source: str, own_text: bool) -> MoEModel:
    """Load a run, a checkpoint, an export of format hf, or a model of FAMILIES (a folder, or a name on the hub).

    Args:
        source: What to load.
        own_text: Whether its own held-out text will be read, which only a run has.

    Raises:
        UserError: `source` is none of these, is incomplete, or has no text of its own.
    """
    path = Path(source)
    is_run = path.is_dir() and not (path / "config.json").is_file()
    if own_text and not is_run:
        raise UserError(f"{source}: not a run, and only a run has held-out text; give a text with --text FILE")
    if is_run or (path.is_dir() and read_object(path / "config.json").get("model_type") == UNIPOOL):
        return adapt(load_model(path))
    if not path.is_dir() and path.parent != Path() and path.parent.is_dir():  # otherwise, NAME/NAME may be on the hub
        raise UserError(f"{source}: no such folder")
    return adapt(_load_hugging_face(path))


def _load_hugging_face(path: Path) -> LoadedModel:
    """Load a model of FAMILIES, without running code that comes with it."""
    prepare_libraries()
    name, is_folder = str(path), path.is_dir()
    if is_folder:
        refuse_unreadable(path)
    try:
        _check_type(path, AutoConfig.from_pretrained(name, local_files_only=is_folder).model_type)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", local_files_only=is_folder)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=is_folder)
    except UserError:
        raise
    except Exception as error:  # transformers, the hub, safetensors and tokenizers each raise their own kinds
        reason = f"({type(error).__name__}: {first_line(error)})"
        if is_folder:
            raise UserError(f"{path}: is not a complete model of Hugging Face transformers {reason}") from error
        raise UserError(f"{path}: no such folder, and not available on the Hugging Face hub {reason}") from error
    file = path / "tokenizer.json"
    if (
        file.is_file()
        and tokenizer.eos_token
        and Tokenizer.from_file(str(file)).token_to_id(tokenizer.eos_token) is None
    ):
        raise UserError(
            f"{path / 'tokenizer_config.json'}: eos_token is {tokenizer.eos_token!r}, which is not in {file}"
        )
    return LoadedModel(path, model.to(pick_device(None)).eval(), tokenizer, None)


def _check_type(path: Path, kind: str) -> None:
    if kind not in (UNIPOOL, *FAMILIES):
        raise UserError(
            f"{path}: models of type {kind} are not supported; give a run, an export, or a model of type "
            f"{', '.join(FAMILIES)}"
        )
