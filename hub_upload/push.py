"""Send the folder of a model, data set or Space to the Hugging Face Hub, in one commit; without --push, show what it
would change.

    python -m hub_upload.export --model runs/mine --output repository   # the folder that is sent
    python -m hub_upload.push --model repository --repo_id my-name/my-model
    python -m hub_upload.push --model repository --repo_id my-name/my-model --push --private
    python -m hub_upload.push --model repository --repo_id an-org/its-model --push --pull_request
    python -m hub_upload.push --model data/mine --repo_id my-name/my-data --repo_type dataset --push
    python -m hub_upload.push --model demo --repo_id my-name/my-demo --repo_type space --push   # of hub_upload.space

The token is huggingface_hub's own: HF_TOKEN, or what `hf auth login` has saved. Only files that belong to a model or a
data set are sent; what else is on the Hub stays, but for files of an older Space in folders that are sent. `hf` itself
tags and deletes. After a broken connection, run the same command again.
"""

import inspect
import logging
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

from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.privacy import make_printable
from hub_upload.allowed_files import check_repo_id, check_text, list_files_to_send
from hub_upload.card import CARD_FILE, find_generated_card_faults, write_card

HUB_TIMEOUT_S = 300  # of silence; the client's own is none, and a line that died would hold a run for ever
RETRY_DELAY_S = 2  # before a call whose answer was lost is made once more
NO_TOKEN_MESSAGE = "There is no token. Save one that may write by `hf auth login`, or set HF_TOKEN."
RETRY_HINT = (
    "Run the same command again: files that have arrived are not sent a second time. Whether a pull request was opened "
    "is seen on the page of the repository."
)
RETRYABLE_STATUS_CODES = {408, 429, 500, 502, 503, 504}
REFUSAL_MESSAGES = {  # status -> why, and the way out; of another one the Hub's own words are said
    401: "The Hub refuses the token (401): it is wrong, or no longer valid. Make one that may write at {tokens}, and "
    "save it by `hf auth login` or set HF_TOKEN.",
    403: "The Hub refuses it to the token (403): {said}. To write to {repo_id} needs one with write access, of a "
    "member of {owner} ({tokens}).",
    412: "{repo_id} was changed meanwhile (412), and nothing of yours was committed. Run the command without --push to "
    "see what is there, then with it.",
}
REPOSITORY_FOLDER = "repository"  # folder in that of the run, until it is on the Hub
PUBLISHED_FORMATS = (
    "transformers",
    "open_clip",
    "sentence_transformers",
)  # onnx takes minutes, and packages of its own
format_bytes = partial(tqdm.format_sizeof, suffix="B")  # bytes in words, of a thousand each, such as "1.46GB"
logger = logging.getLogger("capivara")


class PushError(OSError):
    """A push that was not made, in one line: why, and the way out. It holds no token."""

    def __init__(self, message: str):
        super().__init__(" ".join(make_printable(message).split()))


class HubUnreachableError(PushError):
    """A push that was not made because the Hub did not answer, or because offline mode is on."""


@dataclass
class PushArguments:
    """Arguments of `hub_upload.push`."""

    model: Path = flag(..., "Folder to send: of a model or, by --repo_type, of a data set or Space.")
    repo_id: str = flag(..., "Repository on the Hub, owner/name. It is made where there is none.")
    push: bool = flag(False, "Send it. Without this flag nothing is changed on the Hub.")
    repo_type: Literal["model", "dataset", "space"] = flag("model", "Kind of the repository.")
    revision: str = flag("main", "Branch, made from main where it is missing.")
    pull_request: bool = flag(False, "Open a pull request to main instead of changing it.")
    private: bool = flag(False, "Make a new repository private; a public one is refused.")
    message: str | None = flag(None, "Title of the commit.")
    gone: ClassVar = {
        "deadline_hours": "a call ends after 300 s of silence; Ctrl-C or `timeout 12h` ends a push",
        "tag": "`hf repos tag create REPO_ID v1.0` tags what was pushed",
        "delete": "`hf repos delete-files REPO_ID FILE` does it",
    }

    def __post_init__(self) -> None:
        for name in ("repo_id", "revision", "message"):
            check_text(getattr(self, name) or "", f"--{name}")
        check_repo_id(self.repo_id)
        if not self.model.is_dir():
            raise ValueError(f"The folder {self.model} does not exist.")
        if self.pull_request and self.revision != "main":
            raise ValueError("A pull request goes to main: leave out --revision.")


