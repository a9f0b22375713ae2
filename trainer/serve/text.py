"""From the tokens of an answer to its text, up to a stop sequence, and from a chat to the text of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from trainer.common.errors import one_line


class AnswerText:
    """The text of one answer, which grows with its tokens.

    Text that may be the beginning of a stop sequence, or has an incomplete character, is held back.

    Args:
        tokenizer: The model's tokenizer.
        stops: Sequences at which the text ends; they are not part of it.

    Attributes:
        stopped: Whether a stop sequence was found.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self._tokenizer, self._stops = tokenizer, stops
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._decoded = self._given = ""
        self.stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """Add tokens, and return the new text that is certain."""
        for token in tokens:
            self._tokens.append(token)
            self._decoded += self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
            if (found := self._first_stop()) >= 0:
                self._decoded, self.stopped = self._decoded[:found], True
                return self._give(len(self._decoded))
        return self._give(len(self._decoded) - self._possible_stop())

    def end(self) -> str:
        """Return the text that was held back, after the last token."""
        if not self.stopped:
            self._decoded = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            if (found := self._first_stop()) >= 0:
                self._decoded, self.stopped = self._decoded[:found], True
        return self._give(len(self._decoded))

    def _give(self, until: int) -> str:
        text = self._decoded[len(self._given) : until]
        self._given += text
        return text

    def _first_stop(self) -> int:
        """Return where the first stop sequence begins; -1 if there is none."""
        found = [self._decoded.find(stop) for stop in self._stops]
        return min((place for place in found if place >= 0), default=-1)

    def _possible_stop(self) -> int:
        """Return the number of last characters that may be the beginning of a stop sequence."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._decoded) - len(self._given))
        endings = range(longest, 0, -1)
        return next((n for n in endings if any(stop.startswith(self._decoded[-n:]) for stop in self._stops)), 0)


def chat_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Return a chat as the text that the model continues.

    Raises:
        Exception: The template is broken, or refuses the messages by an error of its own.
    """
    text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text


def fault_of_chats(tokenizer: Any) -> str | None:
    """Return what clients that chat cannot do, because of the chat template; None if a simple chat works.

    A template with a mistake in its syntax is removed, because no chat can work. One that refuses a message of a user
    is kept, because others may work.
    """
    from jinja2 import TemplateSyntaxError  # torch requires it

    if not tokenizer.chat_template:
        return None
    try:
        chat_text(tokenizer, [{"role": "user", "content": "Hello"}])
    except TemplateSyntaxError as error:
        tokenizer.chat_template = None
        return (
            f"chats are not served, because of a mistake in the chat template (line {error.lineno}: {one_line(error)})"
        )
    except Exception as error:  # templates raise errors of any kind
        return f"the chat template refuses a message of a user ({one_line(error, 500)}); chats may not work"
    return None
