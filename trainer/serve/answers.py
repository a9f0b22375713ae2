"""The answers to a request: pieces of text as they are made, or whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trainer.serve.engine import Engine
from trainer.serve.sampling import Sampling
from trainer.serve.text import AnswerText


@dataclass(frozen=True)
class Asked:
    """What a request asks for: `number` answers to each prompt.

    Attributes:
        prompts: The tokens of each prompt.
        number: The number of answers to a prompt.
        sampling: How the first answer to a prompt is made; the next ones have the next seeds.
        stops: Sequences at which an answer ends.
    """

    prompts: Sequence[list[int]]
    number: int
    sampling: Sampling
    stops: Sequence[str]

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def answers(self) -> int:
        """The number of answers."""
        return len(self.prompts) * self.number


@dataclass(frozen=True)
class Piece:
    """New text of an answer.

    Attributes:
        answer: The number of the answer.
        text: The text, which may be empty.
        tokens: The number of new tokens that were computed.
        finish: Why the answer ends with this piece; None if it does not.
    """

    answer: int
    text: str
    tokens: int
    finish: Literal["stop", "length"] | None = None


@dataclass
class Answer:
    """A whole answer."""

    text: str = ""
    tokens: int = 0
    finish: str | None = None


@dataclass
class Answers:
    """Whole answers, in their order."""

    answers: list[Answer] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """The number of tokens of all answers."""
        return sum(answer.tokens for answer in self.answers)

    def add(self, piece: Piece) -> None:
        """Add a piece to its answer."""
        answer = self.answers[piece.answer]
        answer.text += piece.text
        answer.tokens += piece.tokens
        answer.finish = piece.finish


async def pieces(engine: Engine, tokenizer: Any, asked: Asked) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of all answers, as they are made. Closing the iterator ends the answers.

    Raises:
        RequestError: An answer cannot be computed.
    """
    made: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    async def make(number: int) -> None:
        prompt, repetition = divmod(number, asked.number)
        sampling = replace(asked.sampling, seed=(asked.sampling.seed + repetition) % 2**63)
        try:
            async for piece in _one(engine, tokenizer, asked.prompts[prompt], sampling, asked.stops):
                made.put_nowait(replace(piece, answer=number))
        except Exception as error:  # passed on, because the client waits
            made.put_nowait(error)

    tasks = [asyncio.create_task(make(number)) for number in range(asked.answers)]
    try:
        unfinished = len(tasks)
        while unfinished:
            piece = await made.get()
            if isinstance(piece, Exception):
                raise piece
            unfinished -= piece.finish is not None
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _one(
    engine: Engine, tokenizer: Any, prompt: list[int], sampling: Sampling, stops: Sequence[str]
) -> AsyncGenerator[Piece, None]:
    text, last, unsaid = AnswerText(tokenizer, stops), -1, 0
    async with aclosing(engine.tokens(prompt, sampling)) as stream:
        async for new in stream:
            unsaid += len(new)
            last = new[-1] if new else last
            if certain := text.add(new):
                yield Piece(0, certain, unsaid)
                unsaid = 0
            if text.stopped:
                break
    rest = text.end()
    yield Piece(0, rest, unsaid, "stop" if text.stopped or last in engine.ends else "length")
