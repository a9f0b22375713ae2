"""Make the text of the recipe `mid`, code and prose from Python packages: python docs/results/mid/corpus.py runs/corpus

Downloads the packages of packages.txt, whose hashes pip checks, and takes the text out of them. The result is the same
on every machine: FOLDER/text/code.jsonl, FOLDER/text/prose.jsonl, and FOLDER/manifest.json with bytes, documents and
hashes.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from trainer.common.strict_json import dumps

PACKAGES = Path(__file__).with_name("packages.txt")
KINDS = {".py": "code", ".rst": "prose", ".txt": "prose", ".md": "prose"}
SMALLEST, LARGEST = 1_000, 500_000
"""Bytes of a file that is taken."""

MOST = 12_000_000
"""Bytes of one kind taken from one package, so that no package is most of the text."""

LONGEST_LINE = 1_000
"""Characters of a line, more than which only generated and minified text has."""

MOST_OTHERS = 0.4
"""Share of the characters that may be neither English letters nor white space; tables of numbers have more."""

REPEATED = 40
"""Characters of a line from which on two files with the same line may be copies of each other."""

SKIPPED = re.compile(
    r"(^|/)(tests?|testing|locale|fixtures|vendor\w*|_vendor|egg-info|shksprdata/ancillary)/"
    r"|\.egg-info/|_f\.txt$|(^|/)(LICENSE|COPYING|AUTHORS|requirements|SOURCES|constraints)\b|(^|/)(requirements|.*-requirements)/"
)
GENERATED = re.compile(r"@generated|do not edit|(auto(matically)?[- ]?)generated (by|from|file)", re.IGNORECASE)


def download(folder: Path) -> list[Path]:
    """Download the packages, unless they are there; return their archives in the order of packages.txt."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(folder)]
    subprocess.run([*command, "--requirement", str(PACKAGES)], check=True)
    pins = re.findall(r"^(\S+)==(\S+)", PACKAGES.read_text(), re.MULTILINE)
    return [folder / f"{name}-{version}.tar.gz" for name, version in pins]


def files(archive: Path) -> Iterator[tuple[str, str, str]]:
    """Yield kind, path and text of the files of an archive that may be taken, in an order that mixes its folders."""
    found = []
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if path.suffix in KINDS and SMALLEST <= member.size <= LARGEST and not SKIPPED.search(member.name):
                content = tar.extractfile(member)  # None for a folder or a link to a missing file
                found.append((KINDS[path.suffix], member.name, content.read() if content else b""))
    for kind, name, data in sorted(found, key=lambda file: hashlib.sha256(file[1].encode()).digest()):
        try:
            yield kind, name, data.decode()
        except UnicodeDecodeError:
            continue


def is_written(text: str) -> bool:
    """Tell text that somebody wrote from text that a program wrote."""
    others = re.sub(r"[A-Za-z\s]+", "", text)
    return (
        max(map(len, text.splitlines())) <= LONGEST_LINE
        and len(others) <= MOST_OTHERS * len(text)
        and not GENERATED.search(text[:1_000])
    )


class Seen:
    """The long lines of all documents so far, by which copies and near copies are recognised."""

    def __init__(self) -> None:
        self._lines: set[int] = set()

    def is_copy(self, text: str) -> bool:
        """Return whether half of a document's long lines are in earlier ones, and remember the lines if not."""
        lines = {line for line in map(str.strip, text.splitlines()) if len(line) >= REPEATED}
        hashes = {int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little") for line in lines}
        copy = 2 * len(hashes & self._lines) >= len(hashes)
        if not copy:
            self._lines |= hashes
        return copy


def main() -> None:
    if len(sys.argv) != 2:
        print("usage: python docs/results/mid/corpus.py FOLDER", file=sys.stderr)
        sys.exit(2)
    folder = Path(sys.argv[1])
    (folder / "text").mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / "text" / f"{kind}.jsonl" for kind in sorted(set(KINDS.values()))}
    outputs = {kind: path.open("w", encoding="utf-8", newline="\n") for kind, path in paths.items()}
    seen, packages = Seen(), []
    for archive in download(folder / "packages"):
        count: Counter[str] = Counter()
        for kind, name, text in files(archive):
            size = len(text.encode())
            if count[f"{kind}_bytes"] + size > MOST or not is_written(text) or seen.is_copy(text):
                count["left_out"] += 1
                continue
            outputs[kind].write(dumps({"text": text, "file": name}) + "\n")
            count.update({f"{kind}_bytes": size, f"{kind}_documents": 1})
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        packages.append({"package": archive.name, "sha256": digest, **dict(sorted(count.items()))})
        print(dumps(packages[-1]))
    for output in outputs.values():
        output.close()
    texts = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in paths.values()
    }
    (folder / "manifest.json").write_text(dumps({"texts": texts, "packages": packages}, indent=1) + "\n")
    print(dumps(texts))


if __name__ == "__main__":
    main()
