"""Send a model or data set folder to the Hugging Face Hub, in one commit; without --push, show what it would change.

    python -m hub_upload.export --model runs/mine --output repository   # the folder that is sent
    python -m hub_upload.push --model repository --repo-id my-name/my-model
    python -m hub_upload.push --model repository --repo-id my-name/my-model --push --private --tag v1.0
    python -m hub_upload.push --model repository --repo-id an-org/its-model --push --pull-request
    python -m hub_upload.push --model data/mine --repo-id my-name/my-data --repo-type dataset --push

The token is huggingface_hub's own: HF_TOKEN, or what `hf auth login` has saved. Only files that belong to a model or a
data set are sent; files on the Hub that the folder does not have stay. After a broken connection, run the same command
again: files that have arrived are not sent a second time, and what has not changed makes no commit.
"""

import itertools
import sys
from contextlib import suppress

from huggingface_hub import CommitInfo, CommitOperationDelete, HfApi, constants, get_token

from capivara_common.cli import parse, run_command
from hub_upload import remote as hub
from hub_upload.card import outdated
from hub_upload.limits import program_limit
from hub_upload.push_plan import SHOWN, PushArguments, PushPlan, is_on_hub, plan, readable_size, report

NO_TOKEN = "There is no token. Save one that may write by `hf auth login`, or set HF_TOKEN."


def push(planned: PushPlan) -> str | None:
    """Send what was planned, in one commit, or raise PushError, whose message has the way out.

    Returns:
        The address of the commit or pull request; None where the Hub has everything, and no commit was made.
    """
    args = planned.args
    with hub.hub_errors(args.repo_id, args.repo_type):
        if get_token() is None:
            raise hub.PushError(NO_TOKEN)
        parent = _prepared_parent(planned)
        commit = _checked_commit(planned, parent) if planned.sent or planned.deleted else None
        if planned.makes_tag:
            _tag(planned, commit.oid if commit else parent)
    return None if commit is None else commit.pr_url or commit.commit_url


def main(argv: list[str] | None = None) -> None:
    """The command."""
    try:
        args = parse(PushArguments, __doc__, argv)
        with program_limit(args.deadline_hours):
            planned = plan(args)
            print(report(planned), flush=True)
            check_card(planned.args)
            _finish(planned)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {hub.plain(str(error))}")
    except KeyboardInterrupt:
        print("\nStopped. The same command resumes: files that have arrived are not sent again.", file=sys.stderr)
        sys.exit(130)


def check_card(args: PushArguments) -> None:
    """Warn where a card states other figures than its files. Raises ValueError where it was about to be sent."""
    faults = outdated(args.model) if args.repo_type == "model" else []
    if not faults:
        return
    listed = "".join(f"\n  {hub.plain_line(fault)}" for fault in faults[:SHOWN])
    message = f"The card differs from its files; write it again with `python -m hub_upload.card`. {listed}"
    if args.push:
        raise ValueError(f"Nothing was sent. {message}")
    print(f"Warning: {message}", flush=True)


def _finish(planned: PushPlan) -> None:
    """Push if it was asked for, and print what was done."""
    args, sent = planned.args, planned.sent
    if not (sent or planned.deleted or planned.makes_branch or planned.makes_tag):
        print("The Hub has all of it already; there is nothing to send.")
        return
    if not args.push:
        size = readable_size(sum(file.upload_info.size for file in sent))
        print(f"Nothing was sent. With --push, {len(sent)} files ({size}) are sent in one commit.")
        return
    url = push(planned)
    if url:
        print(f"Pushed in one commit: {hub.plain_line(url)}")
    else:
        print("All files were there already; no commit was made.")
    if planned.makes_tag:
        print(f"Tagged {args.tag}.")


def _prepared_parent(planned: PushPlan) -> str:
    """Create repository and branch where they are missing; returns the parent commit."""
    args, remote, api = planned.args, planned.remote, HfApi()
    if not remote.exists:
        api.create_repo(args.repo_id, repo_type=args.repo_type, private=args.private or None)
        remote = hub.look(args.repo_id, args.repo_type, args.revision)
        hub.check_visibility(args.repo_id, remote, args.private)
    if remote.head is None:
        api.create_branch(args.repo_id, branch=args.revision, revision=remote.start, repo_type=args.repo_type)
        if hub.look(args.repo_id, args.repo_type, args.revision).head is None:
            raise hub.PushError(f"The Hub has answered, but made no branch {args.revision}. {hub.ANEW}")
    return str(remote.start)


