"""Which files a source names: a file, a folder, a glob, or the source of Python's standard library.

A folder is searched for files of the kinds that can be read. What is skipped, and why, is kept for a message, so that
nothing is skipped silently.
"""

import glob
import os
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from trainer.common.errors import UserError, one_line, os_reason

PYTHON_STDLIB = "python-stdlib"
HUB_PREFIX = "hub:"

_PLAIN = (".txt", ".text", ".md", ".markdown", ".rst", ".py")
_JSON = (".jsonl", ".ndjson", ".jsonlines", ".json")
_TABLES = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_KIND_OF_ENDING = dict.fromkeys(_PLAIN, "plain") | dict.fromkeys(_JSON, "json") | _TABLES
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
ALLOWED = (
    f"allowed are {', '.join(_KIND_OF_ENDING)}, and {', '.join(COMPRESSED)} after any of these but .parquet, .arrow "
    "and .feather"
)
_GIVE = f'set it to a file, folder or glob ({ALLOWED}), "{HUB_PREFIX}NAME" or "{PYTHON_STDLIB}"'

_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", *(f".tar{ending}" for ending in COMPRESSED))
_TOOLS_FOLDERS = {"__macosx", "__pycache__", "_temporary", "_delta_log", "_spark_metadata"}
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What the `datasets` library and the hub's repositories keep next to the records."""
_NOTES = {"readme", "license", "licence", "changelog", "citation", "contributing"}
_OUR_FOLDERS = ({"facts.json", "train.arrow"}, {"recipe.yaml", "checkpoints"}, {"sweep.yaml"}, {"modeling_unipool.py"})
"""Files of prepared data, of a run, of a sweep and of an export."""

_ARCHIVE, _EMPTY = "to be unpacked first", "empty"
_TWICE = "reached twice through links"


@dataclass
class Files:
    """What a source names.

    Attributes:
        read: The files to read, sorted by path.
        skipped: Files and folders that are not read, and why, sorted by path.
    """

    read: list[Path] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    def add(self, path: Path, reason: str | None) -> None:
        """Add a file to read or, if there is a `reason`, to skip."""
        if reason:
            self.skipped.append((path, reason))
        else:
            self.read.append(path)

    def skipped_line(self, source: str) -> str | None:
        """Return one line that says which files of `source` are skipped, and why; None if there are none."""
        if not self.skipped:
            return None
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.skipped:
            by_reason.setdefault(reason, []).append(shown(path.name))
        reasons = [
            f"{len(names)} {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for reason, names in by_reason.items()
        ]
        return f"data.source {shown(source)}: skipped {'; '.join(reasons)}"


def kind_of(name: str) -> str | None:
    """Return "plain", "json", "csv", "tsv", "parquet" or "arrow" from a file's name; None for any other type."""
    stem, ending = os.path.splitext(name.lower())
    if ending in COMPRESSED:
        kind = _KIND_OF_ENDING.get(os.path.splitext(stem)[1])
        return None if kind in ("parquet", "arrow") else kind
    return _KIND_OF_ENDING.get(ending)


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path for a message: bytes that are not UTF-8 and characters that cannot be printed are escaped."""
    try:
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # no file has such a name
        name = str(path)
    return one_line(name)


def unreadable(path: Path, error: OSError) -> UserError:
    """Return the error that a file of a source cannot be read."""
    return UserError(
        f"{shown(path)}: cannot be read ({os_reason(error)}); make it readable or remove it from data.source"
    )


def file_stamp(path: Path) -> tuple[str, int, int]:
    """Return a file's path, size in bytes and modification time in nanoseconds: when these are equal, so is the text.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        facts = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from error
    return str(path), facts.st_size, facts.st_mtime_ns


def refuse_change(path: Path, before: tuple[str, int, int]) -> None:
    """Raise a UserError if a file's stamp is no longer `before`."""
    if file_stamp(path) != before:
        raise UserError(f"{shown(path)}: has changed while it was read; start again when it is complete")


def find_files(source: str) -> Files:
    """Return the local files that `source` names (none for the hub), and what is skipped.

    A file that is named itself is read whatever its name is, as long as its type is known. From a glob's matches, those
    of a known type are read. In a folder, hidden and temporary files are skipped as well, and so are notes (README.md)
    that lie next to records.

    Raises:
        UserError: There is nothing to read, a file is of unknown type or empty, or a folder cannot be listed.
    """
    if source.startswith(HUB_PREFIX):
        return Files()
    if source == PYTHON_STDLIB:
        return Files(_stdlib_files())
    if not source:
        raise UserError(f"data.source: is empty; {_GIVE}")
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        return Files([_named(path)])
    if os.path.isdir(path):
        files = _in_folder(path)
    elif glob.has_magic(str(path)):
        files = _matches(str(path))
    else:
        raise UserError(f"data.source {shown(source)}: cannot be read ({_why_not(path)}); {_GIVE}")
    if not files.read:
        begin = files.skipped_line(source) or f"data.source {shown(source)}"
        raise UserError(f"{begin}: no file found that can be read; {_GIVE}")
    files.read.sort()
    files.skipped.sort()
    return files


