"""Files to one repository of the Hub, in one commit and one tag, through ``huggingface_hub``.

The token is the Hub's own login or environment and is never seen here. Files that the repository
already holds are not sent again, so that the same command continues an upload that was cut off.
Whatever goes wrong ends in one line that says what to do.

Knows files and repositories; nothing of shards or models.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from feedback.errors import BackendError, InputError, RlaifError
from feedback.progress import ProgressBar
from feedback.publish_manifest import MANIFEST, parse, published_files
from feedback.shards import file_sha256

__all__ = ["HubRepository"]

_OWN = {".gitattributes"}
"""What the Hub itself puts into a new repository."""
_FILES_AT_ONCE = 4


class HubRepository:
    """One repository, as whoever is logged in may see it.

    Args:
        name: ``user/name``, or ``name`` for the user's own.
        kind: dataset or model.
        public: a repository that is not there yet is made public.

    Raises:
        InputError: there is no token that may write here, or the repository is of another kind of
            visibility, or holds files that were not published by this toolkit.
        BackendError: the Hub could not be reached.
    """

    def __init__(self, name: str, kind: Literal["dataset", "model"], *, public: bool):
        from huggingface_hub import HfApi

        self.kind = kind
        self.public = public
        self.name = name
        self._api = HfApi()
        with self._errors():
            user = self._api.whoami()
            self.name = name if "/" in name else f"{user['name']}/{name}"
            self._require_write(user)
            self._head = self._find()
            self._remote = self._list() if self._head else {}
        self._manifest = self._read_manifest()
        self._require_ours()

    @property
    def address(self) -> str:
        """Return where people find it."""
        middle = "datasets/" if self.kind == "dataset" else ""
        return f"{self._api.endpoint}/{middle}{self.name}"

    @staticmethod
    def _require_write(user: Mapping[str, Any]) -> None:
        token = (user.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise InputError(
                "the Hub's token may only read; log in with one that may write (hf auth login)"
            )

    def _find(self) -> str | None:
        """Return the newest commit, or None where there is no such repository."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self._api.repo_info(self.name, repo_type=self.kind)
        except RepositoryNotFoundError:
            return None
        if info.private is self.public:
            now, asked = ("private", "--public True") if self.public else ("public", "no --public")
            raise InputError(
                f"{self.name} is {now}, and you gave {asked}: nothing was published; give another "
                "--repo, or change one of the two"
            )
        return str(info.sha)

    def _list(self) -> dict[str, str]:
        """Return the hash of each file: sha256 of large ones, git's sha1 of the others."""
        tree = self._api.list_repo_tree(
            self.name, repo_type=self.kind, recursive=True, revision=self._head
        )
        files = [entry for entry in tree if type(entry).__name__ == "RepoFile"]
        return {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in files}

    def _read_manifest(self) -> dict[str, Any] | None:
        if MANIFEST not in self._remote:
            return None
        with self._errors(), tempfile.TemporaryDirectory(prefix="rlaif-hub-") as folder:
            path = self._api.hf_hub_download(
                self.name, MANIFEST, repo_type=self.kind, revision=self._head, cache_dir=folder
            )
            return parse(Path(path).read_bytes())

    def _require_ours(self) -> None:
        """Refuse a repository with other people's files, or the user's own other ones."""
        foreign = sorted(set(self._remote) - _OWN)
        if foreign and self._manifest is None:
            raise InputError(
                f"the name {self.name} is taken: it holds {foreign[0]} and was not published by "
                "rlaif; give another --repo"
            )

    def publication(self) -> dict[str, Any] | None:
        """Return the manifest of the publication that is there, if it is whole."""
        if self._manifest is None:
            return None
        for file in self._manifest["files"]:
            if self._remote.get(file["path"]) != file["sha256"]:
                return None
        return self._manifest

    def stale(self, files: Iterable[str]) -> set[str]:
        """Return files of the version that is there, which ``files`` lacks."""
        return (set(published_files(self._manifest)) - set(files)) & set(self._remote)

    def commit(
        self,
        files: Mapping[str, Path | bytes],
        message: str,
        *,
        tag: str,
        stale: Iterable[str] = (),
    ) -> bool:
        """Bring the repository to these files in one commit, tagged; return whether it changed.

        Args:
            files: content by path in the repository; files already there cost nothing.
            message: of the commit.
            tag: moved to the commit, or made.
            stale: paths to delete.

        Raises:
            InputError: the Hub refused.
            BackendError: the Hub or the way to it failed; the same command continues.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        changed = {
            path: content
            for path, content in files.items()
            if self._remote.get(path) not in _hashes(content)
        }
        gone = [path for path in stale if path in self._remote]
        with self._errors():
            if self._head is None:
                self._api.create_repo(
                    self.name, repo_type=self.kind, private=not self.public, exist_ok=True
                )
            head = self._head
            if changed or gone:
                additions = [CommitOperationAdd(path, content) for path, content in changed.items()]
                self._upload(additions)
                done = self._api.create_commit(
                    self.name,
                    [*additions, *(CommitOperationDelete(path) for path in gone)],
                    commit_message=message,
                    repo_type=self.kind,
                    parent_commit=self._head,
                )
                head = done.oid
            moved = self._tag(tag, str(head))
        return bool(changed or gone) or moved

    def _upload(self, additions: list[Any]) -> None:
        """Send the large files; those that the Hub has already are skipped by their hash."""
        import sys

        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        left = iter(additions)
        with ProgressBar("uploading files", len(additions)) as bar:
            while some := list(itertools.islice(left, _FILES_AT_ONCE)):
                self._api.preupload_lfs_files(
                    self.name, some, repo_type=self.kind, free_memory=False
                )
                bar.advance(len(some), note=some[-1].path_in_repo)

    def _tag(self, tag: str, head: str) -> bool:
        """Make the tag point to ``head``; return whether it did not."""
        refs = self._api.list_repo_refs(self.name, repo_type=self.kind)
        at = {ref.name: ref.target_commit for ref in refs.tags}
        if at.get(tag) == head:
            return False
        if tag in at:
            self._api.delete_tag(self.name, tag=tag, repo_type=self.kind)
        self._api.create_tag(self.name, tag=tag, revision=head, repo_type=self.kind)
        return True

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn whatever the Hub's client raises into one line."""
        from huggingface_hub.errors import HfHubHTTPError

        # httpx in huggingface_hub 1, httpx2 in 2: the client's own error names the right one.
        network = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
        try:
            yield
        except RlaifError:
            raise
        except (network, OSError, RuntimeError, ValueError) as error:
            raise self._translated(error) from error

    def _translated(self, error: BaseException) -> RlaifError:
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalTokenNotFoundError,
            OfflineModeIsEnabled,
        )

        chain = list(_causes(error))
        if any(isinstance(one, LocalTokenNotFoundError) for one in chain):
            return InputError("no token for the Hub: run hf auth login, or set HF_TOKEN")
        if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
            return InputError("HF_HUB_OFFLINE is set: unset it to publish, or use --to DIR")
        if any(isinstance(one, HFValidationError) for one in chain):
            return InputError(f"--repo {self.name!r} is no name that the Hub takes (user/name)")
        answers = [one.response for one in chain if isinstance(one, HfHubHTTPError)]
        if answers and answers[0] is not None:
            return self._answered(answers[0])
        reason = " ".join(str(chain[-1]).split()) or type(chain[-1]).__name__
        return BackendError(
            f"the connection to {self._api.endpoint} failed ({reason[:200]}); what was uploaded is "
            "kept: run the same command again to continue"
        )

    def _answered(self, answer: Any) -> RlaifError:
        status = answer.status_code
        said = " ".join(str(answer.headers.get("X-Error-Message") or answer.reason_phrase).split())
        refusals = {
            401: "the Hub did not accept the token (expired, revoked or none): run hf auth login, "
            "or set HF_TOKEN",
            403: f"the Hub's token may not write to {self.name}: use a token that may, or another "
            "--repo",
            404: f"the Hub shows no {self.kind} {self.name} to this token: check the name, and "
            "that the token may see it",
            409: f"the name {self.name} is taken; give another --repo",
            412: f"{self.name} was changed meanwhile; run the same command again",
        }
        if status in refusals:
            return InputError(f"{refusals[status]} ({status}: {said})")
        if status < 500 and status != 429:
            return InputError(f"the Hub refused ({status}: {said})")
        return BackendError(
            f"the Hub failed ({status}: {said}); what was uploaded is kept: run the same command "
            "again to continue"
        )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, outermost first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _hashes(content: Path | bytes) -> tuple[str, str]:
    """Return the sha256 of a file and git's sha1 of it, one of which the Hub knows it by."""
    if isinstance(content, bytes):
        head = f"blob {len(content)}\0".encode()
        return hashlib.sha256(content).hexdigest(), hashlib.sha1(head + content).hexdigest()
    digest = hashlib.sha1(f"blob {content.stat().st_size}\0".encode())
    with content.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return file_sha256(content), digest.hexdigest()
