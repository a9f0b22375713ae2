"""Which files a source means: a file, a folder, a glob, or Python's own standard library.

A folder is searched for the kinds of files that can be read. What is left out of it, and why, is kept for a message:
nothing is passed over in silence.
"""

import glob
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainer.common.errors import UserError

PYTHON_STDLIB = "python-stdlib"
HUB_PREFIX = "hub:"

_PLAIN = (".txt", ".text", ".md", ".markdown", ".rst", ".py")
_JSON = (".jsonl", ".ndjson", ".jsonlines", ".json")
_TABLES = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_KIND_OF_ENDING = dict.fromkeys(_PLAIN, "plain") | dict.fromkeys(_JSON, "json") | _TABLES
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
ALLOWED = f"allowed are {', '.join(_KIND_OF_ENDING)}, all but the last three also with {', '.join(COMPRESSED)}"

_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", *(f".tar{ending}" for ending in COMPRESSED))
_TOOLS_FOLDERS = {"__macosx", "__pycache__", "_temporary", "_delta_log", "_spark_metadata"}
# What `datasets` and the hub's repositories keep beside the records.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_NOTES = {"readme", "license", "licence", "changelog", "citation", "contributing"}

LeftOut = list[tuple[Path, str]]


@dataclass
class Files:
    """What a source means.

    Attributes:
        read: the files to read, sorted by path.
        left_out: files and folders that are not read, and why.
    """

    read: list[Path] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=list)


def kind_of(name: str) -> str | None:
    """ "plain", "json", "csv", "tsv", "parquet" or "arrow", by a file's name; None if it is of no known kind."""
    name = name.lower()
    ending = os.path.splitext(name)[1]
    if ending in COMPRESSED:
        kind = _KIND_OF_ENDING.get(os.path.splitext(name.removesuffix(ending))[1])
        return None if kind in ("parquet", "arrow") else kind
    return _KIND_OF_ENDING.get(ending)


def shown(path: str | os.PathLike[str]) -> str:
    """A path for a message: bytes that are not UTF-8, and characters that would break the line, are escaped."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:  # no file has such a name
        name = str(path).encode("utf-8", "backslashreplace")
    return _printable(name.decode("utf-8", "backslashreplace"))


def one_line(text: object) -> str:
    """A library's message, a key or a name for a message of one line; its first 300 characters."""
    line = " ".join(str(text).split()) or (type(text).__name__ if isinstance(text, Exception) else "")
    return _printable(line)[:300]


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def source_files(source: str) -> list[Path]:
    """The local files that `source` names, sorted; none for the hub.

    Raises:
        UserError: see `find_files`.
    """
    return find_files(source).read


def skipped_files(source: str) -> str | None:
    """One line that says which files of `source` are not read, and why; None if all are."""
    return left_out_line(source, find_files(source).left_out)


def left_out_line(source: str, left_out: LeftOut) -> str | None:
    """As `skipped_files`, of what `find_files` has found."""
    if not left_out:
        return None
    by_reason: dict[str, list[str]] = {}
    for path, reason in left_out:
        by_reason.setdefault(reason, []).append(shown(path.name))
    reasons = []
    for reason, names in by_reason.items():
        more = ", ..." if len(names) > 3 else ""
        reasons.append(f"{len(names)} {reason} ({', '.join(names[:3])}{more})")
    return f"data.source {shown(source)}: left out: {'; '.join(reasons)}"


def find_files(source: str) -> Files:
    """The local files that `source` names, and what is left out of it.

    A file that is named outright is read whatever its name is, as long as its kind is known. Of a glob's matches those
    of a known kind are read. In a folder, hidden and temporary files are left out as well, and notes (README.md) that
    lie beside records.

    Raises:
        UserError: nothing to read, a file of no known kind or without content, a folder that cannot be listed.
    """
    if source.startswith(HUB_PREFIX):
        return Files()
    if source == PYTHON_STDLIB:
        return Files(_stdlib_files())
    path = Path(os.path.expanduser(source))
    if not source:
        raise UserError(f"data.source: is empty; {_give()}")
    if os.path.isfile(path):
        return Files([_named(path)])
    if os.path.isdir(path):
        files = _in_folder(path)
    elif glob.has_magic(str(path)):
        files = _matches(str(path))
    else:
        raise UserError(f"data.source {shown(source)}: cannot be read ({_why_not(path)}); {_give()}")
    if not files.read:
        told = left_out_line(source, files.left_out) or f"data.source {shown(source)}"
        raise UserError(f"{told}: no file found that can be read; {_give()}")
    files.read.sort()
    files.left_out.sort()
    return files


def _why_not(path: Path) -> str:
    """Why a path is neither a file nor a folder."""
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        return one_line(getattr(error, "strerror", None) or error)
    return "a device, a pipe or a socket"


