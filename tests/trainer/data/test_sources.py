"""Which files a source names, and that a message names those that are skipped."""

import os
from pathlib import Path

import pytest

from trainer.common.errors import UserError
from trainer.data.reading.sources import find_files, kind_of, shown


def source_files(source: str) -> list[Path]:
    return find_files(source).read


def skipped_line(source: Path | str) -> str | None:
    return find_files(str(source)).skipped_line(str(source))


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return root


def found(source) -> list[str]:
    """Names of the files that are read, relative to the source where it is a folder."""
    return [os.path.relpath(file, source if os.path.isdir(source) else "/") for file in source_files(str(source))]


def skipped(source) -> dict[str, str]:
    return {path.name: reason for path, reason in find_files(str(source)).skipped}


def message_of(source) -> str:
    with pytest.raises(UserError) as error:
        source_files(str(source))
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.txt", "plain"),
        ("a.b.MARKDOWN", "plain"),
        ("a.rst.Xz", "plain"),
        ("a.JSONL", "json"),
        ("a.ndjson.zstd", "json"),
        ("a.json.gz", "json"),
        ("a.csv.bz2", "csv"),
        ("a.tsv", "tsv"),
        ("a.snappy.parquet", "parquet"),
        ("a.feather", "arrow"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.docx", None),
        ("txt", None),
        ("a.jsonl.tmp", None),
        ("a.jsonl~", None),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_python_stdlib_is_its_own_sources_and_stable():
    files = source_files("python-stdlib")
    assert files == sorted(files) and len(files) > 300
    assert any(file.name == "argparse.py" for file in files)
    assert not any({"site-packages", "dist-packages"} & set(file.parts) for file in files)


def test_folder_in_the_order_of_paths_and_what_is_skipped(tmp_path):
    data = make(tmp_path, "c.JSONL", "b/a.jsonl.gz", "a.txt", "b.docx", "B.pdf", "x.jsonl.tmp", "d.tar.gz", "~e.txt~")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.parquet").touch()  # cut off: reading it says so
    assert found(data) == ["a.txt", "b/a.jsonl.gz", "c.JSONL", "empty.parquet"]
    assert skipped(data) == {
        "B.pdf": "of unknown type",
        "b.docx": "of unknown type",
        "x.jsonl.tmp": "of unknown type",
        "~e.txt~": "of unknown type",
        "d.tar.gz": "to be unpacked first",
        "empty.txt": "empty",
    }
    said = skipped_line(data)
    assert said is not None and said.isprintable()
    assert said.startswith(
        f"data.source {data}: skipped 4 of unknown type (B.pdf, b.docx, x.jsonl.tmp, ...); 1 to be unpacked first"
    )


def test_nothing_is_said_where_everything_is_read(tmp_path):
    assert skipped_line(str(make(tmp_path, "a.txt", "b/c.md"))) is None
    assert skipped_line("hub:owner/name") is None


def test_hidden_and_tools_files_of_a_folder(tmp_path):
    data = make(
        tmp_path / ".cache" / "data",  # the source itself may be hidden
        *("a.jsonl", "._a.jsonl", ".b.jsonl", ".ipynb_checkpoints/a.jsonl", ".git/x.txt", "__MACOSX/a.txt"),
        *("s/data-0.arrow", "s/cache-1f.arrow", "s/dataset_info.json", "s/state.json", "__pycache__/a.txt"),
    )
    assert found(data) == ["a.jsonl", "s/data-0.arrow"]
    assert skipped(data) == {
        "._a.jsonl": "hidden",
        ".b.jsonl": "hidden",
        ".git": "hidden",
        ".ipynb_checkpoints": "hidden",
        "__MACOSX": "kept by a tool",
        "__pycache__": "kept by a tool",
        "cache-1f.arrow": "of metadata of the `datasets` library",
        "dataset_info.json": "of metadata of the `datasets` library",
        "state.json": "of metadata of the `datasets` library",
    }


def test_notes_are_documents_unless_they_lie_beside_records(tmp_path):
    data = make(
        tmp_path, "code/README.md", "code/a.py", "set/README.md", "set/LICENSE.txt", "set/a.parquet", "set/b.txt"
    )
    assert found(data) == ["code/README.md", "code/a.py", "set/a.parquet", "set/b.txt"]
    assert skipped(data) == {"README.md": "of notes next to records", "LICENSE.txt": "of notes next to records"}


def test_what_is_named_outright_is_read(tmp_path):
    make(tmp_path, ".hidden.jsonl", ".git/state.json", "README.md", "a.jsonl", "b.docx")
    for name in (".hidden.jsonl", ".git/state.json", "README.md"):
        assert source_files(str(tmp_path / name)) == [tmp_path / name]
    assert source_files(str(tmp_path / ".*" / "*.json")) == [tmp_path / ".git/state.json"]
    assert [file.name for file in source_files(str(tmp_path / "*"))] == ["README.md", "a.jsonl"]
    assert skipped(tmp_path / "*") == {"b.docx": "of unknown type"}


def test_folder_whose_name_looks_like_a_glob(tmp_path):
    assert found(make(tmp_path / "data [v2]*", "a.txt")) == ["a.txt"]


def test_links(tmp_path):
    data = make(tmp_path / "data", "a.txt", "b/c.txt")
    make(tmp_path / "elsewhere", "d.txt")
    (data / "b" / "loop").symlink_to(data)
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "file.txt").symlink_to(tmp_path / "elsewhere" / "d.txt")
    (data / "broken.txt").symlink_to(tmp_path / "nowhere")
    (data / "self.txt").symlink_to(data / "self.txt")
    assert found(data) == ["a.txt", "b/c.txt", "file.txt", "linked/d.txt"]
    assert skipped(data) == {
        "loop": "reached twice through links",
        "broken.txt": "not a file, or a broken link",
        "self.txt": "not a file, or a broken link",
    }
    every = source_files(f"{data}/**/*.txt")
    # Each file once, by the shortest of its names.
    assert [os.path.relpath(file, data) for file in every] == ["a.txt", "b/c.txt", "file.txt"]


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "skipped 1 not a file, or a broken link (pipe.txt): no file found" in message_of(tmp_path)
    for source in (tmp_path / "pipe.txt", "/dev/null"):
        assert f"{source}: cannot be read (it is a device, a pipe or a socket)" in message_of(source)
    assert "a.txt: cannot be read (no such file or directory)" in message_of(tmp_path / "a.txt")
    assert "cannot be read (file name too long)" in message_of(tmp_path / ("a" * 300))