@dataclass
class RemoteRepository:
    """What a repository on the Hub holds, as far as the token sees."""

    exists: bool = False
    is_private: bool = False
    branch_head: str | None = None  # commit of the branch; None where there is none of that name
    base_commit: str | None = None  # commit that the branch would start at, which is the head of one that exists
    files: dict[str, RepoFile] = field(default_factory=dict)  # path -> size and hashes, at `start`


@dataclass
class PushPlan:
    """What a push would do."""

    args: PushArguments
    user: str | None  # whose token it is; None without one
    remote: RemoteRepository
    metadata: dict[str, Any] | None  # of the card; None where there is no card
    added_files: list[CommitOperationAdd]  # files that the commit adds or changes
    unchanged_paths: list[str]  # files of the folder that the Hub has
    deleted_paths: list[str]  # files of an older Space that go
    unreachable: str = ""  # why the Hub could not be asked, in a preview; empty if it was asked

    def __post_init__(self) -> None:
        self.creates_branch = self.remote.exists and self.remote.branch_head is None


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(PushArguments, __doc__, argv)
    planned = plan_push(args)
    print(describe_push(planned), flush=True)
    check_card_is_current(args)
    if not (planned.added_files or planned.deleted_paths or planned.creates_branch):
        print("The Hub has all of it already; there is nothing to send.")
    elif not args.push:
        size = format_bytes(sum(file.upload_info.size for file in planned.added_files))
        known = ", without those that the Hub has already" if planned.unreachable else ""
        print(
            f"Nothing was sent. With --push, {len(planned.added_files)} files ({size}) are sent in one commit{known}."
        )
    else:
        url = push_folder(planned)
        print(
            f"Pushed in one commit: {_printable_name(url)}"
            if url
            else "All files were there already; no commit was made."
        )


# --- What would be sent ----------------------------------------------------------------------------------------------


def plan_push(args: PushArguments) -> PushPlan:
    """Compare a folder with a repository; nothing is changed anywhere.

    Without `args.push` the Hub need not be reachable: the plan then says so in `unreachable`.

    Raises ValueError where a file must not be sent, PushError where the Hub can't be asked or would refuse the push.
    """
    paths = list_files_to_send(args.model, args.repo_type)
    try:
        metadata = (metadata_load(args.model / CARD_FILE) or {}) if Path(CARD_FILE) in paths else None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The metadata of {CARD_FILE} is not valid YAML of `key: value` lines: {error}") from error
    user, remote, unreachable = None, RemoteRepository(), ""
    try:
        with wrap_hub_errors(args.repo_id, RETRY_HINT if args.push else "Run the same command again."):
            user = str(_retry_once(lambda: HfApi().whoami(cache=True)["name"])) if get_token() else None
            remote = _read_remote(args.repo_id, args.repo_type, args.revision)
    except HubUnreachableError as error:
        if args.push:
            raise
        unreachable = str(error)
    files = [CommitOperationAdd(path.as_posix(), args.model / path) for path in paths]
    same = [file.path_in_repo for file in files if _is_on_hub(file, remote.files.get(file.path_in_repo))]
    sent = [file for file in files if file.path_in_repo not in same]
    deleted = []
    if args.repo_type == "space":  # of an earlier one, such as fragments of its index
        ours, folders = {path.as_posix() for path in paths}, {path.parts[0] for path in paths}
        deleted = [path for path in remote.files if path not in ours and path.partition("/")[0] in folders]
    _check_visibility(args.repo_id, remote, args.private)
    if args.pull_request and not remote.exists and not unreachable:
        raise PushError(f"There is no {args.repo_id}, or the token does not see it: a pull request needs one.")
    return PushPlan(args, user, remote, metadata, sent, same, deleted, unreachable)