def _checked_commit(planned: PushPlan, parent: str) -> CommitInfo:
    """The commit, of which the Hub's list of files says that all has arrived."""
    args = planned.args
    deletions = [CommitOperationDelete(path, is_folder=False) for path in planned.deleted]
    commit = _committed(planned, [*planned.sent, *deletions], parent)
    there = hub.files_at(args.repo_id, args.repo_type, commit.pr_revision or commit.oid)
    missing = [file.path_in_repo for file in planned.sent if not is_on_hub(file, there.get(file.path_in_repo))]
    if missing:
        raise hub.PushError(
            f"The commit was made ({commit.commit_url}), but without {', '.join(missing[:SHOWN])}. Has the repository "
            "a .gitignore that leaves it out, or did the folder change meanwhile?"
        )
    return commit


def _committed(planned: PushPlan, operations: list, parent: str) -> CommitInfo:
    """The commit on top of `parent`, tried again where the line broke or the Hub was in trouble.

    It may have been made all the same, so the Hub is asked before the next try. Uploads are repeated by the client.
    """
    args, tries = planned.args, itertools.count()

    def attempt() -> CommitInfo:
        if next(tries) and (made := _made_by_now(planned, parent)):
            return made
        try:
            return HfApi().create_commit(
                args.repo_id, operations, commit_message=args.message or _title(planned), repo_type=args.repo_type,
                revision=args.revision, create_pr=args.pull_request, parent_commit=parent,
            )  # fmt: skip
        except Exception as error:  # a malformed answer raises any kind
            if getattr(getattr(error, "response", None), "status_code", None) == 412:
                raise _overtaken(planned, parent) from None
            if args.pull_request and hub.is_unclear(error):
                raise hub.PushError(
                    f"{hub.one_line(error)} Whether the pull request was opened is not known: look at the page of "
                    f"{args.repo_id} before you run the same command again."
                ) from None
            raise

    return hub.with_retries(attempt, hub.is_unclear)


def _made_by_now(planned: PushPlan, parent: str) -> CommitInfo | None:
    """The commit of a try whose answer was lost; None where the branch is as it was."""
    args = planned.args
    remote = hub.look(args.repo_id, args.repo_type, args.revision)
    if remote.head == parent:
        return None
    arrived = all(is_on_hub(file, remote.files.get(file.path_in_repo)) for file in planned.sent)
    if not arrived or {*planned.deleted} & {*remote.files}:
        raise _overtaken(planned, parent)
    kind = constants.REPO_TYPES_URL_PREFIXES.get(args.repo_type, "")
    url = f"{constants.ENDPOINT}/{kind}{args.repo_id}/commit/{remote.head}"
    return CommitInfo(commit_url=url, commit_message="", commit_description="", oid=str(remote.head))


def _overtaken(planned: PushPlan, parent: str) -> hub.PushError:
    """The error that names who has changed the branch meanwhile, where the Hub tells."""
    args, newer = planned.args, []
    with suppress(Exception):  # of whatever kind: nothing depends on it
        commits = HfApi().list_repo_commits(args.repo_id, repo_type=args.repo_type, revision=args.revision)
        newer = list(itertools.takewhile(lambda commit: commit.commit_id != parent, commits))[:3]
    said = "; ".join(f'{", ".join(c.authors) or "somebody"}: "{c.title}" ({c.commit_id[:7]})' for c in newer)
    return hub.PushError(
        f"{args.repo_id} ({args.revision}) was changed meanwhile (412){' by ' * bool(said)}{said}. Nothing of yours "
        "was committed. Run the command without --push to see what is there, then with it."
    )


def _tag(planned: PushPlan, commit: str) -> None:
    args = planned.args
    try:
        HfApi().create_tag(args.repo_id, tag=str(args.tag), revision=commit, repo_type=args.repo_type)
        if hub.look(args.repo_id, args.repo_type, args.revision).tags.get(args.tag) != commit:
            raise hub.PushError(f"The Hub has answered, but has no such tag. {hub.ANEW}")
    except Exception as error:  # of whatever kind: the user must know that the files are there
        reason = hub.explained(error, args.repo_id, args.repo_type)
        raise hub.PushError(f"The files are on the Hub, but the tag {args.tag} was not made. {reason}") from None


def _title(planned: PushPlan) -> str:
    """Of the commit, where none was given."""
    names = [file.path_in_repo for file in planned.sent] + planned.deleted
    verb = "Update" if planned.changed else "Add" if planned.added else "Delete"
    return f"{verb} {names[0]}" if len(names) == 1 else f"{verb} {len(names)} files"


if __name__ == "__main__":
    run_command(main)
