"""The requests in one model: those that are computed together, by continuous batching, and those that wait."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from trainer.export.loaded_model import LoadedModel, finite_outputs
from trainer.serve.requests import RequestError
from trainer.serve.sampling import Sampling, add_sampling

_PAGE = {"cpu": 32, "cuda": 256}
"""Tokens of a page of the KV cache; on GPUs transformers' default."""

_PREFILL = 512
"""Tokens of a forward pass, in which long prompts are divided."""

_LOOK_SECONDS = 5.0
"""How often an answer that waits looks whether answers are computed at all."""


class Engine:
    """A model that answers many requests at once.

    Args:
        loaded: The model.
        batch: Largest number of answers that are computed together; the KV cache holds a full window for each.
        queue: Largest number of answers that wait.

    Attributes:
        window: The number of positions of the model.
        running: The number of answers that are computed.
        waiting: The number of answers that wait.
    """

    def __init__(self, loaded: LoadedModel, batch: int, queue: int):
        self._loaded, self._batch, self._queue = loaded, batch, queue
        self.window = loaded.window
        self.running = self.waiting = 0
        self._places = asyncio.Semaphore(batch)
        self._numbers = itertools.count()
        self._manager: Any = None

    @property
    def page(self) -> int:
        """The number of tokens of a page of the KV cache."""
        return _PAGE[self._loaded.model.device.type]

    @property
    def vocabulary(self) -> int:
        """The number of tokens of the vocabulary."""
        return int(self._loaded.model.config.vocab_size)

    @property
    def ends(self) -> set[int]:
        """The tokens that end a text."""
        ids = self._loaded.model.generation_config.eos_token_id
        return set(ids if isinstance(ids, list) else [ids])

    def start(self) -> None:
        """Check that the model computes numbers, then start to serve.

        Raises:
            BrokenModel: Its logits are not finite.
        """
        model = self._loaded.model
        with finite_outputs(model, str(self._loaded.path)), torch.inference_mode():
            model(torch.zeros(1, 1, dtype=torch.long, device=model.device))
        settings = GenerationConfig(do_sample=False, eos_token_id=sorted(self.ends), pad_token_id=min(self.ends))
        paging = ContinuousBatchingConfig(
            page_size=self.page,
            num_blocks=self._batch * math.ceil(self.window / self.page),
            max_batch_tokens=max(_PREFILL, self._batch),
            max_requests_per_batch=self._batch,
            safety_margin=0.0,
            # On GPUs with flash attention transformers would turn to it, which computes nothing in fp32, and to CUDA
            # graphs, in which nobody may ask how many rows each expert gets.
            auto_switch_to_flash=False,
        )
        self._manager = model.init_continuous_batching(settings, paging)
        add_sampling(self._manager.logit_processor)
        self._manager.warmup()
        with torch.inference_mode():
            self._manager.start()

    def stop(self) -> None:
        """Stop; answers that are not complete fail."""
        self._manager.stop(hard_stop=True, timeout=10)

    @property
    def alive(self) -> bool:
        """Whether answers can be computed."""
        return bool(self._manager is not None and self._manager.is_running())

    @property
    def cache_used(self) -> float:
        """The share of the KV cache that holds tokens, from 0 to 1."""
        processor = self._manager and self._manager.batch_processor
        return 1 - float(processor.cache.compute_free_capacity()) if processor else 0.0

    @property
    def cache_bytes(self) -> int:
        """The size of the KV cache."""
        return int(self._manager.batch_processor.cache.cache_tensor.nbytes)

    def admit(self, answers: int) -> None:
        """Check that there is room for more answers.

        Raises:
            RequestError: The queue is full, there are more than it can ever hold, or the engine has failed.
        """
        if not self.alive:
            raise _stopped()
        most = self._batch + self._queue
        if answers > most:
            raise RequestError(f"The request asks for {answers} answers; this server takes at most {most} at a time")
        if answers > most - self.running - self.waiting:
            raise _overloaded()

    @asynccontextmanager
    async def _place(self) -> AsyncGenerator[None, None]:
        if self._places.locked() and self.waiting >= self._queue:  # others were admitted at the same time
            raise _overloaded()
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()

    async def tokens(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[list[int], None]:
        """Yield the new tokens of an answer as they are made. Closing the iterator ends the answer.

        Raises:
            RequestError: The computation has failed.
        """
        async with self._place():
            made: asyncio.Queue[Any] = asyncio.Queue()
            name = str(next(self._numbers))
            self._manager.register_result_handler(name, made.put_nowait)
            finished, known = False, 0
            try:
                accepted = self._manager.add_request(
                    prompt, name, max_new_tokens=sampling.tokens, streaming=True, **sampling.arguments(self.vocabulary)
                )
                if accepted is None:
                    raise RequestError("the server is stopping", status=503)
                while not finished:
                    output = await self._output(made)
                    finished = output.is_finished()
                    if output.error is not None:
                        raise RequestError(f"the answer could not be computed: {output.error}", status=500)
                    new, known = output.generated_tokens[known:], len(output.generated_tokens)
                    yield new
            finally:
                if not finished:
                    self._manager.cancel_request(name)
                    self._manager.output_router.result_handlers.pop(name, None)

    async def _output(self, made: asyncio.Queue[Any]) -> Any:
        """Wait for the next output of an answer, as long as answers can be computed at all."""
        while True:
            alive = self.alive  # before the wait: what was made until then comes within it
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    return await made.get()
            if not alive and made.empty():
                raise _stopped()


def _stopped() -> RequestError:
    return RequestError("the model has stopped computing; start the server again", status=503)


def _overloaded() -> RequestError:
    return RequestError("The engine is currently overloaded, please try again later", None, "queue_full", 503)
