"""Text from a run or an export, streamed, with a KV cache: the export's model does it for both."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TextStreamer
from transformers.utils import logging

from trainer.common.errors import UserError
from trainer.common.machine import limit_threads
from trainer.export.folder import is_export, load_export
from trainer.export.modeling_unipool import UniPoolForCausalLM
from trainer.export.soundness import sound
from trainer.export.source import export_tokenizer, filled_model, find_run, model_config, open_weights


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: choose among so many tokens; None: all.
        top_p: choose among the fewest tokens that have this probability together.
        seed: the same one gives the same text.
    """

    temperature: float
    top_k: int | None
    top_p: float
    seed: int


@dataclass(frozen=True)
class Generated:
    """A continuation. `seconds`: from the prompt to the last token, without loading."""

    prompt: str
    text: str
    tokens: int
    seconds: float


def generate(source: Path, prompt: str, tokens: int, sampling: Sampling, stream: bool) -> Generated:
    """Continue `prompt` by up to `tokens` tokens, to the end of the document or of the model's window.

    Args:
        source: a run, a checkpoint of it, or an export of format hf.
        stream: print prompt and continuation to stdout as they are made.

    Raises:
        UserError: the source is none of these, or the prompt leaves no room in the window.
        BrokenModel: its logits are not finite.
    """
    limit_threads()
    model, tokenizer = load_model(source)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    # A text without a beginning begins as documents do.
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id]
    window = model.config.max_position_embeddings
    if len(ids) >= window:
        raise UserError(f"--prompt: has {len(ids)} tokens, the model's window is {window}; give {window - 1} at most")
    if len(ids) + tokens > window:
        tokens = window - len(ids)
        print(f"stops after {tokens} tokens, at the end of the model's window of {window}", file=sys.stderr)
    torch.manual_seed(sampling.seed)
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p,
        }
    ids_1S = torch.tensor([ids], device=model.device)
    started = time.perf_counter()
    with sound(model, str(source)):
        made_1S = model.generate(
            ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            max_new_tokens=tokens,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None,
            **chosen,
        )
    seconds = time.perf_counter() - started
    new = made_1S[0, len(ids) :]
    return Generated(prompt, tokenizer.decode(new, skip_special_tokens=True), len(new), seconds)


def load_model(path: Path) -> tuple[UniPoolForCausalLM, PreTrainedTokenizerFast]:
    """Model and tokenizer of a run's newest checkpoint, of one checkpoint, or of an export.

    Raises:
        UserError: `path` is none of these.
    """
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return load_export(path) if is_export(path) else load_run(path)


def load_run(path: Path) -> tuple[UniPoolForCausalLM, PreTrainedTokenizerFast]:
    """Model (fp32) and tokenizer of a run's newest checkpoint, or of one checkpoint."""
    run = find_run(path)
    exported = export_tokenizer(run)
    with open_weights(run) as weights:
        model = filled_model(model_config(run.recipe), weights, torch.float32)
    model.generation_config.update(eos_token_id=exported.end_id, pad_token_id=exported.end_id)
    return model, exported.load()
