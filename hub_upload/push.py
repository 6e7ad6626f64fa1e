"""Send the folder of a model, data set or Space to the Hugging Face Hub, in one commit; without --push, show what it
would change.

    python -m hub_upload.export --model runs/mine --output repository   # the folder that is sent
    python -m hub_upload.push --model repository --repo-id my-name/my-model
    python -m hub_upload.push --model repository --repo-id my-name/my-model --push --private --tag v1.0
    python -m hub_upload.push --model repository --repo-id an-org/its-model --push --pull-request
    python -m hub_upload.push --model data/mine --repo-id my-name/my-data --repo-type dataset --push
    python -m hub_upload.push --model demo --repo-id my-name/my-demo --repo-type space --push   # of hub_upload.space

The token is huggingface_hub's own: HF_TOKEN, or what `hf auth login` has saved. Only files that belong to a model or a
data set are sent; what else is on the Hub stays, but for files of an older Space in folders that are sent. After a
broken connection, run the same command again.
"""

import inspect
import logging
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    errors,
    get_session,
    get_token,
    metadata_load,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from tqdm import tqdm

from capivara_common.cli import flag, parse, run_command
from capivara_common.privacy import machine_path_in, printable
from hub_upload.allowed_files import check_repo_id, check_text, files_to_send
from hub_upload.card import CARD, outdated, write_card

# Of a branch or tag: neither a commit nor another kind of reference.
REF_NAME = re.compile(r"(?!refs/|[0-9a-f]{40}$|.*(\.\.|//|@\{|\.lock$|[./]$))[A-Za-z0-9_][\w.+/-]{0,200}")
PULL_REQUEST = re.compile(r"refs/pr/\d+")
SHOWN = 20  # names of one kind
TIMEOUT_S = 300  # of silence; the client's own is none, and a line that died would hold a run for ever
WAIT_S = 2  # before a call whose answer was lost is made once more
NO_TOKEN = "There is no token. Save one that may write by `hf auth login`, or set HF_TOKEN."
AGAIN = "Run the same command again: files that have arrived are not sent a second time."
TRY_AGAIN = {408, 429, 500, 502, 503, 504}
FULL = {402, 413, 507}  # the Hub itself says 403, with words
# Status or kind of a refusal -> why, and the way out; of another one the Hub's own words are said.
REFUSALS = {
    401: "The Hub refuses the token (401): it is wrong, or no longer valid. Make one that may write at {tokens}, and "
    "save it by `hf auth login` or set HF_TOKEN.",
    403: "The token may not write to {repo_id} (403): {said}. Use one with write access, of a member of {owner} "
    "({tokens}).",
    412: "{repo_id} was changed meanwhile (412), and nothing of yours was committed. Run the command without --push to "
    "see what is there, then with it.",
    "gated": "{repo_id} is gated (403), and the token has no access to it. Ask for it on the repository's page.",
    "missing": "There is no {repo_type} repository {repo_id} ({status}), or the token does not see it. Check the name, "
    "and that the token is of a member of its organisation.",
    "full": "The Hub has no more space for {repo_id} ({status}): {said}. Delete old files or repositories, or ask for "
    "more storage; then run the same command again.",
    "trouble": "The Hub is in trouble or takes no more requests ({status}): {said}. Run the same command again later.",
}
REPOSITORY = "repository"  # folder in that of the run, until it is on the Hub
FORMATS = ("transformers", "open_clip", "sentence_transformers")  # onnx takes minutes, and packages of its own
readable = partial(tqdm.format_sizeof, suffix="B")  # bytes in words, of a thousand each, such as "1.46GB"
logger = logging.getLogger("capivara")


class PushError(OSError):
    """A push that was not made, in one line: why, and the way out. It holds no token."""

    def __init__(self, message: str):
        super().__init__(" ".join(printable(message).split()))


