"""What a push would change: the files of a folder against those of a repository, by their hashes, and the card."""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import CommitOperationAdd, metadata_load
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from capivara_common.cli import flag
from capivara_common.privacy import machine_path_in, secret_in
from hub_upload import remote as hub
from hub_upload.allowed_files import allowed_files, check_contents
from hub_upload.data_files import check_data, data_files
from hub_upload.limits import DEADLINE_HOURS

CARD = "README.md"
HUBS_OWN = {".gitattributes"}  # made by the Hub in every repository
REF_NAME = re.compile(r"(?!.*(\.\.|//|@\{|\.lock$|[./]$))[A-Za-z0-9_][\w.+/-]{0,200}")
PULL_REQUEST = re.compile(r"refs/pr/\d+")
SHOWN = 20  # names of one kind


@dataclass
class PushArguments:
    """Arguments of `hub_upload.push`."""

    model: Path = flag(..., "Folder to send: of a model or, with --repo-type dataset, of a data set.")
    repo_id: str = flag(..., "Repository on the Hub, owner/name. It is made where there is none.")
    push: bool = flag(False, "Send it. Without this flag nothing is changed on the Hub.")
    repo_type: Literal["model", "dataset"] = flag("model", "Kind of the repository.")
    revision: str = flag("main", "Branch, made from main where it is missing; or an open pull request, as refs/pr/1.")
    pull_request: bool = flag(False, "Open a pull request to main instead of changing it.")
    private: bool = flag(False, "Make a new repository private; a public one is refused.")
    tag: str | None = flag(None, "Name for the commit, such as v1.0; a new one.")
    message: str | None = flag(None, "Title of the commit.")
    delete: list[str] = flag([], "Files on the Hub that the same commit removes; all others stay.")
    deadline_hours: float = flag(
        DEADLINE_HOURS, "The push ends after so many hours, wherever it is; 300 s of silence end a call before."
    )

    def __post_init__(self) -> None:
        if not 0 < self.deadline_hours <= 1000:
            raise ValueError(f"deadline_hours must be above 0, 1000 at most, got {self.deadline_hours}.")
        self.model = Path(self.model)
        for name in ("repo_id", "revision", "tag", "message"):
            check_message(f"--{name.replace('_', '-')}", getattr(self, name))
        if path := machine_path_in(self.message or ""):
            raise ValueError(f"--message names a place on a machine, {path!r}. Leave it out.")
        hub.check_repo_id(self.repo_id)
        if not self.model.is_dir():
            raise ValueError(f"The folder {self.model} does not exist.")
        for name, value in (("revision", self.revision), ("tag", self.tag)):
            is_commit = re.fullmatch("[0-9a-f]{40}", value or "")
            known = REF_NAME.fullmatch(value or "v1") and not str(value).startswith("refs/") and not is_commit
            if not known and not (name == "revision" and PULL_REQUEST.fullmatch(value)):
                raise ValueError(f"{name} {value!r} is no name for a {'branch' if name == 'revision' else 'tag'}.")
        if self.pull_request and (self.tag or self.revision != "main"):
            raise ValueError("A pull request goes to main and gets no tag: leave out --revision and --tag.")


def is_on_hub(file: CommitOperationAdd, there: RepoFile | None) -> bool:
    """Whether the Hub has the content of a file of this machine, by the hashes of both; nothing is downloaded."""
    if there is None or there.size != file.upload_info.size:
        return False
    if there.lfs:
        return there.lfs.sha256 == file.upload_info.sha256.hex()
    with file.as_file() as content:
        return git_hash(content.read()) == there.blob_id


@dataclass
class PushPlan:
    """What a push would do."""

    args: PushArguments
    user: str | None  # whose token it is; None without one
    remote: hub.Remote
    metadata: dict[str, Any] | None  # of the card; None where the folder has none
    added: list[CommitOperationAdd] = field(default_factory=list)
    changed: list[CommitOperationAdd] = field(default_factory=list)
    same: list[CommitOperationAdd] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)  # files on the Hub that go
    stay: list[str] = field(default_factory=list)  # files on the Hub that the folder does not have

    def __post_init__(self) -> None:
        self.makes_branch = self.remote.exists and self.remote.head is None
        self.makes_tag = self.args.tag is not None and self.args.tag not in self.remote.tags

    @property
    def sent(self) -> list[CommitOperationAdd]:
        """Files that the commit adds or changes."""
        return self.added + self.changed


def plan(args: PushArguments) -> PushPlan:
    """Compare a folder with a repository; nothing is changed anywhere.

    Raises ValueError where a file must not be sent, PushError where the Hub can't be asked or would refuse the push.
    """
    paths = files_to_send(args.model, args.repo_type)
    metadata = card_metadata(args.model / CARD) if Path(CARD) in paths else None
    user, remote = hub.user_name(args.repo_id, args.repo_type), hub.look(args.repo_id, args.repo_type, args.revision)
    found = PushPlan(args, user, remote, metadata)
    for path in paths:
        file, there = CommitOperationAdd(path.as_posix(), args.model / path), remote.files.get(path.as_posix())
        (found.added if there is None else found.same if is_on_hub(file, there) else found.changed).append(file)
    found.deleted = [path for path in args.delete if path in remote.files]
    found.stay = sorted({*remote.files} - {path.as_posix() for path in paths} - {*found.deleted} - HUBS_OWN)
    _check_plan(found)
    return found


