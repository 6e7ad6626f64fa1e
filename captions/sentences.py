"""Find the captions of a dataset that must be translated, and build the columns with their translations."""

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any

from datasets import List, Value

from capivara_common.image_files import BadRow
from caption_data.rows import convert_to_caption_list
from caption_data.sources import Split
from captions.chat.answers import Answer
from captions.quality import find_translation_quality_flags
from captions.stages import Row

CAPTION_KINDS = ("captions", "generated-captions")  # names of caption columns, without the language code at the end
# Type of the column `quality-<language>`. `captions` is the number of translated captions of the row. `flagged` lists
# the translations that look wrong. In an entry of `flagged`, `column` is the column of the translation, `position` is
# the index of the caption in the column that was translated, and `flags` says what looks wrong.
_FLAGGED_FEATURES = {"column": Value("string"), "position": Value("int32"), "flags": List(Value("string"))}
_FLAGGED_FEATURES |= {"source": Value("string"), "translation": Value("string")}
QUALITY_FEATURES = {"captions": Value("int32"), "flagged": List(_FLAGGED_FEATURES)}


def map_columns_to_translate(args: Any, present: Collection[str]) -> dict[str, str]:
    """Determine which caption columns to translate, and in which new columns to write the translations.

    Args:
        args: Flags of `captions.translate`.
        present: Names of the columns of the dataset, after the renaming with the flag `rename`.

    Returns:
        A dict `{caption column: new column}`, for example `{"captions-en": "captions-pt"}`.
    """
    columns = {f"{kind}-{args.source_language}": f"{kind}-{args.language}" for kind in CAPTION_KINDS}
    return {column: target for column, target in columns.items() if column in present}


def iter_distinct_captions(args: Any, source: Split, parts: Iterable[range] | None = None) -> Iterator[str]:
    """Iterate over the captions that must be translated. Each distinct caption occurs only once, in row order.

    Blank captions are omitted.

    Args:
        args: Flags of `captions.translate`.
        source: The dataset split.
        parts: Ranges of row indices. Only captions of these rows are read. Default: all rows.
    """
    names = {args.column_renames().get(name, name): name for name in source.columns}
    # Read only the caption columns, so that the images need not be read in most dataset formats.
    columns = [names[column] for column in map_columns_to_translate(args, names)]
    # Digests (hashes) of the sentences that were already returned. The sentences would need several times the memory.
    seen: set[bytes] = set()
    for part in [range(len(source))] if parts is None else parts:
        rows = itertools.islice(source.rows(part.start, column_names=columns), len(part))
        for row, column in ((row, column) for row in rows for column in columns):
            texts: list[str] = []
            # Ignore invalid captions here. When the output is written, their rows are skipped and listed with a reason.
            with suppress(BadRow):
                texts = convert_to_caption_list(row.get(column), column)
            for sentence in filter(str.strip, texts):
                digest = hashlib.blake2b(sentence.encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield sentence


def build_translation_and_quality_columns(args: Any, row: Row, answers: dict[str, Answer]) -> Row:
    """Build the new columns of a row: its translated captions, and a list of the translations that look wrong.

    Args:
        args: Flags of `captions.translate`. With `drop_flagged`, translations that look wrong are dropped.
        row: A row with captions.
        answers: Dict `{sentence: answer}`. An answer holds the translation, and the problem if it is not usable.

    Returns:
        A dict `{column name: value}`. The columns of translations have lists of texts. The column `quality-<language>`
        has a dict with the keys "captions" (number of translated captions) and "flagged" (list of dicts that describe
        translations that look wrong).
    """
    new_columns, caption_count, flagged = {}, 0, []
    for column, target in map_columns_to_translate(args, row).items():
        new_columns[target] = []
        for position, source in enumerate(row.get(column) or []):
            answer = answers[source] if source.strip() else Answer("")
            translation, fault = answer.text, answer.fault
            flags = [fault] if fault else find_translation_quality_flags(source, translation, args.language)
            caption_count += 1
            if flags:
                entry = {"column": target, "position": position, "flags": flags}
                flagged.append(entry | {"source": source, "translation": translation})
            if not (flags and args.drop_flagged):
                new_columns[target].append(translation)
    return new_columns | {f"quality-{args.language}": {"captions": caption_count, "flagged": flagged}}
