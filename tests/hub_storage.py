"""Storage of the test server for the Hub: objects in a folder, by hash, and repositories with commits."""

import hashlib
import tempfile
from base64 import b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Refused(Exception):
    """Raised to send an error response, with the same content in headers and body as a response of the Hub."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any):
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more

    def headers(self) -> dict[str, str]:
        headers = {"X-Error-Message": self.message, "X-Request-Id": "Root=1-test"}
        return headers | ({"X-Error-Code": self.code} if self.code else {})


@dataclass
class Faults:
    """Failures to simulate on a server.

    Attributes:
        fail_upload_after_bytes: Bytes of an upload (PUT) after which the connection is closed.
        silent_uploads: Number of uploads that are answered so late that clients should time out.
        quota_bytes: Limit for the total size of all LFS files in bytes. An upload that would exceed it is refused with
            `quota_status`. None: no limit.
        quota_status: HTTP status of the response if the quota is exceeded.
        concurrent_commit: Whether another user commits to the branch just before the next commit.
        commit_statuses: HTTP error statuses with which the next commits are refused, one per commit.
        commit_message: Error message of the responses with `commit_statuses`.
        lost_commit_replies: Number of commits that are made, but whose response is lost.
        late_commit: Whether the next commit is made but answered with status 412, as if an earlier attempt of the
            client had arrived late and had made the commit.
        answers: Name of a call, such as "info" or "commit" -> (status, headers, body) of a fixed response.
    """

    fail_upload_after_bytes: int | None = None
    silent_uploads: int = 0
    quota_bytes: int | None = None
    quota_status: int = 403
    concurrent_commit: bool = False
    commit_statuses: list[int] = field(default_factory=list)
    commit_message: str = "Internal Server Error"
    lost_commit_replies: int = 0
    late_commit: bool = False
    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class Blob:
    """A version of a file.

    Attributes:
        oid: Git hash of the file or, if the file is in LFS, of its LFS pointer.
        size: Size of the file in bytes.
        sha256: SHA-256 of the file if it is in LFS, otherwise None.
    """

    oid: str
    size: int
    sha256: str | None = None

    def entry(self, path: str) -> dict[str, Any]:
        """Return the JSON object that describes the file in the Hub's list of the files of a repository."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """A repository.

    Attributes:
        private: Whether the repository is private.
        commits_by_oid: Hash -> commit.
        branches: Name of a branch -> hash of its last commit.
        pulls: Name of a pull request, such as `refs/pr/1` -> hash of its last commit.
    """

    private: bool
    commits_by_oid: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        oid = {**self.branches, **self.pulls}.get(revision, revision)
        if oid not in self.commits_by_oid:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits_by_oid[oid]

    def commit(self, revision: str, title: str, added: Mapping[str, Blob], deleted: Iterable[str] = ()) -> Commit:
        refs = self.pulls if revision in self.pulls else self.branches
        if revision not in refs:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent = self.at(revision)
        if missing := set(deleted) - set(parent.files):
            raise Refused(404, f"A file with this name doesn't exist: {missing.pop()}", "EntryNotFound")
        files = {path: blob for path, blob in {**parent.files, **added}.items() if path not in set(deleted)}
        commit = self._add(parent.oid, title, files)
        refs[revision] = commit.oid
        return commit

    def open_pull(self, revision: str) -> str:
        """Open a pull request that starts at `revision` (a branch or commit hash), and return its name."""
        name = f"refs/pr/{len(self.pulls) + 1}"
        self.pulls[name] = self.at(revision).oid
        return name

    def history(self, revision: str) -> list[Commit]:
        """Return the commits of a branch, pull request or commit hash, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent:
            commits.append(self.commits_by_oid[commits[-1].parent])
        return commits

    def start(self, files: Mapping[str, Blob]) -> None:
        self.branches["main"] = self._add(None, "initial commit", files).oid

    def _add(self, parent: str | None, title: str, files: Mapping[str, Blob]) -> Commit:
        content = repr((parent, title, sorted(files.items()), len(self.commits_by_oid)))
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, title, files)
        self.commits_by_oid[commit.oid] = commit
        return commit


class Storage:
    """Files and repositories of the test server.

    Attributes:
        folder: Folder with the content of all files, named by hash: `lfs/` for LFS files, `git/` for others.
        repos: (kind, "owner/name") -> repository; the kind is "models", "datasets" or "spaces".
    """

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("git", "lfs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.repos: dict[tuple[str, str], Repo] = {}

    def create(self, kind: str, name: str, private: bool) -> Repo:
        """Create a repository with only the file .gitattributes, as the Hub does."""
        repo = self.repos[kind, name] = Repo(private)
        repo.start({".gitattributes": self.add(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", lfs=False)})
        return repo

    def add(self, data: bytes, lfs: bool) -> Blob:
        if lfs:
            sha256 = hashlib.sha256(data).hexdigest()
            (self.folder / "lfs" / sha256).write_bytes(data)
            return self._lfs_blob(sha256)
        blob = Blob(hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), len(data))
        self.path(blob).write_bytes(data)
        return blob

    def receive(self, sha256: str, chunks: Iterable[bytes]) -> None:
        """Store an uploaded LFS file in chunks as they arrive. Raises Refused if its SHA-256 is not `sha256`."""
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            Path(file.name).unlink()
            raise Refused(400, "The SHA-256 of the uploaded file differs from the announced one")
        Path(file.name).rename(self.folder / "lfs" / sha256)

    def blobs_of(self, lines: list[dict[str, Any]]) -> dict[str, Blob]:
        """Return the files that a commit request adds, by path.

        Args:
            lines: Lines of the request body, each a JSON object with "key" (type of the operation) and "value".
        """
        blobs = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                blobs[value["path"]] = self.add(b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if not self.has(value["oid"]):
                    raise Refused(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                blobs[value["path"]] = self._lfs_blob(value["oid"])
        return blobs

    def has(self, sha256: str) -> bool:
        return (self.folder / "lfs" / sha256).is_file()

    def lfs_bytes(self) -> int:
        return sum(path.stat().st_size for path in (self.folder / "lfs").iterdir())

    def path(self, blob: Blob) -> Path:
        return self.folder / "lfs" / blob.sha256 if blob.sha256 else self.folder / "git" / blob.oid

    def _lfs_blob(self, sha256: str) -> Blob:
        size = (self.folder / "lfs" / sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Blob(hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(), size, sha256)
