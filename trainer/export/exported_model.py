"""Models and tokenizers of exports: built from the trainer's own code, with only known fields read from the folder."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from trainer.common.errors import UserError, one_line
from trainer.common.safe_read import LARGEST_TOKENIZER, Unreadable, read_text, refuse_unreadable
from trainer.export.folder import StoredTensors, first_line, read_object
from trainer.export.model_files.configuration_unipool import EXPORT_VERSION, UniPoolConfig
from trainer.export.model_files.experts_unipool import UniPoolRouter
from trainer.export.model_files.modeling_unipool import UniPoolForCausalLM

CHAT_TEMPLATE_FILE = "chat_template.jinja"

CHAT_TOKENS = ("bos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""The special tokens that a tokenizer for conversations keeps; the one that ends a document is the run's."""

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def empty_model(config: UniPoolConfig) -> UniPoolForCausalLM:
    """Build a model whose weights take no memory (on torch's meta device)."""
    with torch.device("meta"):
        return UniPoolForCausalLM(config)


def stored_tensors(model: UniPoolForCausalLM) -> dict[str, Tensor]:
    """Return a model's tensors by their exported names; single experts are views of the model's stacks."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "model.experts.gate_up_proj":
            for expert, gate_up in enumerate(tensor):
                for part, half in zip(("gate", "up"), gate_up.chunk(2), strict=True):
                    found[f"model.experts.{expert}.{part}_proj.weight"] = half
        elif name == "model.experts.down_proj":
            found |= {f"model.experts.{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def filled_model(config: UniPoolConfig, read: Callable[[str], Tensor], dtype: torch.dtype) -> UniPoolForCausalLM:
    """Build a model with weights of type `dtype` (routers: fp32), which `read` returns by their exported names."""
    model = empty_model(config)
    model.to(dtype)
    if config.ffn == "pool":
        for layer in model.model.layers:
            layer.router.float()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, UniPoolRouter):
                module.mark_foreign()
        for name, tensor in stored_tensors(model).items():
            tensor.copy_(read(name))
    return model


def load_export(path: Path) -> tuple[UniPoolForCausalLM, PreTrainedTokenizerFast]:
    """Load the model (in the type of its weights) and the tokenizer of an export of format hf.

    Raises:
        UserError: The folder holds another kind of model, or the export is damaged.
    """
    config = _read_config(path)
    if "quantization_config" in read_object(path / "config.json"):
        model = _load_quantised(path, config)
    else:
        model = _load_plain(path, config)
    tokenizer = _read_tokenizer(path, config)
    ends = _end_ids(path, config.vocab_size) or tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer


def _load_quantised(path: Path, config: UniPoolConfig) -> UniPoolForCausalLM:
    """Load a model that transformers quantised and saved, with our own code and the library that quantised it."""
    refuse_unreadable(path)
    try:
        model: UniPoolForCausalLM = UniPoolForCausalLM.from_pretrained(path, config=config, local_files_only=True)
    except Exception as error:  # transformers and the libraries each raise their own kinds
        raise UserError(
            f"{path}: the quantised model cannot be loaded ({first_line(error)}); it needs the library that quantised "
            "it, for torchao: pip install torchao"
        ) from error
    return model


def _load_plain(path: Path, config: UniPoolConfig) -> UniPoolForCausalLM:
    tensors = StoredTensors(path)
    # A config.json that asks for far more tensors than there are is refused before a model of its size is built.
    if max(config.num_hidden_layers, config.num_experts if config.ffn == "pool" else 0) > len(tensors.shapes):
        raise UserError(f"{path}: has fewer tensors than its config.json has layers or experts; export the run again")
    required = {name: tuple(tensor.shape) for name, tensor in stored_tensors(empty_model(config)).items()}
    tensors.check(required, "its config.json")
    kind = tensors.types["lm_head.weight"]
    if kind not in _TYPES:
        raise UserError(f"{path}: the type of the weights is {kind}; it must be one of {', '.join(_TYPES)}")
    return filled_model(config, tensors.read, _TYPES[kind])


def _read_config(path: Path) -> UniPoolConfig:
    stored = read_object(path / "config.json")
    kind, version = stored.get("model_type"), stored.get("export_version", 1)
    if kind != UniPoolConfig.model_type:
        raise UserError(f"{path}: is a model of type {kind}; give a run, or an export made by `export --format hf`")
    if type(version) is not int or not 1 <= version <= EXPORT_VERSION:
        raise UserError(
            f"{path}: export_version in its config.json is {version!r}, but this trainer reads 1 to {EXPORT_VERSION}; "
            "update the trainer, or export the run again with `unipool export RUN --format hf DIR`"
        )
    if version < EXPORT_VERSION:
        print(
            f"{path}: this export works here, but not on its own with transformers 5.24 or later; to update it, export "
            "the run again with `unipool export RUN --format hf DIR`",
            file=sys.stderr,
        )
    # Other fields could name code that transformers fetches, as attn_implementation does.
    known = inspect.signature(UniPoolConfig.__init__).parameters.keys() - {"self", "others"}
    if "quantization_config" in stored:
        known |= {"quantization_config", "dtype"}
    try:
        return UniPoolConfig(**{name: value for name, value in stored.items() if name in known})
    except Exception as error:  # transformers has kinds of its own
        raise UserError(f"{path / 'config.json'}: {first_line(error)}") from None


def tokenizer_settings(special: dict[str, str], window: int) -> dict[str, Any]:
    """Return arguments of `PreTrainedTokenizerFast`: the special tokens, the model's window, and what is the same."""
    return {
        **special,
        "padding_side": "left",
        "model_max_length": window,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def mistake_in_template(template: str) -> str | None:
    """Return the line of a chat template in which its syntax is wrong, and how, or None."""
    from jinja2 import TemplateSyntaxError  # torch requires it
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[{"role": "user", "content": ""}]], chat_template=template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {one_line(error)}"
    except Exception:  # what the template says of this chat, or lacks for it, such as the tokenizer's tokens
        pass
    return None


