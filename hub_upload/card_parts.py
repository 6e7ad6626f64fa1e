"""What the card's template is given: tables and lines made of the facts of a run, in the card's language."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.records.schema import DIRECTIONS, GAIN, TASKS
from eval.records.tables import markdown_table
from hub_upload.card_facts import HUB_ID, CardFacts, Content, pairs
from hub_upload.card_metadata import energy, inherited_licence, licence
from hub_upload.card_text import Words, code, code_examples, escaped, is_portuguese, one_line

VISION = ("model_type", "architecture", "num_hidden_layers", "hidden_size", "patch_size", "image_size")
ARCHITECTURE = {  # part -> object of config.json, and its keys that are shown
    "vision": ("vision_config", VISION),
    "text": ("text_config", ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")),
    "space": (None, ("projection_dim", "text_projection_type")),
}
WIDTH_COLUMNS = ("metric", "dimensions", "baseline", "capivara", "kept")
OF_PICTURES = ("effective_batch_size", "hard_negatives", "caption_strategy", "min_pair_similarity", "augmented_views")
OF_LORA = ("lora_alpha", "lora_dropout", "lora_targets", "lora_modules_to_save")
# Settings that say something only where another one has one of these values, or any that is not empty.
ONLY_WHERE: dict[str, tuple[str, tuple[str, ...]]] = {
    "caption_count": ("caption_strategy", ("first", "rank")),
    "min_similarity": ("caption_strategy", ("threshold", "diverse")),
    "decay_towards": ("weight_decay", ()),
    "parallel_batch_size": ("parallel_text", ()),
    **dict.fromkeys(OF_PICTURES, ("dataset", ())),
    **dict.fromkeys(OF_LORA, ("lora_rank", ())),
    **dict.fromkeys(("teacher_language", "teacher_weight"), ("text_teacher", ())),
    "teacher_loss": ("teacher_weight", ()),
}
OFF_AT_0 = ("anchor_share", "lora_rank", "hard_negatives")  # values that are what is done without the setting
USUAL = {"decay_towards": "zero", "layer_decay": 1, "trained_vocabulary": "all", **dict.fromkeys(OFF_AT_0, 0)}


def card_parts(facts: CardFacts, words: Words) -> dict[str, Any]:
    """All that the template is given but for title, name and formats. Raises ValueError where a figure is missing."""
    used = energy(facts)
    digests = [(code(name), f"`{digest[:32]}`") for name, digest in sorted(facts.digests.items())]
    return {
        "examples": code_examples(facts.language, words, _class_names(facts)),
        "is_portuguese": is_portuguese(facts.language),
        **_origin_parts(facts, words),
        **_training_parts(facts, words),
        **_of_each_run(facts, words),
        **_result_parts(facts, words),
        "tokens": words.number(facts.tokens),
        "architecture": _architecture(facts, words),
        "energy": _energy_parts(facts, used, words) if used else None,
        **_onnx_parts(facts, words),
        "files": table(("file", "digest"), digests, words, text_columns=2),
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: Words, text_columns: int = 1) -> str:
    """A Markdown table without the columns that no row fills; other gaps become a dash. Empty where there are no rows.

    Its head is made of the words of `columns`; the first `text_columns` are aligned to the left.
    """
    kept = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    header = [words(f"column_{columns[number]}") for number in kept]
    cells = [[row[number] or "–" for number in kept] for row in rows]
    return markdown_table([header, *cells], text_columns) if rows else ""


def _class_names(facts: CardFacts) -> list[str]:
    """Names of the first classes that were measured in the language of training; empty where none were."""
    for value in facts.values:
        if value.task == "classification" and value.language == facts.language:
            return [one_line(name) for name in value.measured[0].file.content.get("classes", [])[:3]]
    return []


# --- Base, data and training -----------------------------------------------------------------------------------------


def _origin_parts(facts: CardFacts, words: Words) -> dict[str, Any]:
    """Base, data and teacher, and their licences."""
    config = facts.run["config"]
    if facts.origins:
        base, data = facts.origins["model"], facts.origins["datasets"]
    else:  # of a run before they were noted
        base, *data = (Content(title=Path(str(name)).name) for name in (config["model"], *config["dataset"]))
    is_taught = config.get("text_teacher") and config.get("teacher_weight")  # without, on its language's captions alone
    teacher = facts.origins.get("teacher")  # where it is not the base
    works, licences = [("model", base), *(("dataset", origin) for origin in data)], []
    for kind, origin in [*works, ("teacher", teacher)] if teacher else works:
        stated = ", ".join(map(code, origin.get("licenses") or ())) or words("none_stated")
        credit = f". {escaped(origin['attribution'])}" if origin.get("attribution") else ""
        licences.append(words(f"licence_{kind}", title=escaped(origin["title"]), licences=stated) + credit)
    return {
        "base": _linked(base, ""),
        **_data_parts(facts, data, words),
        "teacher": (_linked(teacher, "") if teacher else words("teacher_base")) if is_taught else None,
        "license": code(licence(facts)) if licence(facts) else None,
        "is_inherited": inherited_licence(facts) is not None,
        "licences": licences,
    }


def _data_parts(facts: CardFacts, data: list[Content], words: Words) -> dict[str, Any]:
    """The data sets, in the first sentence and as a list: those with pictures, and the sentence pairs without."""
    config, linked = facts.run["config"], [_linked(origin, "datasets/") for origin in data]
    pictures, parallel = (linked[:-1], linked[-1:]) if config.get("parallel_text") else (linked, [])
    codes = {"language": facts.language, "teacher_language": config.get("teacher_language")}
    about = {name: words.language_name(str(language)) for name, language in codes.items()}
    trained_on, listed = [], []
    if pictures:
        trained_on.append(words("captions_of", datasets=", ".join(pictures), **about))
        about["train_split"] = code(config["train_split"])
        listed = [words("first_dataset", dataset=pictures[0], **about), *pictures[1:]]
    for name in parallel:
        trained_on.append(words("sentences_of", parallel=name, **about))
        listed.append(words("parallel_text", parallel=name, **about))
    trained = f" {words('and')} ".join(trained_on)
    return {**about, "trained_on": trained, "training_data": listed, "has_pictures": bool(pictures)}


def _linked(origin: Content, kind: str) -> str:
    """Title of a base or data set; a link where it is on the Hub."""
    hub_id, title = origin.get("hub_id"), escaped(origin["title"])
    return f"[{title}](https://huggingface.co/{kind}{hub_id})" if HUB_ID.fullmatch(str(hub_id)) else f"*{title}*"


def _training_parts(facts: CardFacts, words: Words) -> dict[str, Any]:
    run, config = facts.run, facts.run["config"]
    languages = sorted({words.language_name(value.language) for value in facts.values if value.language})
    numbers = {"batch": "effective_batch_size", "micro_batch": "micro_batch_size", "max_steps": "max_steps"}
    return {
        "measured_languages": f" {words('and')} ".join(filter(None, (", ".join(languages[:-1]), *languages[-1:]))),
        "both_towers": config.get("towers") == "both",
        "lora_rank": words.number(config["lora_rank"]) if config["lora_rank"] else None,
        "interpolate": code(config["interpolate"]) if config["interpolate"] != 1 else None,
        "widths": ", ".join(map(words.number, config.get("matryoshka_dims") or ())),
        "parallel_batch": words.number(config["parallel_batch_size"]) if config.get("parallel_text") else None,
        "skipped": ", ".join(
            f"{escaped(reason)}: {words.number(count)}" for reason, count in (run.get("skipped_rows") or {}).items()
        ),
        **{name: words.number(config[key]) for name, key in numbers.items()},
        "stopped_early": any(of["steps"] < config["max_steps"] for of in facts.runs),
        "seeds": ", ".join(str(of["seed"]) for of in facts.runs),
        "validation": _validation(facts, words),
        "settings": _settings(config, run.get("fixed", {}), words),
        "versions": ", ".join(f"{escaped(name)} {escaped(version)}" for name, version in run["versions"].items()),
    }


def _of_each_run(facts: CardFacts, words: Words) -> dict[str, str]:
    """Figures that every run has, in the order of seeds; one where all agree."""
    picks: dict[str, Callable[[Content], str]] = {
        "steps": lambda run: words.number(run["steps"]),
        "pairs": lambda run: words.number(run["pairs"]),
        "pairs_per_second": lambda run: words.number(run["pairs_per_second"], 1),
        "processes": lambda run: words.number(run["processes"]),
        "device": lambda run: escaped(run["device"]),
        "training_time": lambda run: words.duration(run["seconds"]["training"]),
        "evaluation_time": lambda run: words.duration(run["seconds"]["evaluation"]),
    }
    found = {name: [pick(run) for run in facts.runs] for name, pick in picks.items()}
    return {name: values[0] if len(set(values)) == 1 else "; ".join(values) for name, values in found.items()}


def _settings(config: Content, fixed: dict[str, Any], words: Words) -> str:
    """The hyperparameters as the run had them, and what is `fixed` in every run; what does not apply is left out."""
    rows = []
    for key, name in words.texts["settings"].items():
        value = config.get(key, fixed.get(key))
        if value in (None, "", [], {}) or value is False or value == USUAL.get(key) or not _applies(key, config):
            continue
        if key == "image_embedding_cache" and value != "off":
            value = "on"  # a folder of the machine, otherwise
        rows.append((name, f"`{key}`", code(value)))
    return table(("what", "setting", "value"), rows, words, text_columns=2)


def _applies(key: str, config: Content) -> bool:
    """Whether a setting says something beside the others."""
    decisive, wanted = ONLY_WHERE.get(key, (None, ()))
    if decisive is None:
        return True
    return (config[decisive] in wanted if wanted else bool(config.get(decisive))) and _applies(decisive, config)


def _validation(facts: CardFacts, words: Words) -> str:
    """Mean recall of the validation split at the first and the last measurement of the run."""
    measured = [point["validation"] for point in facts.run.get("curve") or () if point.get("validation")]
    if len(measured) < 2:
        return ""
    parts = []
    for direction in DIRECTIONS:
        before, after = (words.percent(point[direction]) for point in (measured[0], measured[-1]))
        parts.append(words("before_after", what=words.name(direction), before=before, after=after))
    line = "; ".join(parts)
    return words("of_seed", what=line, seed=facts.run["seed"]) if len(facts.runs) > 1 else line


def _architecture(facts: CardFacts, words: Words) -> dict[str, str]:
    """Size, towers and the space that they share, each in words; empty where `config.json` does not say it."""
    found = {"parameters": words.number(facts.parameters) if facts.parameters else ""}
    for part, (key, names) in ARCHITECTURE.items():
        config = (facts.config.get(key) or {}) if key else facts.config
        values = {name: value for name in names if (value := config.get(name))}
        phrases = [
            words.texts["architecture"][name].format(code(value) if isinstance(value, str) else words.number(value))
            for name, value in values.items()
        ]
        separator = "; " if part == "space" else ", "
        found[part] = separator.join(phrases) if names[0] in values else ""
    return found


def _energy_parts(facts: CardFacts, used: Content, words: Words) -> dict[str, str]:
    hardware = [used[key] for key in ("gpu", "cpu") if used.get(key)] or [facts.run["device"]]
    return {
        "source": words("estimated" if "estimated" in str(used["method"]) else "measured"),
        "method": words.phrase(used["method"]),
        "covers": words.phrase(used["covers"]),
        "hardware": ", ".join(map(escaped, hardware)),
        "time": words.duration(3600 * used["hours"]),
        "country": code(used["country"]) if used.get("country") else "–",
        "kwh": words.quantity(used["kwh"], ("kWh", "Wh")),
        "co2e": words.quantity(used["kg_co2e"], ("kg", "g")),
    }


# --- Results ---------------------------------------------------------------------------------------------------------


def is_worse(pair: dict[str, Any]) -> bool:
    """Whether the model does worse than the baseline."""
    return pair["gain"] > 0 if pair["is_rank"] else pair["gain"] < 0


def _result_parts(facts: CardFacts, words: Words) -> dict[str, Any]:
    main, summary, worse = facts.main_pairs(), [], []
    for pair in main:
        what, cells = _label(facts, pair["capivara"], words), _cells(pair, words)
        if pair["task"] == "retrieval" and pair["language"] == facts.language:
            summary.append((what, *cells[:3]))
        if is_worse(pair):
            figures = {"model": words.figure(pair["capivara"]), "baseline": words.figure(pair["baseline"])}
            worse.append(words("beside_baseline", what=what, **figures))
    seeds = [str(of.seed) for of in max(facts.values, key=lambda value: value.seeds).measured]
    return {
        "summary": table(("metric", "baseline", "capivara", "difference"), summary, words),
        "worse": worse,
        "unsure": _unsure(facts, words),
        "has_baseline": bool(main),
        "tested": [_tested(facts, group, words) for task in TASKS for group in facts.groups(task)],
        "seed_count": words.number(len(seeds)) if len(seeds) > 1 else "",
        "measured_seeds": ", ".join(seeds),
        "results": _retrieval_sections(facts, words) + _width_sections(facts, words) + _image_sections(facts, words),
        "has_cut": bool(facts.cut),
        "has_gains": any(value.metric == GAIN for value in facts.values),
        "pictures": [(kind, name) for kind in ("retrieval", "curves") for name in facts.pictures if kind in name],
    }


def _retrieval_sections(facts: CardFacts, words: Words) -> list[dict[str, Any]]:
    """A section a data set and language: title, table, and the gains with their intervals."""
    sections = []
    for group in facts.groups("retrieval"):
        first, rows, gains = group[0], [], []
        for direction in DIRECTIONS:
            name = words.name(direction)
            for pair in pairs(group, direction):
                rows.append((f"{name}, {words.name(pair['metric'])}", *_cells(pair, words)))
            for gain in (value for value in group if value.metric == GAIN and value.direction == direction):
                points, intervals = words.figure(gain, sign=True), _intervals(gain, gain.measured, words)
                gains.append(words("gain", what=name, points=points, intervals=intervals))
        where = {"split": code(first.split), "language": words.language_name(first.language)}
        title = words("retrieval_title", dataset=_dataset_title(facts, first.dataset), **where)
        made = table(("metric", "baseline", "capivara", "difference", "chance"), rows, words)
        sections.append({"title": title, "table": made, "gains": gains})
    return sections


def _width_sections(facts: CardFacts, words: Words) -> list[dict[str, Any]]:
    """A section a data set and language whose recall was measured at several widths, all of them in falling order.

    Of the mean recall, or of R@1 where there are too few images for it.
    """
    groups: dict[tuple, list[Any]] = {}
    for value in (*facts.values, *facts.cut):
        protocol = value.protocol.rpartition("; first ")[0] if value.dim else value.protocol
        if value.metric in ("mean_recall", "recall@1"):
            key = value.dataset, value.split, value.language, protocol, value.precision
            groups.setdefault(key, []).append(value)
    sections = []
    for (dataset, split, language, *_), group in groups.items():
        if not any(value.dim for value in group):
            continue
        where = {"split": code(split), "language": words.language_name(language)}
        title = words("widths_title", dataset=_dataset_title(facts, dataset), **where)
        metric = "mean_recall" if any(value.metric == "mean_recall" for value in group) else "recall@1"
        rows = [row for direction in DIRECTIONS for row in _width_rows(group, direction, metric, words)]
        sections.append({"title": title, "table": table(WIDTH_COLUMNS, rows, words), "gains": []})
    return sections


def _width_rows(group: list[Any], direction: str, metric: str, words: Words) -> list[tuple[str, ...]]:
    """Baseline, CAPIVARA, and the share that CAPIVARA keeps of its whole recall, by width."""
    by_width = {pair["dim"]: pair for pair in pairs(group, direction) if pair["metric"] == metric}
    whole, rows = by_width.get(0), []
    for dim in sorted(by_width, key=lambda dim: -(dim or sys.maxsize)):
        pair, kept = by_width[dim], ""
        if dim and whole and whole["capivara"] and pair["capivara"] and whole["capivara"].mean:
            kept = words.percent(pair["capivara"].mean / whole["capivara"].mean)
        cells = (words.figure(pair[role]) if pair[role] else "" for role in ("baseline", "capivara"))
        what = f"{words.name(direction)}, {words.name(metric)}"
        rows.append((what, words.number(dim) if dim else words("all_dimensions"), *cells, kept))
    return rows


def _image_sections(facts: CardFacts, words: Words) -> list[dict[str, Any]]:
    """Zero-shot classification and linear probe: a section each, a row a data set, protocol and metric."""
    names = ("dataset", "protocol", "metric", "images", "baseline", "capivara", "difference", "chance")
    sections = []
    for task in ("classification", "linear_probe"):
        rows = []
        for pair in (pair for group in facts.groups(task) for pair in pairs(group, "")):
            about = (_dataset_title(facts, pair["dataset"]), code(pair["protocol"]), words.name(pair["metric"]))
            rows.append((*about, words.number((pair["baseline"] or pair["capivara"]).n), *_cells(pair, words)))
        if rows:
            made = table(names, rows, words, text_columns=3)
            sections.append({"title": words(f"{task}_title"), "table": made, "gains": []})
    return sections


def _cells(pair: dict[str, Any], words: Words) -> list[str]:
    """Baseline, CAPIVARA, difference and chance of one figure; empty where there is none. The better one is bold."""
    cells = [words.figure(pair[role]) if pair[role] else "" for role in ("baseline", "capivara")]
    if pair["gain"]:
        better = 0 if is_worse(pair) else 1
        cells[better] = f"**{cells[better]}**"
    difference = "" if pair["gain"] is None else words.measure(pair["gain"], pair["is_rank"], sign=True)
    return [*cells, difference, "" if pair["chance"] is None else words.percent(pair["chance"])]


def _intervals(gain: Any, measured: Iterable[Any], words: Words) -> str:
    """95 % intervals, in points, of those seeds that have one, each with its seed where there are several."""
    intervals = []
    for one in (of_seed for of_seed in measured if of_seed.interval_95):
        interval = f" {words('to')} ".join(words.percent(end, sign=True) for end in one.interval_95)
        intervals.append(words("interval_of_seed", interval=interval, seed=one.seed) if gain.seeds > 1 else interval)
    return "; ".join(intervals)


def _unsure(facts: CardFacts, words: Words) -> list[str]:
    """The gains whose interval includes zero, with the intervals of the seeds of which that is so."""
    lines = []
    for gain in (value for value in facts.values if value.metric == GAIN):
        unsure = [one for one in gain.measured if (ends := one.interval_95) and ends[0] <= 0 <= ends[1]]
        if unsure:
            lines.append(f"{_label(facts, gain, words, metric=False)}: {_intervals(gain, unsure, words)}")
    return lines


def _label(facts: CardFacts, value: Any, words: Words, metric: bool = True) -> str:
    """Which figure it is, in words; the data set is named where there are several."""
    parts = [words.name(value.direction)] if value.direction else []
    parts += [words.name(value.metric)] if metric else []
    if len({other.dataset for other in facts.values}) > 1:
        parts.append(_dataset_title(facts, value.dataset))
    parts.append(words.language_name(value.language) if value.task == "retrieval" else code(value.protocol))
    return ", ".join(parts)


def _dataset_title(facts: CardFacts, name: str) -> str:
    title = facts.dataset_title(name)
    return code(name) if title is None else escaped(title)


def _tested(facts: CardFacts, group: list[Any], words: Words) -> str:
    """What a group was measured on: title, split, language, sizes, protocol, and what its readers must know."""
    first, measured = group[0], group[0].measured[0]
    sizes = {value.direction: words.number(value.n) for value in group}
    captions, images = sizes.get("text_to_image"), sizes.get("image_to_text") or sizes.get("", "")
    what = [f"**{_dataset_title(facts, first.dataset)}**", words("tested_split", split=code(first.split))]
    what += [words.language_name(first.language)] if first.language else []
    size = {"captions": captions, "images": images, "precision": code(measured.precision)}
    about = [words("of_captions" if captions else "of_images", **size)]
    if revision := facts.revision(measured):
        about.append(f"commit {code(revision)}")
    if skipped := measured.file.content["skipped_rows"]:
        about.append(words("tested_skipped", skipped=words.number(skipped)))
    protocol = words("tested_protocol", protocol=words.phrase(first.protocol))
    return f"{', '.join(what)}: {'; '.join(about)}.\n  {protocol}"


def _onnx_parts(facts: CardFacts, words: Words) -> dict[str, Any]:
    """The graphs: bytes, and how far their embeddings are from the model's; lines on what int8 costs in recall."""
    rows = []
    for name, about in facts.graphs["graphs"].items() if facts.graphs else ():
        difference, cosine = about.get("largest_difference"), about.get("lowest_cosine")
        size = f"{words.number(about['bytes'] / 1e6, 1)} MB"
        distance = "" if difference is None else words.number(difference, 1, kind="e")
        rows.append((code(f"onnx/{name}"), size, distance, "" if cosine is None else words.number(cosine, 4)))
    recall, lines = facts.graphs.get("recall"), []
    for direction in DIRECTIONS if recall else ():
        shares = {name: words.percent(recall[name][direction]["mean_recall"]) for name in ("float32", "int8")}
        where = {"dataset": code(recall["dataset"]), "split": code(recall["split"])}
        images = words.number(recall["images"])
        lines.append(words("int8", what=words.name(direction), images=images, **shares, **where))
    return {"graphs": table(("file", "size", "difference_to_model", "cosine"), rows, words), "int8": lines}