def check_card_is_current(args: PushArguments) -> None:
    """Warn where a card states other values than its files. Raises ValueError where it was about to be sent."""
    faults = find_generated_card_faults(args.model) if args.repo_type == "model" else []
    if not faults:
        return
    listed = "".join(f"\n  {_printable_name(fault)}" for fault in faults)
    message = f"The card differs from its files; write it again with `python -m hub_upload.card`. {listed}"
    if args.push:
        raise ValueError(f"Nothing was sent. {message}")
    print(f"Warning: {message}", flush=True)


def describe_push(plan: PushPlan) -> str:
    """The plan in words, to be read before it is carried out."""
    args, remote, there = plan.args, plan.remote, plan.remote.files
    state = f"does not exist, will be made{', private' * args.private}"
    if remote.exists:
        state = f"{'private' if remote.private else 'public'}, at {str(remote.base_commit)[:7]}"
    if plan.unreachable:
        state = "not asked: the Hub can't be reached"
    branch = "a pull request to main" if args.pull_request else args.revision
    branch += ", will be made from main" if plan.creates_branch else ""
    token = "" if plan.unreachable else f"; token of {_printable_name(plan.user or 'nobody')}"
    lines = [f"{args.repo_type} {args.repo_id} ({state}), {branch}{token}"]
    sizes = {file.path_in_repo: file.upload_info.size for file in plan.added_files}
    for path in sorted(sizes, key=lambda path: path in there):
        verb = "change" if path in there else "send  " if plan.unreachable else "add   "
        lines.append(f"  {verb}  {_printable_name(path)}  ({format_bytes(sizes[path])})")
    lines += [f"  delete  {_printable_name(path)}" for path in plan.deleted_paths]
    lines += [f"  same    {len(plan.unchanged_paths)} files"] if plan.unchanged_paths else []
    ours = {".gitattributes", *plan.deleted_paths, *plan.unchanged_paths, *sizes}  # the first is made by the Hub
    lines += [f"  stays   {_printable_name(path)}  (on the Hub, not in the folder)" for path in sorted({*there} - ours)]
    if plan.metadata is None:
        lines.append(f"note: there is no {CARD_FILE}: the page on the Hub will be empty.")
    else:
        stated = plan.metadata.get("license") or "none, and without one nobody may use what is published"
        lines.append(f"note: license: {_printable_name(str(stated))}")
    if plan.unreachable:
        lines.append(f"note: what the Hub holds is not known. {plan.unreachable}")
    if plan.user is None and get_token() is None:
        lines.append("note: there is no token, which --push needs: `hf auth login`, or HF_TOKEN.")
    return "\n".join(lines)


def _printable_name(text: str) -> str:
    """A name of others on one line, to be shown."""
    return make_printable(text.replace("\n", "\\n"))


def _is_on_hub(file: CommitOperationAdd, remote_file: RepoFile | None) -> bool:
    """Whether the Hub has the content of a file of this machine, by the hashes of both; nothing is downloaded."""
    if remote_file is None or remote_file.size != file.upload_info.size:
        return False
    if remote_file.lfs:
        return remote_file.lfs.sha256 == file.upload_info.sha256.hex()
    with file.as_file() as content:
        return git_hash(content.read()) == remote_file.blob_id


def _check_visibility(repo_id: str, remote: RemoteRepository, private: bool) -> None:
    """Raise PushError where what shall be private would be seen by everybody."""
    if private and remote.exists and not remote.is_private:
        raise PushError(
            f"{repo_id} is public, and --private makes new repositories private only. Change it in the settings of the "
            "repository first, or take another name."
        )


# --- Sending it ------------------------------------------------------------------------------------------------------


