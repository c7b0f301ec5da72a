"""Publishing to a server that speaks the Hub's API: one commit, one tag, many faults."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_server import EXPIRED, READ_ONLY, TOKEN, HubServer, Repository
from published_rows import ROWS

from feedback.errors import InputError
from feedback.publish import PublishOptions, publish
from feedback.shards import ShardWriter
from train.cli import main

# The Hub's own client sends files in a way that its HTTP library warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A fresh server, which the Hub's client in this process talks to, without its waits."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        close_session()
        yield server
        close_session()


def shards(folder: Path, kind: str, rows: list[Any], **info: object) -> Path:
    with ShardWriter[Any](folder / kind, kind) as writer:
        for row in rows:
            writer.append(row)
        writer.finish(info)
    return folder / kind


@pytest.fixture
def labels(tmp_path: Path) -> tuple[Path, ...]:
    return tuple(shards(tmp_path / "run", kind, ROWS[kind]) for kind in ("preferences", "rankings"))


def options(folders: tuple[Path, ...], **more: Any) -> PublishOptions:
    return PublishOptions(folders=folders, **{"repo": "data", "license": "mit", **more})


def parquet(repository: Repository) -> list[str]:
    return [path for path in repository.commits[-1][2] if path.endswith(".parquet")]


def test_one_private_commit_with_a_tag_and_then_nothing(
    hub: HubServer, labels: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    address = publish(options(labels))
    repository = hub.repository("ann/data")
    assert address == f"{hub.url}/datasets/ann/data"
    assert repository.private
    assert len(repository.commits) == 2  # the Hub's own, and ours
    (tag,) = repository.tags
    assert repository.tags[tag] == repository.commits[-1][0]
    assert tag.startswith("manifest-") and tag in repository.commits[-1][1]
    assert parquet(repository) == [
        "preferences/train-00000.parquet",
        "rankings/train-00000.parquet",
    ]
    assert not list(labels[0].parent.glob(".publish-*"))
    capsys.readouterr()
    publish(options(labels))
    assert "nothing has changed" in capsys.readouterr().out
    assert len(repository.commits) == 2


def test_another_card_is_a_commit_of_the_card(hub: HubServer, labels: tuple[Path, ...]) -> None:
    publish(options(labels))
    received = hub.received
    publish(options(labels, license="cc0-1.0"))
    repository = hub.repository("ann/data")
    before, after = (files for _, _, files in repository.commits[1:])
    assert {path for path in after if after[path] != before[path]} == {"README.md"}
    assert hub.received == received
    assert list(repository.tags.values()) == [repository.commits[-1][0]]


def test_another_version_takes_away_the_files_of_the_last(
    hub: HubServer, labels: tuple[Path, ...], tmp_path: Path
) -> None:
    publish(options(labels))
    other = shards(tmp_path / "later", "preferences", ROWS["preferences"][:1])
    publish(options((other,)))
    repository = hub.repository("ann/data")
    assert parquet(repository) == ["preferences/train-00000.parquet"]
    assert "manifests/rankings.json" not in repository.commits[-1][2]
    assert ".gitattributes" in repository.commits[-1][2]
    assert len(repository.tags) == 2 and len(repository.commits) == 3


def test_a_failure_in_mid_upload_is_waited_out(hub: HubServer, labels: tuple[Path, ...]) -> None:
    hub.fault("PUT", "/lfs/", status=500, times=2)
    hub.fault("PUT", "/lfs/", "cut", times=1)
    publish(options(labels))
    assert len(hub.repository("ann/data").commits) == 2


FAULTS = {
    "500 in mid-upload": ("PUT", "/lfs/", {"skip": 1}, "the Hub failed (500"),
    "dropped connection": ("PUT", "/lfs/", {"kind": "cut", "skip": 1}, "connection to http"),
    "500 at the commit": ("POST", "/commit/", {}, "the Hub failed (500"),
    "answer to the commit lost": ("POST", "/commit/", {"kind": "lost"}, "connection to http"),
    "no tag": ("POST", "/tag/", {}, "the Hub failed (500"),
    "too many requests": ("POST", "/preupload/", {"status": 429}, "the Hub failed (429"),
    "no rights": ("POST", "/commit/", {"status": 403}, "may not write to ann/data"),
    "someone else was faster": ("POST", "/commit/", {"status": 412}, "was changed meanwhile"),
    "taken meanwhile": ("POST", "/repos/create", {"status": 403}, "may not write to ann/data"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_and_the_same_command_continues(
    name: str, hub: HubServer, labels: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    method, path, more, said = FAULTS[name]
    hub.fault(method, path, times=99, **more)
    words = ["publish", *map(str, labels), "--repo", "data", "--license", "mit"]
    assert main(words) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith("error: ") and said in line
    assert TOKEN not in line
    hub.faults.clear()
    assert main(words) == 0
    repository = hub.repository("ann/data")
    assert len(repository.commits) == 2, "a retry makes no second commit"
    assert list(repository.tags.values()) == [repository.commits[-1][0]]
    large = [file for file in repository.commits[-1][2].values() if file.sha256]
    assert hub.received == sum(file.size for file in large), "no file is sent twice"
    assert not list(labels[0].parent.glob(".publish-*"))


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        (EXPIRED, "data", "did not accept the token"),
        (None, "data", "no token for the Hub"),
        (READ_ONLY, "data", "may only read"),
        (TOKEN, "bob/data", "may not write to bob/data"),
        (TOKEN, "a/b/c", "no name that the Hub takes"),
    ],
)
def test_without_the_right_nothing_is_read(
    token: str | None,
    repo: str,
    said: str,
    hub: HubServer,
    labels: tuple[Path, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert main(["publish", *map(str, labels), "--repo", repo, "--license", "mit"]) == 2
    seen = capsys.readouterr()
    assert re.fullmatch(rf"error: .*{re.escape(said)}.*\n", seen.err.replace("\r", ""))
    assert not hub.repositories
    assert token is None or token not in seen.err


def test_a_name_that_holds_something_else_is_taken(
    hub: HubServer, labels: tuple[Path, ...]
) -> None:
    held = hub.create("datasets", "ann/data", private=True)
    hub.commit(held, "by hand", {**held.commits[-1][2], "mine.csv": hub.store(b"a,b\n")})
    with pytest.raises(InputError, match=r"ann/data is taken: it holds mine\.csv"):
        publish(options(labels))
    assert len(held.commits) == 2


def test_an_empty_repository_is_used_and_its_visibility_kept(
    hub: HubServer, labels: tuple[Path, ...]
) -> None:
    hub.create("datasets", "ann/data", private=False)
    with pytest.raises(InputError, match="is public, and you gave no --public"):
        publish(options(labels))
    publish(options(labels, public=True))
    assert not hub.repository("ann/data").private
    publish(options(labels, repo="ann/new", public=True))
    assert not hub.repository("ann/new").private
    hub.create("datasets", "ann/closed", private=True)
    with pytest.raises(InputError, match="is private, and you gave --public"):
        publish(options(labels, repo="ann/closed", public=True))


def test_a_damaged_publication_is_made_whole(hub: HubServer, labels: tuple[Path, ...]) -> None:
    publish(options(labels))
    repository = hub.repository("ann/data")
    files = dict(repository.commits[-1][2])
    del files["preferences/train-00000.parquet"]
    hub.commit(repository, "a file deleted by hand", files)
    publish(options(labels))
    assert len(parquet(repository)) == 2
    assert list(repository.tags.values()) == [repository.commits[-1][0]]


def test_what_is_there_is_not_sent_again(labels: tuple[Path, ...], hub: HubServer) -> None:
    """What a later publish of more rows sends is only what is new."""
    publish(options(labels))
    received = hub.received
    more = [replace(row, prompt_id=f"more-{row.prompt_id}") for row in ROWS["preferences"]]
    folder = shards(labels[0].parent / "more", "preferences", [*ROWS["preferences"], *more])
    publish(options((folder, labels[1])))
    sent = [file for file in hub.repository("ann/data").commits[-1][2].values() if file.sha256]
    rankings = hub.repository("ann/data").commits[-1][2]["rankings/train-00000.parquet"]
    assert hub.received - received == sum(file.size for file in sent) - rankings.size


def test_files_go_to_xet_storage_where_the_client_speaks_it(
    hub: HubServer, labels: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = True
    publish(options(labels))
    assert any((hub.folder / "xet").rglob("*"))
    assert not hub.received
    files = hub.repository("ann/data").commits[-1][2]
    manifest = json.loads(hub.path_of(files["manifest.json"]).read_text(encoding="utf-8"))
    for file in manifest["files"]:
        assert (files[file["path"]].sha256, files[file["path"]].size) == (
            file["sha256"],
            file["bytes"],
        )
    publish(options(labels))
    assert len(hub.repository("ann/data").commits) == 2
