"""Upload the folder of a model, dataset or Space to the Hugging Face Hub in one commit, or preview the upload.

    python -m hub_upload.export --model runs/mine --output repository   # writes the folder to upload
    python -m hub_upload.push --model repository --repo_id my-name/my-model   # previews the upload
    python -m hub_upload.push --model repository --repo_id my-name/my-model --push --private
    python -m hub_upload.push --model repository --repo_id an-org/its-model --push --pull_request
    python -m hub_upload.push --model data/mine --repo_id my-name/my-data --repo_type dataset --push
    python -m hub_upload.push --model demo --repo_id my-name/my-demo --repo_type space --push   # from hub_upload.space

Without --push, the changes are only listed. The access token comes from HF_TOKEN, or from the file of `hf auth login`.
If the connection breaks, run the same command again.

Only files that belong to a model, dataset or Space are uploaded. Files that exist only on the Hub stay there; use the
`hf` command to delete them. In a Space, they are deleted if their top-level folder is uploaded again.
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
from typing import Any, Literal

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants, errors, get_session, get_token
from huggingface_hub.hf_api import HfApi, RepoFile
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils.sha import git_hash
from tqdm import tqdm

from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import read_json
from capivara_common.privacy import make_printable
from hub_upload.card import CARD_FILE, find_differences_between_generated_card_and_files, write_card
from hub_upload.licenses import check_stated_license
from hub_upload.upload_checks import check_repo_id, check_text_is_publishable, list_and_check_files_to_send

# Seconds without an answer before a call to the Hub fails. huggingface_hub sets no timeout by default, so a dead
# connection would block forever.
HUB_TIMEOUT_S = 300
RETRY_DELAY_S = 2  # seconds to wait before a failed call is repeated
NO_TOKEN_MESSAGE = "There is no token. Save one with write access using `hf auth login`, or set HF_TOKEN."
RETRY_HINT = (
    "Run the same command again; files that have already arrived are not sent again. If you used --pull_request, first "
    "check on the repository's page whether the pull request exists already."
)
RETRYABLE_STATUS_CODES = {408, 429, 500, 502, 503, 504}  # HTTP statuses of failures that may be temporary
# Maps the HTTP status of an answer from the Hub to the error message for the user. For all other statuses, the message
# quotes the explanation that the Hub gave.
REFUSAL_MESSAGES = {
    401: "The Hub rejected the token (401): it is wrong or has expired. Create one with write access at {tokens}, then "
    "save it with `hf auth login` or set HF_TOKEN.",
    403: "The Hub denied access (403): {reason}. Writing to {repo_id} requires a token with write access from a member "
    "of {owner} ({tokens}).",
    412: "{repo_id} was changed by somebody else in the meantime (412), so nothing was committed. Run the command "
    "without --push to see what the repository holds now, then with --push.",
}
REPOSITORY_FOLDER = "repository"  # subfolder of a training run that holds the exported model until it is uploaded
# Formats in which a training run publishes its model. ONNX is left out, because its export takes minutes and needs
# additional packages.
PUBLISHED_FORMATS = ("transformers", "open_clip", "sentence_transformers")
format_bytes = partial(tqdm.format_sizeof, suffix="B")  # for example "1.46GB"; units are powers of 1000
logger = logging.getLogger("capivara")


class PushError(OSError):
    """Error that is raised if a push fails. The message is one line: the reason and a hint, without access tokens."""

    def __init__(self, message: str):
        super().__init__(" ".join(make_printable(message).split()))


class HubUnreachableError(PushError):
    """Error that is raised if the Hub does not answer, or if the offline mode of huggingface_hub is on."""


@dataclass
class PushArguments:
    """Command-line arguments of `hub_upload.push`, which uploads a model, dataset or Space to the Hub."""

    model: Path = flag(..., "Folder to upload: a model or, with --repo_type, a dataset or Space.")
    repo_id: str = flag(..., "Repository on the Hub, owner/name. It is created if it does not exist.")
    push: bool = flag(False, "Upload the folder. Without this flag, nothing is changed on the Hub.")
    repo_type: Literal["model", "dataset", "space"] = flag("model", "Type of the repository.")
    revision: str = flag("main", "Branch to commit to. If it does not exist, it is created from the branch main.")
    pull_request: bool = flag(False, "Open a pull request to the branch main, instead of committing to this branch.")
    private: bool = flag(False, "Create the repository as private. If it exists and is public, the push fails.")
    message: str | None = flag(None, "Title of the commit. Default: generated from the files, such as 'Add 4 files'.")

    def __post_init__(self) -> None:
        for name in ("repo_id", "revision", "message"):
            check_text_is_publishable(getattr(self, name) or "", f"--{name}")
        check_repo_id(self.repo_id)
        if not self.model.is_dir():
            raise ValueError(f"The folder {self.model} does not exist. Check --model.")
        if self.pull_request and self.revision != "main":
            raise ValueError(
                f"A pull request always targets main, got --revision {self.revision}. Leave out --revision."
            )


@dataclass
class RemoteRepository:
    """State of a repository on the Hub before a push.

    The defaults describe a repository that does not exist or can't be read.

    Attributes:
        exists: Whether the repository exists and can be read.
        is_private: Whether the repository is private.
        branch_head: Hash of the last commit of the branch to push to. None if the branch does not exist.
        base_commit: Hash of the new commit's parent: `branch_head`, or for a new branch, the last commit of main. None
            if the repository does not exist.
        files: Files at `base_commit`, a dict {path: size and hashes}.
    """

    exists: bool = False
    is_private: bool = False
    branch_head: str | None = None
    base_commit: str | None = None
    files: dict[str, RepoFile] = field(default_factory=dict)


@dataclass
class PushPlan:
    """Changes that a push would make on the Hub.

    Attributes:
        args: Folder, repository and options of the push.
        user: Owner of the access token, or None if unknown.
        remote: State of the repository on the Hub.
        metadata: Front matter (YAML header) of the card README.md. None if there is no card.
        added_files: Files to add or change.
        unchanged_paths: Files that the Hub already has with the same content.
        deleted_paths: Files to delete, only in a Space.
        unreachable: Reason why the Hub could not be reached, otherwise "".
        creates_branch: Whether the push must create the branch.
    """

    args: PushArguments
    user: str | None
    remote: RemoteRepository
    metadata: dict[str, Any] | None
    added_files: list[CommitOperationAdd]
    unchanged_paths: list[str]
    deleted_paths: list[str]
    unreachable: str = ""

    def __post_init__(self) -> None:
        self.creates_branch = self.remote.exists and self.remote.branch_head is None


def main(argv: list[str] | None = None) -> None:
    """Run the command: print the changes that a push would make on the Hub and, with --push, upload them."""
    args = parse_arguments(PushArguments, __doc__, argv)
    plan = plan_push(args)
    print(_describe_push(plan), flush=True)
    warn_or_fail_if_card_is_outdated(args)
    if not (plan.added_files or plan.deleted_paths or plan.creates_branch):
        print("The Hub already has all files; there is nothing to send.")
    elif not args.push:
        size = format_bytes(sum(file.upload_info.size for file in plan.added_files))
        exception = ", except those that the Hub already has" if plan.unreachable else ""
        count = len(plan.added_files)
        print(f"Nothing was sent. With --push, {count} files ({size}) are sent in one commit{exception}.")
    elif url := push_planned_changes(plan):
        print(f"Pushed in one commit: {_printable_name(url)}")
    else:
        print("The Hub already had all files; no commit was made.")


# --- Plan of the changes ---------------------------------------------------------------------------------------------


def plan_push(args: PushArguments) -> PushPlan:
    """Find out which changes a push would make, by comparing a folder with a repository on the Hub.

    Nothing is changed on the Hub. If `args.push` is False, the plan is only a preview, which needs no connection.

    Args:
        args: Folder, repository and options of the push.

    Returns:
        The planned changes. Without a connection, all files count as added.

    Raises:
        ValueError: If there is no file to send, a file must not be published (for example because of an access token),
            or the card's front matter is malformed or states a license that a source of the model does not permit.
        PushError: If the Hub refuses a request, or `args.push` is True and the Hub can't be reached. Also if
            `args.private` is True and the repository is public, or `args.pull_request` is True and it does not exist.
    """
    paths, origins = list_and_check_files_to_send(args.model, args.repo_type), {}
    try:
        metadata = (metadata_load(args.model / CARD_FILE) or {}) if Path(CARD_FILE) in paths else None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The front matter of {CARD_FILE} is not valid YAML of `key: value` lines: {error}") from error
    with suppress(ValueError, OSError):
        origins = read_json(args.model / "run.json", origins=dict)["origins"]
    check_stated_license(origins, (metadata or {}).get("license"))
    user, remote, unreachable = None, RemoteRepository(), ""
    try:
        again = RETRY_HINT if args.push else "Run the same command again."
        with _convert_hub_errors_and_mask_logs(args.repo_id, again):
            user = str(_retry_once(lambda: HfApi().whoami(cache=True)["name"])) if get_token() else None
            remote = _read_remote_repository(args.repo_id, args.repo_type, args.revision)
    except HubUnreachableError as error:
        if args.push:
            raise
        unreachable = str(error)
    # Exactly the listed files are committed. `HfApi.upload_folder` is not used, because a star in its patterns also
    # matches slashes, and it follows symbolic links that lead out of the folder.
    files = [CommitOperationAdd(path.as_posix(), args.model / path) for path in paths]
    unchanged = [file.path_in_repo for file in files if _has_same_content(file, remote.files.get(file.path_in_repo))]
    added = [file for file in files if file.path_in_repo not in unchanged]
    deleted = []
    if args.repo_type == "space":
        # Files of an earlier version of the Space, such as old data files of its index, would stay on the Hub forever.
        # So a file on the Hub is deleted if its top-level folder is uploaded again and no longer has the file.
        ours, folders = {path.as_posix() for path in paths}, {path.parts[0] for path in paths}
        deleted = [path for path in remote.files if path not in ours and path.partition("/")[0] in folders]
    _check_visibility(args.repo_id, remote, args.private)
    if args.pull_request and not remote.exists and not unreachable:
        raise PushError(
            f"A pull request needs an existing repository: {args.repo_id} does not exist, or the token can't see it."
        )
    return PushPlan(args, user, remote, metadata, added, unchanged, deleted, unreachable)


def warn_or_fail_if_card_is_outdated(args: PushArguments) -> None:
    """Print a warning if the model card differs from the files of the model. With --push, raise an error instead.

    Handwritten cards, and cards of datasets and Spaces, are not checked.

    Args:
        args: Folder, repository type and options of the push.

    Raises:
        ValueError: If card and files differ, and `args.push` is True.
    """
    faults = find_differences_between_generated_card_and_files(args.model) if args.repo_type == "model" else []
    if not faults:
        return
    listed = "".join(f"\n  {_printable_name(fault)}" for fault in faults)
    message = f"The card differs from its files. Write it again with `python -m hub_upload.card`.{listed}"
    if args.push:
        raise ValueError(f"Nothing was sent. {message}")
    print(f"Warning: {message}", flush=True)


def _describe_push(plan: PushPlan) -> str:
    """Describe to the user which changes a push will make on the Hub.

    Args:
        plan: Result of `plan_push`.

    Returns:
        A text of several lines: a line for the repository, a line for each file that is added, changed, deleted or
        exists only on the Hub, the number of unchanged files, and notes on the license, the card and the token.
    """
    args, remote, remote_files = plan.args, plan.remote, plan.remote.files
    state = f"does not exist, will be created{' as private' * args.private}"
    if remote.exists:
        state = f"{'private' if remote.is_private else 'public'}, at {str(remote.base_commit)[:7]}"
    if plan.unreachable:
        state = "unknown: the Hub can't be reached"
    branch = "a pull request to main" if args.pull_request else args.revision
    branch += ", will be created from main" if plan.creates_branch else ""
    token = "" if plan.unreachable else f"; token of {_printable_name(plan.user or 'nobody')}"
    lines = [f"{args.repo_type} {args.repo_id} ({state}), {branch}{token}"]
    sizes = {file.path_in_repo: file.upload_info.size for file in plan.added_files}
    new_file_verb = "send  " if plan.unreachable else "add   "
    for path in sorted(sizes, key=lambda path: path in remote_files):
        verb = "change" if path in remote_files else new_file_verb
        lines.append(f"  {verb}  {_printable_name(path)}  ({format_bytes(sizes[path])})")
    lines += [f"  delete  {_printable_name(path)}" for path in plan.deleted_paths]
    lines += [f"  same    {len(plan.unchanged_paths)} files"] if plan.unchanged_paths else []
    # Files that are only on the Hub are listed, except .gitattributes, which the Hub itself creates.
    others = sorted({*remote_files} - {".gitattributes", *plan.deleted_paths, *plan.unchanged_paths, *sizes})
    lines += [f"  stays   {_printable_name(path)}  (on the Hub, not in the folder)" for path in others]
    if plan.metadata is None:
        lines.append(f"note: there is no {CARD_FILE}, so the page on the Hub will be empty.")
    else:
        stated = plan.metadata.get("license") or "none; without a license, nobody may use what you publish"
        lines.append(f"note: license: {_printable_name(str(stated))}")
    if plan.unreachable:
        lines.append(f"note: the folder was not compared with the Hub. {plan.unreachable}")
    if plan.user is None and get_token() is None:
        lines.append("note: there is no token. --push needs one: run `hf auth login`, or set HF_TOKEN.")
    return "\n".join(lines)


def _printable_name(text: str) -> str:
    """Escape line feeds and control characters in a text, so that it is safe to print on one line.

    Args:
        text: Text from a file or from the Hub.

    Returns:
        The escaped text.
    """
    return make_printable(text.replace("\n", "\\n"))


def _has_same_content(file: CommitOperationAdd, remote_file: RepoFile | None) -> bool:
    """Return whether a local file and a file on the Hub have the same content.

    Sizes and hashes are compared, so the file on the Hub is not downloaded.

    Args:
        file: Local file.
        remote_file: File with the same path on the Hub, or None if there is none.
    """
    if remote_file is None or remote_file.size != file.upload_info.size:
        return False
    if remote_file.lfs:
        return remote_file.lfs.sha256 == file.upload_info.sha256.hex()
    with file.as_file() as content:
        return git_hash(content.read()) == remote_file.blob_id


def _check_visibility(repo_id: str, remote: RemoteRepository, private: bool) -> None:
    """Check that a push that must be private does not go to a public repository.

    Args:
        repo_id: Repository on the Hub, owner/name, for the error message.
        remote: State of the repository.
        private: Whether the repository must be private.

    Raises:
        PushError: If `private` is set, and the repository exists and is public.
    """
    if private and remote.exists and not remote.is_private:
        raise PushError(
            f"{repo_id} is public, and --private only applies to new repositories. Make it private in its settings on "
            "the Hub first, or choose another name."
        )


# --- Upload ----------------------------------------------------------------------------------------------------------


def push_planned_changes(plan: PushPlan) -> str | None:
    """Upload the planned changes to the Hub in one commit, or as a pull request.

    The repository and the branch are created if they do not exist.

    Args:
        plan: Result of `plan_push`.

    Returns:
        URL of the commit or pull request. None if the Hub already has all files.

    Raises:
        PushError: If there is no access token, the Hub refuses the push, or the connection breaks.
    """
    args, remote, api = plan.args, plan.remote, HfApi()
    with _convert_hub_errors_and_mask_logs(args.repo_id):
        if get_token() is None:
            raise PushError(NO_TOKEN_MESSAGE)
        if not remote.exists:
            sdk = {"space_sdk": (plan.metadata or {}).get("sdk")} if args.repo_type == "space" else {}
            api.create_repo(args.repo_id, repo_type=args.repo_type, private=args.private or None, **sdk)
            remote = _read_remote_repository(args.repo_id, args.repo_type, args.revision)
        if remote.branch_head is None:
            api.create_branch(args.repo_id, branch=args.revision, revision=remote.base_commit, repo_type=args.repo_type)
        return _create_commit(plan, str(remote.base_commit)) if plan.added_files or plan.deleted_paths else None


def _create_commit(plan: PushPlan, parent: str) -> str:
    """Commit the planned changes on top of an existing commit.

    If the Hub does not answer, the commit is sent once more, because sending it twice does no harm. A pull request is
    sent only once, because the Hub might open a second pull request.

    Args:
        plan: Result of `plan_push`.
        parent: Hash of the last commit of the branch. If the branch has newer commits, the Hub refuses the new commit.

    Returns:
        URL of the new commit or pull request.
    """
    args = plan.args
    operations = [*plan.added_files, *(CommitOperationDelete(path, is_folder=False) for path in plan.deleted_paths)]

    def send() -> str:
        commit = HfApi().create_commit(
            args.repo_id, operations, commit_message=args.message or _build_default_commit_title(plan),
            repo_type=args.repo_type, revision=args.revision, parent_commit=parent, create_pr=args.pull_request,
        )  # fmt: skip
        return commit.pr_url or commit.commit_url

    try:
        return send() if args.pull_request else _retry_once(send)
    except errors.HfHubHTTPError as error:
        # Status 412 means that `parent` is no longer the last commit of the branch. Perhaps the first call of `send`
        # made our commit, and only the answer was lost. If the files on the Hub now equal ours, the push has succeeded.
        if error.response.status_code != 412:
            raise
        remote = _read_remote_repository(args.repo_id, args.repo_type, args.revision)
        has_our_files = all(_has_same_content(file, remote.files.get(file.path_in_repo)) for file in plan.added_files)
        if not has_our_files or {*plan.deleted_paths} & {*remote.files}:
            raise
        url_prefix = constants.REPO_TYPES_URL_PREFIXES.get(args.repo_type, "")
        return f"{constants.ENDPOINT}/{url_prefix}{args.repo_id}/commit/{remote.branch_head}"


def _build_default_commit_title(plan: PushPlan) -> str:
    """Return the commit title for a push without --message, such as "Add 4 files" or "Update README.md".

    Args:
        plan: Changes to commit. If at least one of the files exists on the Hub, the title begins with "Update",
            otherwise with "Add".
    """
    names = [file.path_in_repo for file in plan.added_files] + plan.deleted_paths
    verb = "Update" if {*names} & {*plan.remote.files} else "Add"
    return f"{verb} {names[0]}" if len(names) == 1 else f"{verb} {len(names)} files"


# --- Calls to the Hub ------------------------------------------------------------------------------------------------


def _read_remote_repository(repo_id: str, repo_type: str, revision: str) -> RemoteRepository:
    """Read the state of a repository and of one of its branches from the Hub.

    Args:
        repo_id: Repository on the Hub, owner/name.
        repo_type: "model", "dataset" or "space".
        revision: Name of the branch. If the branch does not exist, the files of main are listed.

    Returns:
        The state of the repository. Its field `exists` is False if there is no such repository, or if it can't be read
        with the access token.
    """
    api = HfApi()
    try:
        info = _retry_once(lambda: api.repo_info(repo_id, repo_type=repo_type))
    except errors.RepositoryNotFoundError as error:
        if isinstance(error, errors.GatedRepoError):
            raise
        return RemoteRepository()
    refs = _retry_once(lambda: api.list_repo_refs(repo_id, repo_type=repo_type))
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    base_commit = str(heads.get(revision) or heads.get("main") or info.sha)
    entries = api.list_repo_tree(repo_id, repo_type=repo_type, revision=base_commit, recursive=True)
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    return RemoteRepository(True, info.private, heads.get(revision), base_commit, files)


def _retry_once(call: Callable[[], Any]) -> Any:
    """Call a function that sends a request to the Hub, and call it once more if the failure may be temporary.

    Args:
        call: Function without arguments.

    Returns:
        The result of `call()`.

    Raises:
        HTTPError: If both calls fail, or if the first call fails for a reason that is not temporary, such as a wrong
            token.
    """
    try:
        return call()
    except errors.HTTPError as error:
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code not in RETRYABLE_STATUS_CODES:
            raise
        logger.warning("%s: %s Trying again in %s s.", type(error).__name__, str(error).split("\n")[0], RETRY_DELAY_S)
        time.sleep(RETRY_DELAY_S)
        return call()


@contextmanager
def _convert_hub_errors_and_mask_logs(repo_id: str, again: str = RETRY_HINT) -> Iterator[None]:
    """Return a context manager that turns errors of calls to the Hub into PushError, with a message for the user.

    Inside the `with` block, access tokens and keys are masked in all log messages.

    Args:
        repo_id: Repository to name in error messages, owner/name.
        again: Advice that is added to the error message if the failure may be temporary.

    Raises:
        HubUnreachableError: If the Hub did not answer.
        PushError: If a call failed for another reason.
    """
    get_session().timeout = HUB_TIMEOUT_S
    create_record = logging.getLogRecordFactory()

    def create_masked_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = create_record(*args, **kwargs)
        # If the arguments of a log message don't match its placeholders, the record stays as it is, and the logging
        # module reports the mistake later.
        with suppress(TypeError, ValueError):
            record.msg, record.args = make_printable(record.getMessage()), None
        return record

    logging.setLogRecordFactory(create_masked_record)
    logging.captureWarnings(True)
    try:
        yield
    # Errors of every type are caught: a proxy, for example, may answer with an HTML page, which causes a parsing error.
    except Exception as error:
        for bar in list(getattr(tqdm, "_instances", ())):
            # Closing the progress bar ends its line, so that the error message starts on a new line.
            bar.close()
        if isinstance(error, PushError):
            raise
        logger.debug("A call to the Hub failed.", exc_info=True)
        while isinstance(error, RuntimeError) and error.__cause__ is not None:
            # huggingface_hub wraps errors of uploads in a RuntimeError, whose `__cause__` is the actual error.
            error = error.__cause__
        has_answer = isinstance(error, errors.HfHubHTTPError)
        is_unreachable = isinstance(error, errors.OfflineModeIsEnabled | errors.HTTPError) and not has_answer
        error_type = HubUnreachableError if is_unreachable else PushError
        raise error_type(_explain_hub_error(error, repo_id, again)) from None
    finally:
        logging.captureWarnings(False)
        logging.setLogRecordFactory(create_record)


def _explain_hub_error(error: BaseException, repo_id: str, again: str) -> str:
    """Return an error message that says why a call to the Hub failed and what the user can do about it.

    Args:
        error: Error that the call to the Hub raised.
        repo_id: Repository to name in the message, owner/name.
        again: Advice that is added to the message if the failure may be temporary.
    """
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        reason = " ".join((error.server_message or str(error)).split()).rstrip(".")
        text = REFUSAL_MESSAGES.get(status, "The Hub refused the request ({status}): {reason}.")
        text += f" {again}" if status in RETRYABLE_STATUS_CODES else ""
        tokens = f"{constants.ENDPOINT}/settings/tokens"
        return text.format(repo_id=repo_id, owner=repo_id.split("/")[0], status=status, reason=reason, tokens=tokens)
    if isinstance(error, errors.HTTPError):
        return f"The connection to the Hub broke ({type(error).__name__}: {error}). {again}"
    if isinstance(error, OSError) or type(error) is RuntimeError:  # Xet, the Hub's file storage, raises RuntimeError
        return str(error) or type(error).__name__
    return (
        f"{constants.ENDPOINT} did not answer like the Hub ({type(error).__name__}: {error}). A proxy or a "
        "login page may have answered instead. Check HF_ENDPOINT and the network, then run the same command again."
    )


# --- Push of a training run ------------------------------------------------------------------------------------------


def ensure_writable_repository(repo_id: str, private: bool = False) -> None:
    """Check before a long training run that its model can be pushed to the Hub afterwards.

    The repository is created if it does not exist.

    Args:
        repo_id: Repository on the Hub, owner/name.
        private: Whether the repository must be private.

    Raises:
        ValueError: If `repo_id` is not a valid repository id.
        PushError: If the Hub can't be reached, write access is missing, or `private` is True but the repository is
            public.
    """
    check_repo_id(repo_id)
    api = HfApi()
    with _convert_hub_errors_and_mask_logs(repo_id):
        if get_token() is None:
            raise PushError(NO_TOKEN_MESSAGE)
        remote = _read_remote_repository(repo_id, "model", "main")
        _check_visibility(repo_id, remote, private)
        if not remote.exists:
            api.create_repo(repo_id, private=private or None)
        # Early 2.x releases of huggingface_hub can't check whether the token has write access. With these releases, a
        # token without write access causes an error only after training, at the upload.
        elif "write" in inspect.signature(api.auth_check).parameters:
            _retry_once(lambda: api.auth_check(repo_id, write=True))


def try_export_and_push_run(run: Path, repo_id: str, private: bool = False, card_language: str = "en") -> None:
    """Export the model of a finished training run with a model card, and push the export to the Hub.

    If this fails, no error is raised. A warning with the reason is logged, and an exported folder is kept for a later
    push.

    Args:
        run: Folder of the training run.
        repo_id: Repository on the Hub, owner/name.
        private: Whether the repository must be private. False: a new repository gets the default of the Hub account.
        card_language: Language of the model card, "en" or "pt".
    """
    # Imported here and not at the top of the file, because hub_upload.export imports torch. This is slow, and the other
    # functions of this file don't need it.
    from hub_upload.export import export_model

    repository = run / REPOSITORY_FOLDER
    words = ["python", "-m", "hub_upload.push", "--model", str(repository), "--repo_id", repo_id, "--push"]
    try:
        export_model(run, repository, PUBLISHED_FORMATS, overwrite=True, repo_id=repo_id)
        # The card is written after the export, because the export rewrites the files that the card describes.
        write_card(repository, repo_id, card_language)
        url = push_planned_changes(plan_push(PushArguments(repository, repo_id, push=True, private=private)))
    # Errors of every type are caught. Otherwise, the command would end with an error although the training is complete.
    except (Exception, KeyboardInterrupt) as error:
        hint = "Export it with `python -m hub_upload.export`, then push the exported folder."
        if repository.is_dir():
            hint = f"Push it later: {shlex.join(words + ['--private'] * private)}"
        reason = _describe_error_with_secrets_masked(error)
        logger.warning("NOT PUSHED to %s: %s\nThe run is complete in %s. %s", repo_id, reason, run, hint)
        return
    shutil.rmtree(repository, ignore_errors=True)
    logger.info("Pushed to %s.", _printable_name(url)) if url else logger.info("%s already has all files.", repo_id)


def _describe_error_with_secrets_masked(error: BaseException) -> str:
    """Describe an exception in one line that ends with a full stop. Access tokens and keys are masked.

    Args:
        error: Exception of any type. For types other than ValueError and OSError, the line starts with the name of the
            type. For a KeyboardInterrupt, the line is "Stopped.".
    """
    if isinstance(error, KeyboardInterrupt):
        return "Stopped."
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return " ".join(make_printable(f"{kind}{error}").split()).removesuffix(".") + "."


if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