@dataclass
class PushArguments:
    """Arguments of `hub_upload.push`."""

    model: Path = flag(..., "Folder to send: of a model or, by --repo-type, of a data set or Space.")
    repo_id: str = flag(..., "Repository on the Hub, owner/name. It is made where there is none.")
    push: bool = flag(False, "Send it. Without this flag nothing is changed on the Hub.")
    repo_type: Literal["model", "dataset", "space"] = flag("model", "Kind of the repository.")
    revision: str = flag("main", "Branch, made from main where it is missing; or an open pull request, as refs/pr/1.")
    pull_request: bool = flag(False, "Open a pull request to main instead of changing it.")
    private: bool = flag(False, "Make a new repository private; a public one is refused.")
    tag: str | None = flag(None, "Name for the commit, such as v1.0; a new one.")
    message: str | None = flag(None, "Title of the commit.")
    delete: list[str] = flag([], "Files on the Hub that the same commit removes; all others stay.")
    gone: ClassVar = {"deadline_hours": "a call ends after 300 s of silence; Ctrl-C or `timeout 12h` ends a push"}

    def __post_init__(self) -> None:
        self.model = Path(self.model)
        for name in ("repo_id", "revision", "tag", "message"):
            check_text(f"--{name.replace('_', '-')}", getattr(self, name) or "")
        if path := machine_path_in(self.message or ""):
            raise ValueError(f"--message names a place on a machine, {path!r}. Leave it out.")
        check_repo_id(self.repo_id)
        if not self.model.is_dir():
            raise ValueError(f"The folder {self.model} does not exist.")
        if not REF_NAME.fullmatch(self.revision) and not PULL_REQUEST.fullmatch(self.revision):
            raise ValueError(f"revision {self.revision!r} is no name for a branch.")
        if self.tag is not None and not REF_NAME.fullmatch(self.tag):
            raise ValueError(f"tag {self.tag!r} is no name for a tag.")
        if self.pull_request and (self.tag or self.revision != "main"):
            raise ValueError("A pull request goes to main and gets no tag: leave out --revision and --tag.")


@dataclass
class Remote:
    """What a repository on the Hub holds, as far as the token sees."""

    exists: bool = False
    private: bool = False
    head: str | None = None  # commit of the branch or pull request; None where there is none of that name
    start: str | None = None  # commit that the branch would start at, which is the head of one that exists
    tags: dict[str, str] = field(default_factory=dict)  # name -> commit
    files: dict[str, RepoFile] = field(default_factory=dict)  # path -> size and hashes, at `start`


@dataclass
class PushPlan:
    """What a push would do."""

    args: PushArguments
    user: str | None  # whose token it is; None without one
    remote: Remote
    metadata: dict[str, Any] | None  # of the card; None where there is no card
    sent: list[CommitOperationAdd]  # files that the commit adds or changes
    same: list[str]  # files of the folder that the Hub has
    deleted: list[str]  # files on the Hub that go

    def __post_init__(self) -> None:
        self.makes_branch = self.remote.exists and self.remote.head is None
        self.makes_tag = self.args.tag is not None and self.args.tag not in self.remote.tags


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(PushArguments, __doc__, argv)
    planned = plan(args)
    print(report(planned), flush=True)
    check_card(args)
    if not (planned.sent or planned.deleted or planned.makes_branch or planned.makes_tag):
        print("The Hub has all of it already; there is nothing to send.")
    elif not args.push:
        size = readable(sum(file.upload_info.size for file in planned.sent))
        print(f"Nothing was sent. With --push, {len(planned.sent)} files ({size}) are sent in one commit.")
    else:
        url = push(planned)
        print(f"Pushed in one commit: {_name(url)}" if url else "All files were there already; no commit was made.")
        if planned.makes_tag:
            print(f"Tagged {args.tag}.")


# --- What would be sent ----------------------------------------------------------------------------------------------


