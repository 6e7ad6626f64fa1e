"""A test server that behaves like the Hugging Face Hub, for the real client (huggingface_hub) over HTTP.

    with HubServer(tmp_path / "hub") as hub:
        hub.store("us/model", folder)
        subprocess.run(command, env={**os.environ, **hub.environment(tmp_path / "home")})

The server supports the calls that huggingface_hub 2.4 makes without Xet (the Hub's storage protocol), and stores the
uploaded files. It stops at the end of the `with` block.
"""

import json
import os
import re
import shutil
import threading
import time
import urllib.parse
from base64 import b64decode
from pathlib import Path, PurePosixPath

from hub_http import CHUNK, Dropped, HttpHandler, HttpServer
from hub_storage import Faults, Refused, Repo, Storage

TOKEN = "hf_" + "AnaMayWriteToUs" * 2 + "0000"  # of the user ana, who may write to "us"; looks like a real token
READ_TOKEN = "hf_" + "BobMayReadOnly0" * 2 + "0000"  # of the user bob, who may not write to "us"
SIGNATURE = "5162ed" * 8  # secret in the upload URLs, as on the Hub; commands must never print it
PROJECT = Path(__file__).resolve().parents[1]
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".tar", ".onnx", ".data")
SILENCE_S = 10  # seconds until the server answers a silent upload; longer than the time-out of clients in the tests
LFS_BYTES = 10 * 2**20  # files larger than this are stored in LFS, whatever their name
QUOTA = "Private repository storage limit reached, please upgrade your plan to increase your private storage limit."
FILES = r"/(?P<kind>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)"
REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
ROUTES = [
    (method, re.compile(path), action)
    for method, path, action in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", REPO, "info"),
        ("GET", REPO + r"/revision/(?P<revision>[^/]+)", "info"),
        ("GET", REPO + r"/auth-check(?P<write>/write)?", "auth_check"),
        ("GET", REPO + r"/refs", "refs"),
        ("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", REPO + r"/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", REPO + r"/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", REPO + r"/branch/(?P<branch>[^/]+)", "create_branch"),
        ("POST", FILES + r"\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs-upload/(?P<sha256>[0-9a-f]{64})", "lfs_put"),
        ("GET", FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
]


class HubServer:
    """A test server for the Hub, which runs in a thread while its `with` block is active.

    Attributes:
        url: URL of the server, for `HF_ENDPOINT`.
        storage: Repositories, and the contents of their files.
        faults: Failures to simulate; may be changed at any time.
        users: Token -> user name.
        writable: User name -> namespaces that the user may write to.
        requests: (method, path) of all requests, in order.
        uploaded: Bytes received by PUT requests, including interrupted ones.
        fetched: "owner/name/path" of all downloaded files.
        page_size: Number of files in one response to a request for the files of a repository.
    """

    def __init__(self, folder: Path):
        self.storage, self.faults = Storage(folder), Faults()
        self.users = {TOKEN: "ana", READ_TOKEN: "bob"}
        self.writable = {"ana": {"ana", "us"}, "bob": {"bob"}}
        self.requests: list[tuple[str, str]] = []
        self.fetched: list[str] = []
        self.uploaded, self.page_size, self.lock = 0, 1000, threading.RLock()

    def __enter__(self) -> "HubServer":
        self._server = HttpServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Return environment variables with which a process uses this server as the Hub, with an empty cache."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
        variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        return variables | {"HF_TOKEN": token or ""}

    def store(self, name: str, folder: Path, kind: str = "models") -> Repo:
        """Create a repository with the files of a folder directly in the storage, without HTTP."""
        repo = self.storage.create(kind, name, private=False)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        added = {path: self.storage.add(data, is_lfs(path, data[:512], len(data))) for path, data in files.items()}
        repo.commit("main", "stored", added)
        return repo

    def repo(self, name: str, kind: str = "models") -> Repo:
        return self.storage.repos[kind, name]

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Return the contents of a repository's files by path, without the `.gitattributes` that the Hub creates."""
        files = self.repo(name, kind).at(revision).files
        return {path: self.storage.path(blob).read_bytes() for path, blob in files.items() if path != ".gitattributes"}

    def commits(self, name: str, revision: str = "main", kind: str = "models") -> list[str]:
        """Return the titles of a repository's commits, newest first, without the initial commit that the Hub makes."""
        return [commit.title for commit in self.repo(name, kind).history(revision)][:-1]


def is_lfs(path: str, sample: bytes, size: int) -> bool:
    """Return whether the Hub stores a file in LFS instead of git, depending on name, first bytes and size."""
    return size > LFS_BYTES or path.endswith(LFS_SUFFIXES) or b"\0" in sample


class _Handler(HttpHandler):
    """Handler of one connection.

    Each method that `ROUTES` names answers one call of the Hub's protocol, or raises `Refused`.
    """

    def answer(self) -> None:
        self.hub: HubServer = self.server.hub
        path, _, query = self.path.partition("?")
        self.query, self.unread = dict(urllib.parse.parse_qsl(query)), self.chunks()
        self.hub.requests.append((self.command, path))
        try:
            action, groups = self._action(path)
            if action in self.hub.faults.answers:
                return self.canned(*self.hub.faults.answers[action])
            self._authenticate()
            if action == "lfs_put":  # uploads run in parallel, and are not held in memory
                return self.lfs_put(**groups)
            self.body = b"".join(self.unread)
            with self.hub.lock:
                getattr(self, action)(**groups)
        except Refused as refused:
            for _ in self.unread:  # the body must be read, because the client reuses the connection
                pass
            self.json({"error": refused.message, **refused.more}, refused.status, refused.headers())
        except (ConnectionError, Dropped):
            self.close_connection = True

    def canned(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Send a fixed response, to simulate the response of a proxy or of a broken Hub."""
        for _ in self.unread:
            pass
        self.head(status, headers, len(body))
        self.wfile.write(body if self.command != "HEAD" else b"")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _action(self, path: str) -> tuple[str, dict[str, str]]:
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, action in ROUTES:
            if route_method == method and (match := pattern.fullmatch(path)):
                groups = {key: urllib.parse.unquote(value) for key, value in match.groupdict().items() if value}
                if "kind" in pattern.groupindex:
                    groups["kind"] = groups.get("kind", "models").rstrip("/")
                return action, groups
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    def _authenticate(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        self.user = self.hub.users.get(token)

    def _repo(self, kind: str, name: str, write: bool = False) -> Repo:
        repo = self.hub.storage.repos.get((kind, name))
        owned = name.split("/")[0] in self.hub.writable.get(self.user, ())
        if repo is None or (repo.private and not owned):
            # Without a token, the Hub does not reveal whether a private repository exists.
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not owned:
            raise Refused(403, "You don't have the rights to write to this repository.")
        return repo

    # --- Accounts and repositories -----------------------------------------------------------------------------------

    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        self.json({"type": "user", "name": self.user, "orgs": []})

    def create(self) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        requested = json.loads(self.body)
        kind, namespace = requested.get("type", "model") + "s", requested.get("organization") or self.user
        name = f"{namespace}/{requested['name']}"
        if namespace not in self.hub.writable[self.user]:
            raise Refused(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{namespace}"')
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if (kind, name) in self.hub.storage.repos:
            raise Refused(409, f"You already created this {kind[:-1]} repo", url=url)
        self.hub.storage.create(kind, name, private=requested.get("visibility") == "private")
        self.json({"url": url, "name": name})

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        repo = self._repo(kind, name)
        files, with_sizes = sorted(repo.at(revision).files.items()), self.query.get("blobs", "").lower() == "true"
        siblings = [{"rfilename": path} | ({"size": blob.size} if with_sizes else {}) for path, blob in files]
        self.json({"id": name, "sha": repo.at(revision).oid, "private": repo.private, "siblings": siblings})

    def auth_check(self, kind: str, name: str, write: str = "") -> None:
        self._repo(kind, name, write=bool(write))
        self.json({})

    def refs(self, kind: str, name: str) -> None:
        heads = self._repo(kind, name).branches.items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in heads]
        self.json({"branches": branches, "tags": [], "converts": []})

    def create_branch(self, kind: str, name: str, branch: str) -> None:
        repo = self._repo(kind, name, write=True)
        repo.branches[branch] = repo.at(json.loads(self.body or b"{}").get("startingPoint", "main")).oid
        self.json({})

    # --- Files -------------------------------------------------------------------------------------------------------

    def tree(self, kind: str, name: str, revision: str, path: str = "") -> None:
        files = self._repo(kind, name).at(revision).files
        prefix = f"{path}/" if path else ""
        inside = {p: blob.entry(p) for p, blob in files.items() if p.startswith(prefix)}
        if path and not inside:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        folders = {str(folder) for p in inside for folder in PurePosixPath(p).parents if str(folder).startswith(prefix)}
        listed = {f: {"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders - {"."}} | inside
        if self.query.get("recursive", "false").lower() != "true":
            listed = {p: entry for p, entry in listed.items() if "/" not in p[len(prefix) :]}
        entries, link = [entry for _, entry in sorted(listed.items())], {}
        start, size = int(self.query.get("cursor", 0)), self.hub.page_size
        if start + size < len(entries):
            query = urllib.parse.urlencode({**self.query, "cursor": start + size})
            link = {"Link": f'<{self.hub.url}{self.path.partition("?")[0]}?{query}>; rel="next"'}
        self.json(entries[start : start + size], headers=link)

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self._repo(kind, name)
        commit = repo.at(revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.sha256 or blob.oid}"'}
        if blob.sha256:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        self.head(200, {**headers, "Content-Type": "application/octet-stream"}, blob.size)
        if self.command == "HEAD":
            return
        self.hub.fetched.append(f"{name}/{path}")
        with self.hub.storage.path(blob).open("rb") as file:
            shutil.copyfileobj(file, self.wfile, CHUNK)

    # --- Uploads -----------------------------------------------------------------------------------------------------

    def validate_yaml(self) -> None:
        self.json({"errors": [], "warnings": []})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name, write="create_pr" not in self.query)
        existing, answers = repo.at(revision).files, []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if is_lfs(file["path"], b64decode(file["sample"]), file["size"]) else "regular"
            blob = existing.get(file["path"])
            answers.append({"path": file["path"], "uploadMode": mode, "oid": blob and (blob.sha256 or blob.oid)})
            answers[-1]["shouldIgnore"] = False
        self.json({"files": answers})

    def lfs_batch(self, kind: str, name: str) -> None:
        self._repo(kind, name)
        objects, missing = [], 0
        for requested in json.loads(self.body)["objects"]:
            answer = {"oid": requested["oid"], "size": requested["size"]}
            if not self.hub.storage.has(requested["oid"]):
                missing += requested["size"]
                upload = f"{self.hub.url}/lfs-upload/{requested['oid']}?X-Amz-Signature={SIGNATURE}"
                answer["actions"] = {"upload": {"href": upload}}
            objects.append(answer)
        quota = self.hub.faults.quota_bytes
        if quota is not None and self.hub.storage.lfs_bytes() + missing > quota:
            raise Refused(self.hub.faults.quota_status, QUOTA)
        self.json({"transfer": "basic", "objects": objects})

    def lfs_put(self, sha256: str) -> None:
        faults = self.hub.faults
        self.hub.storage.receive(sha256, self._counted(faults.fail_upload_after_bytes))
        if faults.silent_uploads:
            faults.silent_uploads -= 1
            time.sleep(SILENCE_S)
        self.json({})

    def _counted(self, limit: int | None):
        """Yield the request body in chunks, and count its bytes in `HubServer.uploaded`.

        If `limit` is not None, the connection is closed after `limit` bytes.
        """
        received = 0
        for chunk in self.unread:
            received += len(chunk)
            self.hub.uploaded += len(chunk)
            if limit is not None and received >= limit:
                self.drop()
            yield chunk

    def commit(self, kind: str, name: str, revision: str) -> None:
        pull = "create_pr" in self.query
        repo, faults = self._repo(kind, name, write=not pull), self.hub.faults
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if faults.commit_statuses:
            raise Refused(faults.commit_statuses.pop(0), faults.commit_message)
        if faults.concurrent_commit:
            added, faults.concurrent_commit = self.hub.storage.add(b"theirs", False), False
            repo.commit(revision, "A line of \x1b[31mtheirs", {"theirs.txt": added})
        if not pull and header.get("parentCommit", repo.at(revision).oid) != repo.at(revision).oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        target = repo.open_pull(header.get("parentCommit", revision)) if pull else revision
        deleted = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
        commit = repo.commit(target, header["summary"], self.hub.storage.blobs_of(lines), deleted)
        if faults.late_commit:
            faults.late_commit = False
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        if faults.lost_commit_replies:
            faults.lost_commit_replies -= 1
            self.drop()
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}
        self.json(answer | ({"pullRequestUrl": f"{url}/discussions/{target.split('/')[-1]}"} if pull else {}))