def _give() -> str:
    return f'give a file, folder, glob ({ALLOWED}), "{HUB_PREFIX}NAME" or "{PYTHON_STDLIB}"'


def _named(path: Path) -> Path:
    reason = _unreadable_kind(path.name)
    if reason == "archive":
        raise UserError(f"{shown(path)}: is an archive; unpack it and give the folder with its files")
    if reason:
        raise UserError(f"{shown(path)}: unknown kind of file; {ALLOWED}")
    if os.stat(path).st_size == 0:
        raise UserError(f"{shown(path)}: is empty, it holds no document; give another data.source")
    return path


def _unreadable_kind(name: str) -> str | None:
    if name.lower().endswith(_ARCHIVES):
        return "archive"
    return None if kind_of(name) else "of unknown kind"


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - {"site-packages", "dist-packages", "__pycache__"}
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(f"data.source {PYTHON_STDLIB}: no .py file under {shown(root)}; name another source")
    return sorted(files)


def _matches(pattern: str) -> Files:
    files = Files()
    seen = set()
    try:
        matches = sorted(map(Path, glob.iglob(pattern, recursive=True)), key=lambda path: (len(path.parts), path))
    except (ValueError, RecursionError) as error:  # a NUL character; a pattern that `re` refuses
        raise UserError(f"data.source {shown(pattern)}: not a path or glob ({error}); {_give()}") from error
    for path in matches:
        if os.path.isdir(path):
            continue
        real = os.path.realpath(path)  # "**" goes through links to folders, also round through those that lead back
        reason = "reached twice, by a link" if real in seen else _reason(path)
        seen.add(real)
        _sort_in(files, path, reason)
    return files


def _in_folder(root: Path) -> Files:
    files = Files()
    seen: set[str] = set()
    for folder, entries in _walk(root, files, seen):
        kinds = {entry.name: kind_of(entry.name) for entry in entries}
        has_records = any(kind not in (None, "plain") for name, kind in kinds.items() if not _beside(name))
        for entry in entries:
            path = folder / entry.name
            _sort_in(files, path, _beside(entry.name, has_records) or _reason(path))
    return files


def _walk(root: Path, files: Files, seen: set[str]) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Folders with their files, through links as well, but into no folder twice."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            files.left_out.append((folder, "reached twice, by a link"))
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"{shown(folder)}: the folder cannot be listed ({error.strerror}); mend that or name other folders"
            ) from error
        inside = []
        for entry in listed:
            if not os.path.isdir(entry.path):
                inside.append(entry)
            elif entry.name.startswith("."):
                files.left_out.append((folder / entry.name, "hidden"))
            elif entry.name.lower() in _TOOLS_FOLDERS:
                files.left_out.append((folder / entry.name, "of a tool's own"))
            elif _made_here(folder / entry.name):
                files.left_out.append((folder / entry.name, "made by this trainer"))
            else:
                waiting.append(folder / entry.name)
        yield folder, inside


def _made_here(folder: Path) -> bool:
    """Whether a folder is this trainer's own: prepared data, their tokenizer, a run, a sweep or an export."""
    try:
        names = set(os.listdir(folder))
    except OSError:
        return False  # it is said when it is listed
    if folder.name.startswith("tokenizer-v") and names == {"tokenizer.json"}:
        return True
    marks = ({"facts.json", "train.arrow"}, {"recipe.yaml", "checkpoints"}, {"sweep.yaml"}, {"modeling_unipool.py"})
    return any(mark <= names for mark in marks)


def _beside(name: str, has_records: bool = True) -> str | None:
    """Why a file is not data, by its name; `has_records`: other files of its folder hold records."""
    name = name.lower()
    if name.startswith("."):
        return "hidden"
    if name in _DESCRIPTIONS or (name.startswith("cache-") and name.endswith(".arrow")):
        return "of the `datasets` library's own"
    if has_records and kind_of(name) == "plain" and name.split(".")[0] in _NOTES:
        return "beside the records"
    return None


def _reason(path: Path) -> str | None:
    """Why a file cannot be read, or None."""
    reason = _unreadable_kind(path.name)
    if reason:
        return f"{reason} (to be unpacked first)" if reason == "archive" else reason
    if not os.path.isfile(path):
        return "not a file, or a broken link" if os.path.lexists(path) else "gone"
    kind = kind_of(path.name)
    packed = path.name.lower().endswith(COMPRESSED)
    # An empty file of the other kinds was cut off: reading it says so.
    return "empty" if kind not in ("parquet", "arrow") and not packed and path.stat().st_size == 0 else None


def _sort_in(files: Files, path: Path, reason: str | None) -> None:
    if reason:
        files.left_out.append((path, reason))
    else:
        files.read.append(path)