def plan(args: PushArguments) -> PushPlan:
    """Compare a folder with a repository; nothing is changed anywhere.

    Raises ValueError where a file must not be sent, PushError where the Hub can't be asked or would refuse the push.
    """
    paths = files_to_send(args.model, args.repo_type)
    try:
        metadata = (metadata_load(args.model / CARD) or {}) if Path(CARD) in paths else None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The metadata of {CARD} is not valid YAML of `key: value` lines: {error}") from error
    with hub_errors(args.repo_id, args.repo_type):
        user = str(_twice(lambda: HfApi().whoami(cache=True)["name"])) if get_token() else None
        remote = _look(args.repo_id, args.repo_type, args.revision)
    files = [CommitOperationAdd(path.as_posix(), args.model / path) for path in paths]
    same = [file.path_in_repo for file in files if _is_on_hub(file, remote.files.get(file.path_in_repo))]
    sent = [file for file in files if file.path_in_repo not in same]
    deleted = [path for path in args.delete if path in remote.files]
    if args.repo_type == "space":  # of an earlier one, such as fragments of its index
        ours, folders = {path.as_posix() for path in paths}, {path.parts[0] for path in paths}
        deleted += [path for path in remote.files if path not in ours and path.partition("/")[0] in folders]
    found = PushPlan(args, user, remote, metadata, sent, same, deleted)
    _check_plan(found)
    return found


def check_card(args: PushArguments) -> None:
    """Warn where a card states other values than its files. Raises ValueError where it was about to be sent."""
    faults = outdated(args.model) if args.repo_type == "model" else []
    if not faults:
        return
    listed = "".join(f"\n  {_name(fault)}" for fault in faults[:SHOWN])
    message = f"The card differs from its files; write it again with `python -m hub_upload.card`. {listed}"
    if args.push:
        raise ValueError(f"Nothing was sent. {message}")
    print(f"Warning: {message}", flush=True)


def report(planned: PushPlan) -> str:
    """The plan in words, to be read before it is carried out."""
    args, remote, there = planned.args, planned.remote, planned.remote.files
    state = f"does not exist, will be made{', private' * args.private}"
    if remote.exists:
        state = f"{'private' if remote.private else 'public'}, at {str(remote.start)[:7]}"
    branch = "a pull request to main" if args.pull_request else args.revision
    branch += ", will be made from main" if planned.makes_branch else ""
    lines = [f"{args.repo_type} {args.repo_id} ({state}), {branch}; token of {_name(planned.user or 'nobody')}"]
    sizes = {file.path_in_repo: file.upload_info.size for file in planned.sent}
    for path in sorted(sizes, key=lambda path: path in there):
        before = f", was {readable(there[path].size)}" if path in there else ""
        lines.append(f"  {'change' if before else 'add   '}  {_name(path)}  ({readable(sizes[path])}{before})")
    lines += [f"  delete  {_name(path)}  ({readable(there[path].size)})" for path in planned.deleted]
    lines += [f"  same    {len(planned.same)} files"] if planned.same else []
    ours = {".gitattributes", *planned.deleted, *planned.same, *sizes}  # the first is made by the Hub
    lines += [f"  stays   {_name(path)}  (on the Hub, not in the folder)" for path in sorted({*there} - ours)]
    lines += [f"note: --delete {_name(path)}: it is not on the Hub." for path in {*args.delete} - {*there}]
    if planned.metadata is None:
        lines.append(f"note: there is no {CARD}: the page on the Hub will be empty.")
    else:
        stated = planned.metadata.get("license") or "none, and without one nobody may use what is published"
        lines.append(f"note: license: {_name(str(stated))}")
    if planned.user is None:
        lines.append("note: there is no token, which --push needs: `hf auth login`, or HF_TOKEN.")
    return "\n".join(lines)


def _name(text: str) -> str:
    """A name of others on one line, to be shown."""
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


def _is_on_hub(file: CommitOperationAdd, there: RepoFile | None) -> bool:
    """Whether the Hub has the content of a file of this machine, by the hashes of both; nothing is downloaded."""
    if there is None or there.size != file.upload_info.size:
        return False
    if there.lfs:
        return there.lfs.sha256 == file.upload_info.sha256.hex()
    with file.as_file() as content:
        return git_hash(content.read()) == there.blob_id


