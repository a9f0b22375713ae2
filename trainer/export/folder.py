"""An export's folder as our own commands read it: none of its code is run, and only what is known is taken from it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.errors import UserError
from trainer.common.strict_json import loads

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from trainer.export.configuration_unipool import UniPoolConfig
    from trainer.export.modeling_unipool import UniPoolForCausalLM

MODEL_FILES = ("configuration_unipool.py", "experts_unipool.py", "modeling_unipool.py")
"""The model for transformers, which every export has a copy of."""

WEIGHTS_FILE = "model.safetensors"


class StoredTensors(Mapping[str, "Tensor"]):
    """The tensors of an export, either format, in one file or several; each is read when it is asked for.

    Attributes:
        shapes: of all tensors, by name.
        types: of all tensors, as safetensors calls them.

    Raises:
        UserError: a file is missing or damaged, or the index does not agree with the files.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        index = folder / f"{WEIGHTS_FILE}.index.json"
        if not index.is_file():
            self._add(WEIGHTS_FILE)
            return
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
            raise UserError(f"{index}: weight_map must have the file of each tensor")
        for file in sorted(set(weight_map.values())):
            self._add(file)
        for name in sorted(weight_map.keys() ^ self._files.keys()):
            where = "no file has it" if name in weight_map else "it is not in the index"
            raise UserError(f"{index}: does not agree with the files about tensor {name} ({where})")

    def _add(self, name: str) -> None:
        path = self._folder / name
        if not path.is_file():
            raise UserError(f"{self._folder}: not a whole export ({name} is missing)")
        with self._opened(path, "numpy") as file:
            for tensor in file.keys():  # noqa: SIM118  not a dict
                part = file.get_slice(tensor)
                self._files[tensor], self.types[tensor] = path, part.get_dtype()
                self.shapes[tensor] = tuple(part.get_shape())

    def _opened(self, path: Path, framework: str) -> Any:
        from safetensors import safe_open

        try:
            return safe_open(path, framework=framework)
        except Exception as error:  # safetensors has its own
            raise UserError(f"{path}: a damaged file ({first_line(error)}); export the run again") from error

    def __getitem__(self, name: str) -> Tensor:
        with self._opened(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value


def first_line(error: BaseException) -> str:
    """The first line of an error's message; may be empty."""
    return str(error).partition("\n")[0]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: there is none.
    """
    try:
        value = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def is_export(path: Path) -> bool:
    """Whether a folder is meant as an export of format hf; else it is a run or a checkpoint."""
    return (path / "config.json").is_file()


def load_export(path: Path) -> tuple[UniPoolForCausalLM, PreTrainedTokenizerFast]:
    """Model, in the type of its weights, and tokenizer of an export.

    Raises:
        UserError: it is another kind of model, or damaged.
    """
    import torch
    from transformers import GenerationConfig

    from trainer.export.source import empty_model, filled_model, stored_tensors

    config, tensors = _read_config(path), StoredTensors(path)
    # Before a model of that size is built.
    too_many = config.num_hidden_layers > len(tensors) or (config.ffn == "pool" and config.num_experts > len(tensors))
    expected = {} if too_many else {name: tuple(t.shape) for name, t in stored_tensors(empty_model(config)).items()}
    missing = expected.keys() - tensors.keys()
    if too_many or missing:
        count = len(missing) or "many"
        raise UserError(f"{path}: not a whole export ({count} tensors are missing of those that its config.json says)")
    for name in sorted(tensors):
        if tensors.shapes[name] != expected.get(name):
            meant = f"by its config.json {expected[name]}" if name in expected else "which its config.json does not say"
            raise UserError(f"{path}: not a whole export ({name} is {tensors.shapes[name]}, {meant})")
    kind = tensors.types["lm_head.weight"]
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    if kind not in dtypes:
        raise UserError(f"{path}: its weights are {kind}; exports are {', '.join(dtypes)}")
    model = filled_model(config, tensors, dtypes[kind])
    tokenizer = _read_tokenizer(path, config)
    ends = _end_ids(path, config.vocab_size) or tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer


def _read_config(path: Path) -> UniPoolConfig:
    from trainer.export.configuration_unipool import EXPORT_VERSION, UniPoolConfig

    said = read_object(path / "config.json")
    kind, version = said.get("model_type"), said.get("export_version", 1)
    if kind != UniPoolConfig.model_type:
        raise UserError(f"{path}: is a model of type {kind}; give a run, or an export made by `export --format hf`")
    if type(version) is not int or not 1 <= version <= EXPORT_VERSION:
        raise UserError(
            f"{path}: export_version is {version!r} in its config.json, this trainer knows 1 to {EXPORT_VERSION}; "
            "update the trainer, or make the export again with `unipool export RUN --format hf DIR`"
        )
    if version < EXPORT_VERSION:
        print(
            f"{path}: was exported for transformers before 5.24; it works here, but not with later ones on its own: "
            "make it again with `unipool export RUN --format hf DIR`",
            file=sys.stderr,
        )
    known = inspect.signature(UniPoolConfig.__init__).parameters.keys() - {"self", "others"}
    try:
        return UniPoolConfig(**{name: value for name, value in said.items() if name in known})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / 'config.json'}: {first_line(error)}") from None


def tokenizer_settings(special: Mapping[str, str], window: int) -> dict[str, Any]:
    """Arguments of `PreTrainedTokenizerFast`.

    Args:
        special: bos_token, eos_token and pad_token.
        window: tokens that the model was trained on at once.
    """
    return {
        **special,
        "padding_side": "left",
        "model_max_length": window,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def _read_tokenizer(path: Path, config: UniPoolConfig) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file, said = path / "tokenizer.json", read_object(path / "tokenizer_config.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except BaseException as error:  # tokenizers panics with one that is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(f"{file}: cannot be read ({first_line(error)}); export the run again") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < config.vocab_size:
        raise UserError(
            f"{file}: has ids up to {largest}, the model by its config.json those below {config.vocab_size}"
        )
    special: dict[str, str] = {}
    for name in ("eos_token", "bos_token", "pad_token"):
        token = said.get(name)
        if isinstance(token, dict):  # so some versions of transformers write it
            token = token.get("content")
        if token is None and "eos_token" in special:
            token = special["eos_token"]
        if not isinstance(token, str) or tokenizer.token_to_id(token) is None:
            raise UserError(
                f"{path / 'tokenizer_config.json'}: {name} is {token!r}, which tokenizer.json does not have"
            )
        special[name] = token
    settings = tokenizer_settings(special, config.max_position_embeddings)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def _end_ids(path: Path, vocab_size: int) -> list[int]:
    """The tokens that end a text, by generation_config.json; [] where there is none."""
    file = path / "generation_config.json"
    if not file.is_file():
        return []
    said = read_object(file).get("eos_token_id")
    ids = said if isinstance(said, list) else [] if said is None else [said]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise UserError(f"{file}: eos_token_id is {said!r}; it must be of the model's vocabulary, below {vocab_size}")
    return ids