def _read_tokenizer(path: Path, config: UniPoolConfig) -> PreTrainedTokenizerFast:
    file, stored = path / "tokenizer.json", read_object(path / "tokenizer_config.json")
    try:
        tokenizer = Tokenizer.from_str(read_text(file, LARGEST_TOKENIZER))
    except BaseException as error:  # the panics of tokenizers are not Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(f"{file}: cannot be read ({first_line(error)}); export the run again") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < config.vocab_size:
        raise UserError(f"{file}: ids go up to {largest}, but vocab_size in config.json is {config.vocab_size}")
    special: dict[str, str] = {}
    for name in ("eos_token", "bos_token", "pad_token"):
        token = stored.get(name)
        if isinstance(token, dict):  # as some versions of transformers write it
            token = token.get("content")
        if token is None:
            token = special.get("eos_token")
        if not isinstance(token, str) or tokenizer.token_to_id(token) is None:
            raise UserError(f"{path / 'tokenizer_config.json'}: {name} is {token!r}, which is not in tokenizer.json")
        special[name] = token
    settings = tokenizer_settings(special, config.max_position_embeddings)
    template = path / CHAT_TEMPLATE_FILE
    if template.is_file() or "chat_template" in stored:
        try:
            text = read_text(template) if template.is_file() else stored["chat_template"]
        except Unreadable as error:
            raise UserError(f"{template}: cannot be read ({first_line(error)}); export the run again") from None
        settings |= chat_arguments({"chat_template": text, "special_tokens": stored}, tokenizer) | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def chat_arguments(chat: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return arguments of `PreTrainedTokenizerFast` for conversations: the template and the special tokens.

    Args:
        chat: What `trainer.data.tokenizer.chat_settings` returns. Tokens that are not in the vocabulary are left out.
    """

    def known(token: Any) -> bool:
        return isinstance(token, str) and tokenizer.token_to_id(token) is not None

    tokens, more = chat["special_tokens"], chat["special_tokens"].get("extra_special_tokens")
    named = {name: tokens[name] for name in CHAT_TOKENS if known(tokens.get(name))}
    extra = [token for token in more if known(token)] if isinstance(more, list) else []
    return {**named, "extra_special_tokens": extra, "chat_template": chat["chat_template"]}


def _end_ids(path: Path, vocab_size: int) -> list[int]:
    """Return the tokens that end a text by generation_config.json; [] if it names none."""
    file = path / "generation_config.json"
    stored = read_object(file).get("eos_token_id") if file.is_file() else None
    ids = stored if isinstance(stored, list) else [] if stored is None else [stored]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise UserError(f"{file}: eos_token_id is {stored!r}; it must be an id below vocab_size, {vocab_size}")
    return ids