def test_names_that_are_not_text(tmp_path):
    name = os.fsdecode(b"\xff\xfe\n.docx")
    make(tmp_path, name, os.fsdecode(b"\xff.txt"), "ж.txt")
    assert [file.name for file in source_files(str(tmp_path))] == ["ж.txt", os.fsdecode(b"\xff.txt")]
    said = skipped_line(tmp_path)
    assert said is not None and said.isprintable() and r"(\xff\xfe\n.docx)" in said
    assert shown("a\tb") == r"a\tb"


@pytest.mark.parametrize(
    "source", ["", "a" * 5000, "x\0y", "x\0*", "~nobody-here/x.txt", "[", "x\ud800", "**/" * 300 + "[!", "hub"]
)
def test_no_path_at_all(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "data.source" in message_of(source) and ".parquet" in message_of(source)


def test_nothing_to_read(tmp_path):
    make(tmp_path, "only.docx")
    for source in (tmp_path / "*.jsonl", tmp_path):
        assert "no file found" in message_of(source) and ".parquet" in message_of(source)
    assert "1 of unknown type (only.docx)" in message_of(tmp_path)
    assert message_of(tmp_path / "only.docx").startswith(f"{tmp_path}/only.docx: is of unknown type; allowed are .txt")


def test_named_file_that_cannot_be_read(tmp_path):
    make(tmp_path, "a.zip")
    (tmp_path / "a.txt").touch()
    assert (
        message_of(tmp_path / "a.zip")
        == f"{tmp_path}/a.zip: is an archive; unpack it and name the folder with its files"
    )
    assert message_of(tmp_path / "a.txt").startswith(f"{tmp_path}/a.txt: is empty")
    assert "1 empty (a.txt)" in message_of(tmp_path)


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "b/c.txt")
    listdir = os.listdir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert message_of(tmp_path).startswith(f"{tmp_path}/b: the folder cannot be listed (permission denied)")