def _check_plan(planned: PushPlan) -> None:
    """Raise PushError where the push would be refused, or would not be what was meant."""
    args, remote = planned.args, planned.remote
    _check_visibility(args.repo_id, remote, args.private)
    if args.pull_request and not remote.exists:
        raise PushError(f"There is no {args.repo_id}, or the token does not see it: a pull request needs one.")
    if remote.head is None and (args.revision.startswith("refs/") or args.revision in remote.tags):
        kind = "a tag, which stays where it is" if args.revision in remote.tags else "no open pull request"
        raise PushError(f"{args.revision} of {args.repo_id} is {kind}. Name a branch or an open pull request.")
    if both := {*args.delete} & {*planned.same, *(file.path_in_repo for file in planned.sent)}:
        raise PushError(f"--delete names {min(both)}, which the folder has. Remove it there first.")
    tagged = remote.tags.get(args.tag or "")
    if tagged and (planned.sent or planned.deleted or tagged != remote.head):
        raise PushError(
            f"The tag {args.tag} of {args.repo_id} exists already, at {tagged[:7]}. Nothing was sent. Take another "
            "name, or delete the tag on the Hub."
        )


def _check_visibility(repo_id: str, remote: Remote, private: bool) -> None:
    """Raise PushError where what shall be private would be seen by everybody."""
    if private and remote.exists and not remote.private:
        raise PushError(
            f"{repo_id} is public, and --private makes new repositories private only. Change it in the settings of the "
            "repository first, or take another name."
        )


# --- Sending it ------------------------------------------------------------------------------------------------------


def push(planned: PushPlan) -> str | None:
    """Send what was planned, in one commit, or raise PushError, whose message has the way out.

    Returns:
        The address of the commit or pull request; None where the Hub has everything, and no commit was made.
    """
    args, remote, api = planned.args, planned.remote, HfApi()
    with hub_errors(args.repo_id, args.repo_type):
        if get_token() is None:
            raise PushError(NO_TOKEN)
        if not remote.exists:
            sdk = {"space_sdk": (planned.metadata or {}).get("sdk")} if args.repo_type == "space" else {}
            api.create_repo(args.repo_id, repo_type=args.repo_type, private=args.private or None, **sdk)
            remote = _look(args.repo_id, args.repo_type, args.revision)
            _check_visibility(args.repo_id, remote, args.private)
        if remote.head is None:
            api.create_branch(args.repo_id, branch=args.revision, revision=remote.start, repo_type=args.repo_type)
        commit = _commit(planned, str(remote.start)) if planned.sent or planned.deleted else None
        if planned.makes_tag:
            at = commit.oid if commit else str(remote.start)
            try:
                api.create_tag(args.repo_id, tag=str(args.tag), revision=at, repo_type=args.repo_type)
            except Exception as error:  # of whatever kind: the user must know that the files are there
                reason = _explained(error, args.repo_id, args.repo_type)
                raise PushError(f"The files are on the Hub, but the tag {args.tag} was not made. {reason}") from None
    return None if commit is None else commit.pr_url or commit.commit_url


def _commit(planned: PushPlan, parent: str) -> CommitInfo:
    """The commit on top of `parent`, sent once more where its answer was lost and it was not made."""
    args = planned.args
    operations = [*planned.sent, *(CommitOperationDelete(path, is_folder=False) for path in planned.deleted)]

    def send() -> CommitInfo:
        return HfApi().create_commit(
            args.repo_id, operations, commit_message=args.message or _title(planned), repo_type=args.repo_type,
            revision=args.revision, parent_commit=parent, create_pr=args.pull_request,
        )  # fmt: skip

    try:
        commit, refused = send() if args.pull_request else _twice(send), None
    except (errors.HTTPError, errors.HfHubHTTPError) as error:
        if args.pull_request and _is_lost(error):
            raise PushError(
                f"{type(error).__name__}: {error}. Whether the pull request was opened is not known: look at the page "
                f"of {args.repo_id} before you run the same command again."
            ) from None
        if not isinstance(error, errors.HfHubHTTPError) or error.response.status_code != 412:
            raise
        # The parent is no longer the last commit. The first of two calls may have made ours: the files there tell.
        head, refused = _look(args.repo_id, args.repo_type, args.revision).head, error
        url = f"{constants.ENDPOINT}/{constants.REPO_TYPES_URL_PREFIXES.get(args.repo_type, '')}{args.repo_id}/commit"
        commit = CommitInfo(f"{url}/{head}", commit_message="", commit_description="", oid=str(head))
    there = _files(args.repo_id, args.repo_type, commit.pr_revision or commit.oid)
    missing = [file.path_in_repo for file in planned.sent if not _is_on_hub(file, there.get(file.path_in_repo))]
    if missing or {*planned.deleted} & {*there}:
        if refused:
            raise refused
        raise PushError(
            f"The branch is at {commit.commit_url}, but without {', '.join(missing[:SHOWN]) or 'the deletions'}. Has "
            "somebody else changed it meanwhile, or has the repository a .gitignore that leaves it out? Run the "
            "command without --push to see what is there."
        )
    return commit


