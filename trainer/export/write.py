"""Writing an export: all of its files, or none."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from trainer.checkpoint.format import damage, read_ownership
from trainer.common.atomic import atomic_folder
from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.config.lock import OWNERSHIP_FILE
from trainer.config.recipe import save_recipe
from trainer.export.exported_model import CHAT_TEMPLATE_FILE
from trainer.export.folder import MODEL_FILES, first_line
from trainer.export.hub.card import write_card
from trainer.export.model_files.configuration_unipool import UniPoolConfig
from trainer.export.names import Shape, exported_shapes
from trainer.export.saved_run import SavedRun, end_ids, export_tokenizer, find_run, open_weights, run_chat, run_config
from trainer.planning.model_costs import count_parameters

Format = Literal["hf", "llama", "safetensors"]

_OF_LLAMA = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "initializer_range"),
)

SHARD_SIZE = "5GB"
"""Default size of a file of weights, huggingface_hub's. That of transformers, 50GB, would take as much memory."""


def export(source: Path, out: Path, form: Format, dtype: str, shard_size: str = SHARD_SIZE) -> dict[str, Any]:
    """Export a checkpoint; return the folder, checkpoint, number of parameters and sizes of files that were written.

    Args:
        source: A run, or one of its checkpoints.
        out: The folder to write, which must not exist or be empty.
        form: The format of the export.
        dtype: "float32" or "bfloat16"; routers are always fp32.
        shard_size: The size up to which tensors share a file, as in "5GB"; one file at a time is in memory.

    Raises:
        UserError: `source` has no intact checkpoint, or `out` is in use or cannot be written.
    """
    out = out.resolve()
    check_free(out)
    run = find_run(source)
    if problem := damage(run.folder):
        raise UserError(f"{run.folder}: this checkpoint is damaged: {problem}; export another one")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(out) as partial:
            if form != "safetensors":
                config = _llama_config(run) if form == "llama" else run_config(run)
                write_model_files(config, *export_tokenizer(run), run_chat(run), partial, dtype)
                write_card(run, partial, dtype, code=form == "hf")
            else:
                save_recipe(run.recipe, partial / "recipe.yaml")
                if run.recipe.lock and read_ownership(run.folder):
                    shutil.copyfile(run.folder / OWNERSHIP_FILE, partial / OWNERSHIP_FILE)
            with open_weights(run, out.parent) as weights:
                write_weights(weights, partial, getattr(torch, dtype), shard_size)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    files = {file.name: file.stat().st_size for file in sorted(out.iterdir())}
    where = {"path": str(out), "checkpoint": str(run.folder)}
    return where | {"parameters": count_parameters(run.recipe).total, "dtype": dtype, "files": files}


def _llama_config(run: SavedRun) -> LlamaConfig:
    """Return the configuration of the same model as one of transformers' own LLaMAs.

    Raises:
        UserError: It is none.
    """
    ours = run_config(run)
    config = LlamaConfig(**{name: getattr(ours, name) for name in _OF_LLAMA})
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if shapes != exported_shapes(run.recipe):
        raise UserError(
            f"{run.folder}: --format llama: its tensors are not a LLaMA's, which is dense, without biases and without "
            "norms of queries and keys; leave out --format"
        )
    return config


def check_free(out: Path) -> None:
    """Check that a folder to write does not exist or is empty.

    Raises:
        UserError: It holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; choose another folder or remove it")


def write_model_files(
    config: UniPoolConfig | LlamaConfig,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    chat: dict[str, Any],
    folder: Path,
    dtype: str,
) -> None:
    """Write everything but the weights: configuration, tokenizer and, unless it is a LLaMA, model code.

    Args:
        settings: Arguments of `PreTrainedTokenizerFast`.
        chat: What the tokenizer says about conversations (`trainer.data.tokenizer.chat_settings`); {}: nothing.
    """
    settings = dict(settings)
    template = settings.pop("chat_template", None)
    named = {f"{name}_id": tokenizer.token_to_id(settings[name]) for name in ("bos_token", "eos_token", "pad_token")}
    ids = named | {"eos_token_id": end_ids(chat, int(named["eos_token_id"] or 0))}
    classes = {
        "AutoConfig": "configuration_unipool.UniPoolConfig",
        "AutoModel": "modeling_unipool.UniPoolModel",
        "AutoModelForCausalLM": "modeling_unipool.UniPoolForCausalLM",
    }
    llama = isinstance(config, LlamaConfig)
    if llama:
        config.update(ids | {"architectures": ["LlamaForCausalLM"], "dtype": dtype})
    else:
        config.update(ids | {"architectures": ["UniPoolForCausalLM"], "auto_map": classes, "dtype": dtype})
    config.to_json_file(folder / "config.json")
    if generation := chat.get("generation"):  # as it is: transformers would refuse to write some of what it reads
        (folder / "generation_config.json").write_text(dumps(generation | ids, indent=2) + "\n")
    else:
        GenerationConfig(**ids).save_pretrained(folder)
    for file in () if llama else MODEL_FILES:
        (folder / file).write_bytes((resources.files("trainer.export.model_files") / file).read_bytes())
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    if isinstance(template, str):
        (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
    elif template:  # several with names
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(dumps(settings, indent=2) + "\n")


class Readable(Protocol):
    """Tensors by their exported names: their shapes, and what reads one."""

    shapes: dict[str, Shape]

    def read(self, name: str) -> Tensor: ...


def write_weights(weights: Readable, folder: Path, dtype: torch.dtype, shard_size: str = SHARD_SIZE) -> None:
    """Write model.safetensors, or several files of at most `shard_size` with an index.

    Raises:
        OSError: A file cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from tqdm import tqdm

    empty = {
        name: torch.empty(shape, dtype=torch.float32 if ".router." in name else dtype, device="meta")
        for name, shape in weights.shapes.items()
    }
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size
    )
    total = sum(tensor.nbytes for tensor in empty.values())
    with tqdm(desc="writing weights", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for file, names in split.filename_to_tensors.items():
            tensors = {}
            for name in names:
                # Parts of a fused tensor share memory, which safetensors refuses, so they are copied.
                tensors[name] = weights.read(name).to(empty[name].dtype, copy=True).contiguous()
                bar.update(tensors[name].nbytes)
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:  # as which it raises those of a full disk
                raise OSError(first_line(error)) from None
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(dumps(index, indent=2) + "\n")
