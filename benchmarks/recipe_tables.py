"""The tables of docs/recipe.md, out of the results of `benchmarks.recipe`."""

import statistics
from typing import Any

from benchmarks.recipe_measures import DRAWINGS, NAMES
from benchmarks.timing import software, table
from eval.records.schema import DIRECTIONS
from eval.records.tables import escape_markdown, percent, points

STYLES = {"openmoji": "OpenMoji", "twemoji": "Twemoji", "noto": "Noto", "photos": "photographs"}
ARROWS = {"text_to_image": "t→i", "image_to_text": "i→t"}
REFERENCE = "paper"  # the variant that all are compared with
OURS = "interpolate-0.7"  # the variant that was chosen, of configs/openmoji_plus.yaml
Row = dict[str, Any]


def variants_table(found: Row) -> str:
    """What each variant is, what a run costs, and how far its English moved; then the failed ones with their error."""
    rows = []
    for row in found["rows"]:
        flags = " ".join(f"--{name} {_words(value)}" for name, value in row.get("flags", {}).items())
        seconds = f"{statistics.mean(row['seconds']):.0f}" if row["seconds"] else "–"
        drift = f"{statistics.mean(row['drift']):.3f}" if row["drift"] else "–"
        rows.append((row["name"], row["what"], f"`{flags}`" if flags else "", str(len(row["seeds"])), seconds, drift))
    failed = [f"- {row['name']} failed: {escape_markdown(row['failed'])}" for row in found["rows"] if row.get("failed")]
    config = found["config"]
    facts = (
        f"{config['max_steps']} steps of {config['effective_batch_size']} pairs, where no flag says otherwise. Seconds "
        "of training and test; cosine: mean over the English test "
        f"captions, between base and model. On {found['device']}; {software(found, 'torch', 'transformers')}."
    )
    heads = ("Variant", "What it is", "Flags", "Models", "Seconds a run", "Cosine of English to the base")
    return table(heads, rows, "\n".join([facts, "", *failed]).strip(), text_columns=3)


def choice_table(found: Row) -> str:
    """What the recipe is chosen by, on validation concepts: gain in Portuguese over three styles, loss in English."""
    rows = []
    for row in _measured(found)[1:]:
        english = {
            (name, way): statistics.mean(_change(found, row, f"{name}/validation/en/{way}"))
            for name in DRAWINGS
            for way in DIRECTIONS
        }
        (style, way), worst = min(english.items(), key=lambda item: item[1])
        portuguese = [
            statistics.mean(_change(found, row, f"{name}/validation/pt/{way}"))
            for name in DRAWINGS
            for way in DIRECTIONS
        ]
        intervals = [_interval(row.get("gain", {}).get(f"openmoji/validation/pt/{way}")) for way in DIRECTIONS]
        worst_cell = f"{points(worst)} ({STYLES[style]}, {ARROWS[way]})"
        rows.append((row["name"], points(statistics.mean(portuguese)), points(min(portuguese)), worst_cell, *intervals))
    heads = (
        *("Variant", "pt over base, mean of 6", "lowest of 6", "en over base, lowest of 6"),
        *(f"pt over paper, OpenMoji {ARROWS[way]}" for way in DIRECTIONS),
    )
    facts = (
        "Points of mean recall on the validation concepts; the six are three styles (OpenMoji, Twemoji, Noto Emoji) in "
        "both directions. In brackets the 95 % interval of the paired bootstrap over the pictures, seeds averaged."
    )
    return table(heads, rows, facts)


def recall_table(found: Row, split: str) -> str:
    """Mean recall of all variants on the validation or test concepts, and on photographs, which are test alone."""
    names = [*DRAWINGS, *(["photos"] if split == "test" else [])]
    conditions = [(name, language) for name in names for language in ("pt", "en")]
    keys = [[f"{name}/{split}/{language}/{way}" for way in DIRECTIONS] for name, language in conditions]
    heads = ["Variant"]
    columns: list[list[str]] = []  # keys that a column is the mean of
    for (name, language), both in zip(conditions, keys, strict=True):
        parts = [[key] for key in both] if name == "openmoji" else [both]
        columns += parts
        arrows = [f" {arrow}" for arrow in ARROWS.values()] if name == "openmoji" else [""]
        heads += [f"{STYLES[name]} {language}{arrow}" for arrow in arrows]
    numbers = ", ".join(f"{STYLES[name]} {found['n'][f'{name}/{split}/pt/image_to_text']}" for name in names)
    facts = (
        f"Mean recall (recall@1, @5 and @10) in per cent, mean ± standard deviation of the seeds, both directions "
        f"averaged but for OpenMoji. Pictures: {numbers}."
    )
    return _recalls(found, heads, columns, facts)


def neighbours_table(found: Row) -> str:
    """Mean recall in languages that no run trains on."""
    names = {"neighbours/test/es": "Spanish", "neighbours/test/fa": "Persian", NAMES: "Hindi names"}
    columns = [[f"{condition}/{way}"] for condition in names for way in DIRECTIONS]
    heads = ["Variant"] + [f"{title} {arrow}" for title in names.values() for arrow in ARROWS.values()]
    facts = (
        f"Mean recall in per cent. Spanish and Persian: names of {found['n']['neighbours/test/es/image_to_text']} test "
        f"pictures of OpenMoji. Hindi: {found['n'][f'{NAMES}/text_to_image']} names of ImageNet's classes find their "
        "English ones (t→i), and these them (i→t), by the text tower alone: the packages have no Hindi captions."
    )
    return _recalls(found, heads, columns, facts)


def _recalls(found: Row, heads: list[str], columns: list[list[str]], facts: str) -> str:
    rows = []
    for row in _measured(found):
        seeds = [
            [[row["values"][key][place] for key in keys] for place in range(len(row["seeds"]))] for keys in columns
        ]
        rows.append([row["name"], *(percent([statistics.mean(of) for of in column]) for column in seeds)])
    rows.append(["chance", *(percent([statistics.mean(found["chance"][key] for key in keys)]) for keys in columns)])
    return table(heads, rows, facts)


def _measured(found: Row) -> list[Row]:
    """The rows that have figures, the base first."""
    return [row for row in found["rows"] if row["values"]]


def _change(found: Row, row: Row, key: str) -> list[float]:
    """Mean recall of each seed minus the base's."""
    (base,) = found["rows"][0]["values"][key]
    return [value - base for value in row["values"][key]]


def _interval(gain: list[float] | None) -> str:
    return "–" if gain is None else f"{points(gain[0])} ({points(gain[1])} to {points(gain[2])})"


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