def _title(planned: PushPlan) -> str:
    """Of the commit, where none was given."""
    names = [file.path_in_repo for file in planned.sent] + planned.deleted
    changes = any(file.path_in_repo in planned.remote.files for file in planned.sent)
    verb = "Update" if changes else "Add" if planned.sent else "Delete"
    return f"{verb} {names[0]}" if len(names) == 1 else f"{verb} {len(names)} files"


# --- The Hub ---------------------------------------------------------------------------------------------------------


def _look(repo_id: str, repo_type: str, revision: str) -> Remote:
    """What is on the Hub; a call whose answer was lost is made once more."""
    api = HfApi()
    try:
        info = _twice(lambda: api.repo_info(repo_id, repo_type=repo_type))
    except errors.RepositoryNotFoundError as error:
        if isinstance(error, errors.GatedRepoError):
            raise
        return Remote()
    refs = _twice(lambda: api.list_repo_refs(repo_id, repo_type=repo_type, include_pull_requests=True))
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    heads |= {ref.ref: ref.target_commit for ref in refs.pull_requests or []}
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    start = str(heads.get(revision) or heads.get("main") or info.sha)
    return Remote(True, info.private, heads.get(revision), start, tags, _files(repo_id, repo_type, start))


def _files(repo_id: str, repo_type: str, revision: str) -> dict[str, RepoFile]:
    """Path -> size and hashes, at a revision."""
    listed = HfApi().list_repo_tree(repo_id, repo_type=repo_type, revision=revision, recursive=True)
    return {file.path: file for file in listed if isinstance(file, RepoFile)}


