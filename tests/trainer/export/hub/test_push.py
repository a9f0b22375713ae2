"""Uploads, against a stand-in for the hub, and what goes wrong with them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import get_session, httpx

from tests.trainer.export.hub.hub_server import REPO, TOKEN, Hub, serving
from tests.trainer.export.test_export import invoke, trained
from trainer.common.errors import Unavailable, UserError
from trainer.export.hub import push as module
from trainer.export.hub.push import check_push, push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one, with a token for it and without xet."""
    hub = Hub()
    with serving(hub):
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# name\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_export_is_pushed_whole(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, out = trained("unipool")[0], tmp_path / "out"
    done = invoke("export", str(run), str(out), "--push-to-hub", REPO, "--private")
    assert done.exit_code == 0, done.output
    assert f"pushed to {hub.endpoint}/{REPO}" in done.stdout
    assert hub.files == contents(out) and {"README.md", "config.json", "model.safetensors"} <= hub.files.keys()
    assert hub.private and hub.commits == ["Export of step_00000001"]
    assert TOKEN not in done.output + done.stderr + caplog.text
    # Pushed again in parts, it leaves no weights of before behind; what others have added stays.
    hub.files["notes.txt"] = b"kept"
    again = tmp_path / "again"
    assert invoke("export", str(run), str(again), "--shard-size", "20KB", "--push-to-hub", REPO).exit_code == 0
    assert hub.files == contents(again) | {"notes.txt": b"kept"} and "model.safetensors" not in hub.files


def test_nothing_is_pushed_if_the_export_fails(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    failed = invoke("export", str(trained("dense")[0]), str(tmp_path / "file"), "--push-to-hub", REPO)
    assert isinstance(failed.exception, UserError) and hub.calls == ["GET /api/whoami-v2"]


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, folder: Path) -> None:
    hub.files = {}
    with pytest.raises(UserError, match="exists and is public, but --private was given; nothing was uploaded"):
        push(folder, REPO, True, "message")
    assert hub.files == {}


ERRORS = [
    ("api/repos/create", 403, "not in this namespace", "has no right to write there (not in", UserError),
    ("api/repos/create", 500, "on fire", "has failed with status 500 (on fire", Unavailable),
    ("preupload", 403, "read only", "has no right to write there (read only", UserError),
    ("validate-yaml", 400, "license is unknown", "status 400 (Invalid metadata in README.md. - license is", UserError),
    ("/upload/", 422, "bad file", "status 422 (Error while uploading 'model.safetensors' to the Hub.: bad", UserError),
    ("commit", 413, "too large", "refused it with status 413 (too large", UserError),
]


@pytest.mark.parametrize("part, status, message, said, kind", ERRORS)
def test_what_the_hub_refuses_is_said_in_one_line(
    part: str, status: int, message: str, said: str, kind: type, hub: Hub, folder: Path
) -> None:
    hub.answers = {part: (status, message)}
    with pytest.raises(UserError) as error:
        push(folder, REPO, False, "message")
    line = str(error.value)
    assert type(error.value) is kind and said in line and "\n" not in line and not hub.commits
    assert line.startswith(f"--push-to-hub {REPO}: ") and line.endswith(f"`hf upload {REPO} {folder}` uploads it")


def test_the_command_that_repeats_a_private_upload_is_private(hub: Hub, folder: Path) -> None:
    """It may be the one that creates the repository."""
    hub.answers = {"api/repos/create": (500, "on fire")}
    with pytest.raises(Unavailable, match=f"`hf upload {REPO} {folder} --private` uploads it"):
        push(folder, REPO, True, "message")


def test_what_is_checked_before_the_export(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(repo: str = REPO) -> str:
        with pytest.raises(UserError) as error:
            check_push(repo)
        assert "\n" not in str(error.value) and TOKEN not in str(error.value)
        return str(error.value)

    check_push(REPO)
    assert "must be OWNER/NAME" in refused("name") and "must be OWNER/NAME" in refused("a/b/c")
    hub.answers = {"whoami": (403, f"the token {TOKEN} is no good")}
    assert "the token *** is no good" in refused()
    hub.answers = {}
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "0")
    assert "the hub does not accept the token; set HF_TOKEN to another" in refused()
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token; set HF_TOKEN" in refused()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Unavailable, match="the hub cannot be reached"):
        check_push(REPO)


def test_a_hub_that_does_not_answer(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ANSWER_SECONDS", httpx.Timeout(60.0, read=0.2))  # a busy machine connects slowly
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for act in (lambda: check_push(REPO), lambda: push(folder, REPO, False, "message")):
            with pytest.raises(Unavailable, match="the hub cannot be reached .ReadTimeout.; try again later"):
                act()
    assert get_session().timeout.read is None, "other requests have limits of their own"


def test_options_that_contradict_each_other() -> None:
    for arguments in (("--private",), ("--push-to-hub", REPO, "--format", "safetensors"), ("--shard-size", "5 apples")):
        assert isinstance(invoke("export", "run", "out", *arguments).exception, UserError)