def files_to_send(folder: Path, repo_type: str) -> list[Path]:
    """The files of a folder that may leave this machine, relative to it, and no secret in them.

    Not `HfApi.upload_folder`: a star of its patterns stands for folders, too, and it follows links out of the folder.
    """
    paths = allowed_files(folder) if repo_type == "model" else data_files(folder)
    if not paths:
        raise ValueError(f"{folder} holds no file of a {repo_type}.")
    for path in paths:
        check_message("The name of a file", path.as_posix())
    if repo_type == "dataset":
        check_data(folder, paths)
        return sorted(paths)
    try:
        check_contents(folder)
    except ValueError as error:
        raise ValueError(f"{error} `python -m hub_upload.export` makes a folder that can be sent.") from error
    return sorted(paths)


def check_message(what: str, text: str | None) -> None:
    """Raise ValueError where a text that everybody will read holds a secret, which is not shown."""
    if found := secret_in(text or ""):
        raise ValueError(f"{what} holds {found[0]}. Leave it out.")


def card_metadata(card: Path) -> dict[str, Any]:
    """The YAML block that a card starts with. Raises ValueError where it is none."""
    try:
        return metadata_load(card) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The metadata of {CARD} is not valid YAML of `key: value` lines: {error}") from error


def report(planned: PushPlan) -> str:
    """The plan in words, to be read before it is carried out."""
    args, remote = planned.args, planned.remote
    state = f"{'private' if remote.private else 'public'}, at {str(remote.start)[:7]}"
    if not remote.exists:
        state = f"does not exist, will be made{', private' if args.private else ''}"
    branch = "a pull request to main" if args.pull_request else args.revision
    if remote.exists and remote.head is None:
        branch += ", will be made from main"
    lines = [f"{args.repo_type} {args.repo_id} ({state}), {branch}; token of {planned.user or 'nobody'}"]
    for file in planned.sent:
        size, there = readable_size(file.upload_info.size), remote.files.get(file.path_in_repo)
        kind, before = ("change", f", was {readable_size(there.size)}") if there else ("add", "")
        lines.append(f"  {kind:6}  {hub.plain_line(file.path_in_repo)}  ({size}{before})")
    lines += [
        f"  delete  {hub.plain_line(path)}  ({readable_size(remote.files[path].size)})" for path in planned.deleted
    ]
    lines += [f"  same    {len(planned.same)} files"] if planned.same else []
    lines += [f"  stays   {hub.plain_line(path)}  (on the Hub, not in the folder)" for path in planned.stay[:SHOWN]]
    lines += [f"  stays   {len(planned.stay) - SHOWN} more"] if len(planned.stay) > SHOWN else []
    if planned.metadata:
        lines.append("Card metadata:")
        for key, value in planned.metadata.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(hub.plain_line(f"  {key}: {text if len(text) <= 100 else f'{text[:97]}...'}"))
    if CARD in {file.path_in_repo for file in planned.changed}:
        lines += ["Changes of the card:", *map(hub.plain_line, _card_diff(planned))]
    lines += [f"note: {hub.plain_line(note)}" for note in _notes(planned)]
    return "\n".join(lines)


def readable_size(size: int) -> str:
    """Bytes in words, of a thousand each."""
    for exponent, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**exponent:
            return f"{size / 10**exponent:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{size} bytes"


def _check_plan(planned: PushPlan) -> None:
    """Raise PushError where the push would be refused, or would not be what was meant."""
    args, remote = planned.args, planned.remote
    hub.check_visibility(args.repo_id, remote, args.private)
    if args.pull_request and not remote.exists:
        raise hub.PushError(f"There is no {args.repo_id}, or the token does not see it: a pull request needs one.")
    if args.revision.startswith("refs/") and remote.head is None:
        raise hub.PushError(f"{args.repo_id} has no open pull request {args.revision}.")
    if args.revision in remote.tags and remote.head is None:
        raise hub.PushError(f"{args.revision} is a tag of {args.repo_id}, and tags stay where they are. Name a branch.")
    both = {*args.delete} & {file.path_in_repo for file in planned.added + planned.changed + planned.same}
    if both:
        raise hub.PushError(f"--delete names {min(both)}, which the folder has. Remove it there first.")
    tagged = remote.tags.get(args.tag or "")
    if tagged and (planned.sent or planned.deleted or tagged != remote.head):
        raise hub.PushError(
            f"The tag {args.tag} of {args.repo_id} exists already, at {tagged[:7]}. Nothing was sent. Take another "
            "name, or delete the tag on the Hub."
        )


def _notes(planned: PushPlan) -> list[str]:
    args, notes = planned.args, []
    if planned.metadata is None:
        notes.append(f"there is no {CARD}: the page on the Hub will be empty.")
    elif "license" not in planned.metadata:
        notes.append("the card states no license, and without one nobody may use what is published.")
    if planned.user is None:
        notes.append("there is no token, which --push needs: `hf auth login`, or HF_TOKEN.")
    notes += [f"--delete {path}: it is not on the Hub." for path in args.delete if path not in planned.remote.files]
    if args.repo_type == "dataset" and any(file.path_in_repo.endswith(".arrow") for file in planned.sent):
        notes.append("Arrow files are read by load_from_disk; load_dataset needs parquet, or data_files in the card.")
    return notes


def _card_diff(planned: PushPlan) -> list[str]:
    args, remote = planned.args, planned.remote
    before = hub.remote_text(args.repo_id, args.repo_type, CARD, remote.files[CARD], str(remote.start))
    if before is None:
        return [f"(the one on the Hub has {readable_size(remote.files[CARD].size)}, too much to compare)"]
    after = (args.model / CARD).read_text(encoding="utf-8")
    names = (f"{CARD} on the Hub", f"{CARD} in {args.model}")
    # splitlines would also break at characters that only a hostile text has
    return list(difflib.unified_diff(before.split("\n"), after.split("\n"), *names, lineterm="", n=1))