def _is_lost(error: BaseException) -> bool:
    """Whether the connection broke or the Hub is in trouble: the same call may succeed a little later."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in TRY_AGAIN
    return isinstance(error, errors.HTTPError)


def _twice(call: Callable[[], Any]) -> Any:
    """The answer of a call, made once more where it was lost."""
    try:
        return call()
    except (errors.HTTPError, errors.HfHubHTTPError) as error:
        if not _is_lost(error):
            raise
        logger.warning("%s: %s Trying again in %s s.", type(error).__name__, str(error).split("\n")[0], WAIT_S)
        time.sleep(WAIT_S)
        return call()


@contextmanager
def hub_errors(repo_id: str, repo_type: str) -> Iterator[None]:
    """Errors of calls to the Hub as PushError; what any library logs within holds no secret."""
    get_session().timeout = TIMEOUT_S
    make = logging.getLogRecordFactory()

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with suppress(TypeError, ValueError):  # a message that does not fit its values; logging says so itself
            record.msg, record.args = printable(record.getMessage()), None
        return record

    logging.setLogRecordFactory(made)
    logging.captureWarnings(True)
    try:
        yield
    except Exception as error:  # an answer that is none of the Hub's raises any kind
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # so that the next output begins a line
        if isinstance(error, PushError):
            raise
        logger.debug("A call to the Hub failed.", exc_info=True)
        while isinstance(error, RuntimeError) and error.__cause__ is not None:
            error = error.__cause__  # of an upload, which the client wraps
        raise PushError(_explained(error, repo_id, repo_type)) from None
    finally:
        logging.captureWarnings(False)
        logging.setLogRecordFactory(make)


def _explained(error: BaseException, repo_id: str, repo_type: str) -> str:
    """Why a call failed, and the way out."""
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        said = " ".join((error.server_message or str(error)).split()).rstrip(".")
        kind = status
        if status in FULL or (status == 403 and re.search("storage|quota", said, re.IGNORECASE)):
            kind = "full"
        elif isinstance(error, errors.GatedRepoError):
            kind = "gated"
        elif isinstance(error, errors.RepositoryNotFoundError) and (status == 404 or get_token() is None):
            kind = "missing"
        elif status in TRY_AGAIN:
            kind = "trouble"
        values = {"repo_id": repo_id, "repo_type": repo_type, "owner": repo_id.split("/")[0], "status": status}
        tokens = f"{constants.ENDPOINT}/settings/tokens"
        return REFUSALS.get(kind, "The Hub refused ({status}): {said}.").format(**values, said=said, tokens=tokens)
    if isinstance(error, errors.HTTPError):
        return f"The connection to the Hub broke ({type(error).__name__}: {error}). {AGAIN}"
    if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):  # of Xet
        return f"The upload failed: {error}. {AGAIN}"
    if isinstance(error, OSError):
        return str(error) or type(error).__name__
    return (
        f"{constants.ENDPOINT} has answered in another form than the Hub does ({type(error).__name__}: {error}). Does "
        "a proxy or a log-in page answer in its place? Check HF_ENDPOINT and the network, then run the same command "
        "again."
    )


# --- A training run --------------------------------------------------------------------------------------------------


def check_access(repo_id: str, private: bool = False) -> None:
    """Make sure, before hours of work, that a model can be pushed; the repository is made where there is none.

    Raises ValueError where the name is none of the Hub, PushError where the token or the repository is not as needed.
    """
    check_repo_id(repo_id)
    api = HfApi()
    with hub_errors(repo_id, "model"):
        if get_token() is None:
            raise PushError(NO_TOKEN)
        remote = _look(repo_id, "model", "main")
        _check_visibility(repo_id, remote, private)
        if not remote.exists:
            api.create_repo(repo_id, private=private or None)
        elif "write" in inspect.signature(api.auth_check).parameters:  # not in the first releases of 2.x
            _twice(lambda: api.auth_check(repo_id, write=True))


def publish_run(run: Path, repo_id: str, private: bool = False, card_language: str = "en") -> bool:
    """Make the repository of a finished run, with its card in "en" or "pt", and push it; whether the Hub has it now.

    A push that fails does not fail the run: it is logged with the way out, and the repository stays in its folder.
    """
    from hub_upload.export import export  # torch, without which a folder is pushed

    repository = run / REPOSITORY
    words = ["python", "-m", "hub_upload.push", "--model", str(repository), "--repo-id", repo_id, "--push"]
    try:
        export(run, repository, FORMATS, overwrite=True, repo_id=repo_id)
        write_card(repository, repo_id, card_language)
        url = push(plan(PushArguments(repository, repo_id, private=private)))
    except (Exception, KeyboardInterrupt) as error:  # of whatever kind: the run is complete, and must not seem to fail
        way_out = "Make its repository by `python -m hub_upload.export`, and push that by `python -m hub_upload.push`."
        if repository.is_dir():
            way_out = f"Push it later: {shlex.join(words + ['--private'] * private)}"
        logger.warning("NOT PUSHED to %s: %s\nThe run is complete in %s. %s", repo_id, _said(error), run, way_out)
        return False
    shutil.rmtree(repository, ignore_errors=True)
    logger.info("Pushed to %s.", _name(url)) if url else logger.info("%s has all of it already.", repo_id)
    return True


def _said(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "Stopped."
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return " ".join(printable(f"{kind}{error}").split()).removesuffix(".") + "."


if __name__ == "__main__":
    run_command(main, resumes=True)