def push_folder(plan: PushPlan) -> str | None:
    """Send what was planned, in one commit, or raise PushError, whose message has the way out.

    Returns:
        The address of the commit or pull request; None where the Hub has everything, and no commit was made.
    """
    args, remote, api = plan.args, plan.remote, HfApi()
    with wrap_hub_errors(args.repo_id):
        if get_token() is None:
            raise PushError(NO_TOKEN_MESSAGE)
        if not remote.exists:
            sdk = {"space_sdk": (plan.metadata or {}).get("sdk")} if args.repo_type == "space" else {}
            api.create_repo(args.repo_id, repo_type=args.repo_type, private=args.private or None, **sdk)
            remote = _read_remote(args.repo_id, args.repo_type, args.revision)
        if remote.branch_head is None:
            api.create_branch(args.repo_id, branch=args.revision, revision=remote.base_commit, repo_type=args.repo_type)
        return _create_commit(plan, str(remote.base_commit)) if plan.added_files or plan.deleted_paths else None


def _create_commit(plan: PushPlan, parent: str) -> str:
    """The address of the commit on top of `parent`, sent once more where its answer was lost and it was not made."""
    args = plan.args
    operations = [*plan.added_files, *(CommitOperationDelete(path, is_folder=False) for path in plan.deleted_paths)]

    def send() -> str:
        commit = HfApi().create_commit(
            args.repo_id, operations, commit_message=args.message or _default_commit_title(plan), repo_type=args.repo_type,
            revision=args.revision, parent_commit=parent, create_pr=args.pull_request,
        )  # fmt: skip
        return commit.pr_url or commit.commit_url

    try:
        return send() if args.pull_request else _retry_once(send)
    except errors.HfHubHTTPError as error:
        # The parent is no longer the last commit. The first of two calls may have made ours: the files there tell.
        if error.response.status_code != 412:
            raise
        there = _read_remote(args.repo_id, args.repo_type, args.revision)
        are_there = all(_is_on_hub(file, there.files.get(file.path_in_repo)) for file in plan.added_files)
        if not are_there or {*plan.deleted_paths} & {*there.files}:
            raise
        kind = constants.REPO_TYPES_URL_PREFIXES.get(args.repo_type, "")
        return f"{constants.ENDPOINT}/{kind}{args.repo_id}/commit/{there.branch_head}"


def _default_commit_title(plan: PushPlan) -> str:
    """Of the commit, where none was given."""
    names = [file.path_in_repo for file in plan.added_files] + plan.deleted_paths
    verb = "Update" if {*names} & {*plan.remote.files} else "Add"
    return f"{verb} {names[0]}" if len(names) == 1 else f"{verb} {len(names)} files"


# --- The Hub ---------------------------------------------------------------------------------------------------------


def _read_remote(repo_id: str, repo_type: str, revision: str) -> RemoteRepository:
    """What is on the Hub; a call whose answer was lost is made once more."""
    api = HfApi()
    try:
        info = _retry_once(lambda: api.repo_info(repo_id, repo_type=repo_type))
    except errors.RepositoryNotFoundError as error:
        if isinstance(error, errors.GatedRepoError):
            raise
        return RemoteRepository()
    refs = _retry_once(lambda: api.list_repo_refs(repo_id, repo_type=repo_type))
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    start = str(heads.get(revision) or heads.get("main") or info.sha)
    listed = api.list_repo_tree(repo_id, repo_type=repo_type, revision=start, recursive=True)
    files = {file.path: file for file in listed if isinstance(file, RepoFile)}
    return RemoteRepository(True, info.private, heads.get(revision), start, files)


def _retry_once(call: Callable[[], Any]) -> Any:
    """The answer of a call, made once more where the connection broke or the Hub is in trouble."""
    try:
        return call()
    except errors.HTTPError as error:
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code not in RETRYABLE_STATUS_CODES:
            raise
        logger.warning("%s: %s Trying again in %s s.", type(error).__name__, str(error).split("\n")[0], RETRY_DELAY_S)
        time.sleep(RETRY_DELAY_S)
        return call()


