"""What the evaluation commands share: a model whose embeddings are kept, the result file, and what a command prints."""

import time
from collections.abc import Callable
from typing import Any

from capivara_common.cli import parse, user_errors
from capivara_common.environment import device_description, processes
from capivara_common.files import read_json
from caption_data.embedding_cache import cache_folder
from caption_data.source_files import NoSplit
from eval.embeddings import EmbeddingStore
from eval.eval_arguments import ModelArguments
from modeling_capivara.two_towers import load_embedder
from records.schema import Record, header, hub_revision, write_records


def open_store(args: ModelArguments) -> EmbeddingStore:
    """The model of the arguments, its embeddings kept in their cache folder.

    Raises:
        ValueError, OSError, ImportError: as of `load_embedder`.
    """
    embedder = load_embedder(args.model, args.device, args.role == "baseline", args.precision, args.trust_remote_code)
    return EmbeddingStore(embedder, cache_folder(args.cache_dir), args.batch_size)


def write_result(
    args: ModelArguments,
    records: list[Record],
    source: str,
    fingerprint: str,
    store: EmbeddingStore,
    started: float,
    **parts: Any,
) -> None:
    """Write the result file of a command.

    Args:
        source: folder or Hub id of the data.
        started: `time.perf_counter()` before the first embedding.
        parts: further keys of the file, `skipped` among them (row -> why it is not in the figures); of these, `name` is
            not written: it is what the header calls the data.
    """
    facts = header(
        dataset=parts.pop("name", source),
        dataset_revision=hub_revision(source, "dataset"),
        dataset_fingerprint=fingerprint,
        model=args.model,
        model_revision=hub_revision(args.model, "model"),
        device=device_description(store.embedder.device),
        precision=args.precision,
        seconds=time.perf_counter() - started,
        skipped=len(parts["skipped"]),
    )
    write_records(args.output, records, facts, **parts)


@user_errors
def run_evaluation(
    kind: type[ModelArguments], doc: str, evaluate: Callable[[Any], list[Record]], argv: list[str] | None = None
) -> None:
    """The command of a measurement: read the flags, measure, print the figures and what their reader must know."""
    args = parse(kind, doc, argv)
    try:
        records = evaluate(args)
    except NoSplit as error:
        raise error.by_flag(args) from error
    if not processes().is_main_process:
        return
    for record in records:
        what = f"{record.direction:14} {record.metric:12}"
        if record.task != "retrieval":
            what = f"{record.dataset:20} {record.protocol:8} {record.metric:24}"
        value = f"{record.value:8.1f}" if record.is_rank else f"{100 * record.value:6.2f} %"
        chance = "" if record.chance is None else f"   chance {100 * record.chance:.2f} %"
        print(f"{what} {value}{chance}")
    content = read_json(args.output)
    for note in content.get("notes", []):
        print(note)
    if skipped := len(content["skipped"]):
        print(f"{skipped} images could not be read and are not in these figures; {args.output} lists them.")
