"""The Markdown files of the repository, their links, anchors and commands."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def tracked() -> list[str]:
    """Files of the repository: those that git tracks, and new ones that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(name for name in listed if (ROOT / name).exists())


DOCUMENTS = [name for name in tracked() if name.endswith(".md") and not name.startswith("tests/deploy/grafana/")]


def prose(document: str) -> str:
    """A document without its blocks of code."""
    return FENCED.sub("", (ROOT / document).read_text())


def links(document: str) -> list[str]:
    """Targets of the links and pictures of a document, code left out."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(document)))


def anchors(document: str) -> set[str]:
    """Names that a link may end in: headings as GitHub names them, and `<a id="...">`."""
    text = prose(document)
    headings = [
        re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    ]
    return {heading.replace(" ", "-") for heading in headings} | set(re.findall(r'<a id="([^"]+)">', text))


def shell_lines(document: str) -> Iterator[str]:
    """Lines of a document's blocks of `sh`, and those behind a prompt in its blocks of `console`."""
    for _, language, block in FENCED.findall((ROOT / document).read_text()):
        lines = block.replace("\\\n", " ").splitlines()
        if language == "sh":
            yield from (line for line in lines if line.strip())
        elif language == "console":
            yield from (line[2:] for line in lines if line.startswith("$ "))


def trainer_commands(line: str) -> Iterator[list[str]]:
    """Arguments of each call of the trainer in a line of shell."""
    for command in re.split(r"&&|;|\|\|", line):
        words = shlex.split(re.sub(r"\s[<>]\s.*", "", command), comments=True)
        for place, word in enumerate(words):
            module = word == "trainer" and words[place - 1] in ("-m", "--module")
            if module or (place == 0 and Path(word).name == "unipool"):
                yield words[place + 1 :]
                break