@contextmanager
def wrap_hub_errors(repo_id: str, again: str = RETRY_HINT) -> Iterator[None]:
    """Turn errors of calls to the Hub into PushError; what any library logs within holds no secret.

    Args:
        repo_id: Repository that is named in messages.
        again: What to do after a failure that may pass.
    """
    get_session().timeout = HUB_TIMEOUT_S
    make = logging.getLogRecordFactory()

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with suppress(TypeError, ValueError):  # a message that does not fit its values; logging says so itself
            record.msg, record.args = make_printable(record.getMessage()), None
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
        is_hubs = isinstance(error, errors.HfHubHTTPError)
        lost = isinstance(error, errors.OfflineModeIsEnabled | errors.HTTPError) and not is_hubs
        raise (HubUnreachableError if lost else PushError)(_explain_error(error, repo_id, again)) from None
    finally:
        logging.captureWarnings(False)
        logging.setLogRecordFactory(make)


def _explain_error(error: BaseException, repo_id: str, again: str) -> str:
    """Why a call failed, and the way out."""
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        said = " ".join((error.server_message or str(error)).split()).rstrip(".")
        text = REFUSAL_MESSAGES.get(status, "The Hub refused ({status}): {said}.") + f" {again}" * (
            status in RETRYABLE_STATUS_CODES
        )
        tokens = f"{constants.ENDPOINT}/settings/tokens"
        return text.format(repo_id=repo_id, owner=repo_id.split("/")[0], status=status, said=said, tokens=tokens)
    if isinstance(error, errors.HTTPError):
        return f"The connection to the Hub broke ({type(error).__name__}: {error}). {again}"
    if isinstance(error, OSError) or type(error) is RuntimeError:  # the second of Xet
        return str(error) or type(error).__name__
    return (
        f"{constants.ENDPOINT} has answered in another form than the Hub does ({type(error).__name__}: {error}). Does "
        "a proxy or a log-in page answer in its place? Check HF_ENDPOINT and the network, then run the same command "
        "again."
    )


# --- A training run --------------------------------------------------------------------------------------------------


def check_push_access(repo_id: str, private: bool = False) -> None:
    """Make sure, before hours of work, that a model can be pushed; the repository is made where there is none.

    Raises ValueError where the name is none of the Hub, PushError where the token or the repository is not as needed.
    """
    check_repo_id(repo_id)
    api = HfApi()
    with wrap_hub_errors(repo_id):
        if get_token() is None:
            raise PushError(NO_TOKEN_MESSAGE)
        remote = _read_remote(repo_id, "model", "main")
        _check_visibility(repo_id, remote, private)
        if not remote.exists:
            api.create_repo(repo_id, private=private or None)
        elif "write" in inspect.signature(api.auth_check).parameters:  # not in the first releases of 2.x
            _retry_once(lambda: api.auth_check(repo_id, write=True))


def publish_run(run: Path, repo_id: str, private: bool = False, card_language: str = "en") -> bool:
    """Make the repository of a finished run, with its card in "en" or "pt", and push it; whether the Hub has it now.

    A push that fails does not fail the run: it is logged with the way out, and the repository stays in its folder.
    """
    from hub_upload.export import export_model  # torch, without which a folder is pushed

    repository = run / REPOSITORY_FOLDER
    words = ["python", "-m", "hub_upload.push", "--model", str(repository), "--repo_id", repo_id, "--push"]
    try:
        export_model(run, repository, PUBLISHED_FORMATS, overwrite=True, repo_id=repo_id)
        write_card(repository, repo_id, card_language)
        url = push_folder(plan_push(PushArguments(repository, repo_id, push_folder=True, private=private)))
    except (Exception, KeyboardInterrupt) as error:  # of whatever kind: the run is complete, and must not seem to fail
        way_out = "Make its repository by `python -m hub_upload.export`, and push that."
        if repository.is_dir():
            way_out = f"Push it later: {shlex.join(words + ['--private'] * private)}"
        logger.warning(
            "NOT PUSHED to %s: %s\nThe run is complete in %s. %s", repo_id, _error_sentence(error), run, way_out
        )
        return False
    shutil.rmtree(repository, ignore_errors=True)
    logger.info("Pushed to %s.", _printable_name(url)) if url else logger.info("%s has all of it already.", repo_id)
    return True


def _error_sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "Stopped."
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return " ".join(make_printable(f"{kind}{error}").split()).removesuffix(".") + "."


if __name__ == "__main__":
    run_command(main, resumable=True)
