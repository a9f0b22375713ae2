import subprocess
import sys
from pathlib import Path

import fastokens
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from tests.distributed import TIME_LIMIT
from tests.trainer.fuzzing import fuzz
from trainer.data.encoding import Encoder
from trainer.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "def main(argument):\n    return argument  # it's schön 日本 🙂\r\n\r\n\t12345 don't\n" * 20
    trained = train_tokenizer([text], 400)
    trained.add_tokens([AddedToken("<tool>", special=False)])
    return trained


def ids(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    return [ids_T.tolist() for ids_T in encoder.encode(texts)]


def slowly(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


PARTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(
        ["<|endoftext|>", "<tool>", " don't", "\r\n", "   ", "\u00a0\u2003", "日本", "🙂\u200d", "\0", "e\u0301"]
    ),
)


@given(texts=st.lists(st.lists(PARTS, max_size=6).map("".join), max_size=4))
@fuzz(150)
def test_the_fast_library_gives_the_same_tokens(tokenizer, texts):
    encoder = Encoder(tokenizer)
    assert ids(encoder, texts) == slowly(tokenizer, texts)
    assert ids(encoder, texts) == slowly(tokenizer, texts)  # after its check, too
    assert encoder.slow_because is None


def test_special_tokens_in_a_text_are_text(tokenizer):
    (found,) = ids(Encoder(tokenizer), ["a<|endoftext|>b"])
    assert tokenizer.token_to_id("<|endoftext|>") not in found and tokenizer.decode(found) == "a<|endoftext|>b"


REAL = fastokens.Tokenizer


class Wrong:
    """Gives other tokens from its `after`-th call on."""

    def __init__(self, after: int, fails: bool):
        self.after, self.fails = after, fails

    def from_json_str(self, text: str) -> "Wrong":
        self.real = REAL.from_json_str(text)
        return self

    def encode_batch_flat(self, texts, split_special_tokens):
        self.after -= 1
        if self.after < 0 and self.fails:
            raise RuntimeError("a limit\nof it")
        return self.real.encode_batch_flat(["x"] * len(texts) if self.after < 0 else texts, split_special_tokens)


@pytest.mark.parametrize("after, fails", [(0, False), (0, True), (2, True)])
def test_what_disagrees_or_fails_is_not_used(tokenizer, monkeypatch, after, fails):
    monkeypatch.setattr(fastokens, "Tokenizer", Wrong(after, fails))
    encoder = Encoder(tokenizer)
    for _ in range(3):
        assert ids(encoder, ["def main", "main(argument)"]) == slowly(tokenizer, ["def main", "main(argument)"])
    assert encoder.slow_because == ("RuntimeError: a limit" if fails else "ValueError: it gives other tokens")


def test_a_tokenizer_that_it_does_not_know():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert ids(Encoder(tokenizer), ["a b c", ""]) == [[0, 1, 2], []]


def test_where_it_is_not_installed(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    encoder = Encoder(tokenizer)
    assert ids(encoder, ["main"]) == slowly(tokenizer, ["main"]) and "fastokens" in encoder.slow_because


def test_memory_is_bounded_whatever_the_document(tmp_path, tokenizer):
    """One document of 24 MB, with each library: `tokenizers` alone would take 5 GB for it."""
    path, saved = tmp_path / "long.txt", tmp_path / "tokenizer.json"
    path.write_text("expert router pool don't 12345 return\n" * 640_000)
    tokenizer.save(str(saved))
    code = f"""
import sys
from pathlib import Path
if sys.argv[1] == "slow":
    sys.modules["fastokens"] = None
from trainer.data import source_builder
source_builder.BATCH_CHARACTERS = 500_000
from trainer.data.cache import Conduct
from trainer.data.prepare import prepare_source
from trainer.data.settings import SourceSettings

def peak():  # of this program alone, while ru_maxrss begins with the memory of the process that has started it
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM:"))

before = peak()
settings = SourceSettings({str(path)!r}, {str(saved)!r}, 512, 64, (8, 2, 0), "text", None, sys.argv[2])
if sys.argv[1] == "slow":
    settings = SourceSettings(*list(settings.__dict__.values())[:8], max_tokens=3_000_000)
tokens = prepare_source(settings, Conduct(show=False)).train.tokens
print(tokens, peak() - before)
"""
    for library, limit in (("fast", 600), ("slow", 900)):
        command = [sys.executable, "-c", code, library, str(tmp_path / library)]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=TIME_LIMIT
        )
        assert done.returncode == 0, done.stderr
        tokens, kilobytes = map(int, done.stdout.split())
        assert tokens >= 3_000_000 and kilobytes < limit * 1024, (library, tokens, kilobytes)