def _why_not(path: Path) -> str:
    """Why a path is neither a file nor a folder."""
    try:
        os.stat(path)
    except OSError as error:
        return os_reason(error)
    except ValueError as error:
        return one_line(error)
    return "it is a device, a pipe or a socket"


def _named(path: Path) -> Path:
    fault = _fault(path)
    if fault == _ARCHIVE:
        raise UserError(f"{shown(path)}: is an archive; unpack it and name the folder with its files")
    if fault == _EMPTY:
        raise UserError(f"{shown(path)}: is empty; set data.source to a file with text")
    if fault:
        raise UserError(f"{shown(path)}: is of unknown type; {ALLOWED}")
    return path


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - {"site-packages", "dist-packages", "__pycache__"}
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(f"data.source {PYTHON_STDLIB}: there is no .py file under {shown(root)}; set another source")
    return sorted(files)


def _matches(pattern: str) -> Files:
    files = Files()
    seen = set()
    try:
        matches = sorted(map(Path, glob.iglob(pattern, recursive=True)), key=lambda path: (len(path.parts), path))
    except (ValueError, RecursionError) as error:  # a NUL character; a pattern that `re` refuses
        raise UserError(f"data.source {shown(pattern)}: not a path or glob ({error}); {_GIVE}") from error
    for path in matches:
        if os.path.isdir(path):
            continue
        real = os.path.realpath(path)  # "**" follows links to folders, even those that lead back
        files.add(path, _TWICE if real in seen else _fault(path))
        seen.add(real)
    return files


def _in_folder(root: Path) -> Files:
    """Search a folder, following links but visiting no folder twice."""
    files = Files()
    seen: set[str] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            files.add(folder, _TWICE)
            continue
        seen.add(real)
        try:
            paths = [folder / name for name in sorted(os.listdir(folder))]
        except OSError as error:
            raise UserError(
                f"{shown(folder)}: the folder cannot be listed ({os_reason(error)}); make it readable or name other "
                "folders"
            ) from error
        inside = []
        for path in paths:
            if not os.path.isdir(path):
                inside.append(path)
            elif reason := _folder_fault(path):
                files.add(path, reason)
            else:
                waiting.append(path)
        has_records = any(
            kind_of(path.name) not in (None, "plain") and not _not_data(path.name, has_records=True) for path in inside
        )
        for path in inside:
            files.add(path, _not_data(path.name, has_records) or _fault(path))
    return files


def _folder_fault(folder: Path) -> str | None:
    """Why a folder within a source is not searched, or None."""
    if folder.name.startswith("."):
        return "hidden"
    if folder.name.lower() in _TOOLS_FOLDERS:
        return "kept by a tool"
    try:
        names = set(os.listdir(folder))
    except OSError:
        return None  # searching it reports the error
    tokenizer = folder.name.startswith("tokenizer-v") and names == {"tokenizer.json"}
    return "made by this trainer" if tokenizer or any(marks <= names for marks in _OUR_FOLDERS) else None


def _not_data(name: str, has_records: bool) -> str | None:
    """Why a file in a folder is not data, judging by its name; `has_records`: other files there hold records."""
    name = name.lower()
    if name.startswith("."):
        return "hidden"
    if name in _METADATA or (name.startswith("cache-") and name.endswith(".arrow")):
        return "of metadata of the `datasets` library"
    if has_records and kind_of(name) == "plain" and name.split(".")[0] in _NOTES:
        return "of notes next to records"
    return None


def _fault(path: Path) -> str | None:
    """Why a file cannot be read, or None."""
    kind = kind_of(path.name)
    if path.name.lower().endswith(_ARCHIVES):
        return _ARCHIVE
    if kind is None:
        return "of unknown type"
    if not os.path.isfile(path):
        return "not a file, or a broken link" if os.path.lexists(path) else "vanished"
    compressed = path.name.lower().endswith(COMPRESSED)
    # An empty file of the other types was truncated, which reading it reports.
    return _EMPTY if kind not in ("parquet", "arrow") and not compressed and path.stat().st_size == 0 else None
