"""What the templates of a card are given: values of a run's files, and functions that write them in its language.

Texts of others become Markdown that renders as itself, on one line; numbers get the language's decimal sign.
"""

import html
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from capivara_common.files import read_json
from eval.benchmarks import published_base
from eval.records.schema import DIRECTIONS, GAIN, RANK_METRICS, TASKS, is_number
from eval.records.tables import pairs_of
from hub_upload.card_facts import HUB_ID, OWN_CLASS, CardFacts, Content, energy, inherited_licence, licence

TEMPLATES = Path(__file__).parent / "templates"
WORDS = read_json(TEMPLATES / "card_words.json")  # language of a card -> its words for names of the files, and others
LANGUAGES = tuple(WORDS)
# Not HTML but Markdown: texts of others are escaped where they come in. What a template needs and lacks is an error.
MARKDOWN_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=False, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
MAX_TEXT = 300
PLAIN_CODE = re.compile(r"[A-Za-z0-9][\w./@:+=,() -]*", re.ASCII)
# Absolute paths of Unix, of a home and of Windows, up to their last part; not the slashes of an address.
PATHS = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\"<>]+/)+|\b[A-Za-z]:\\(?:[^\s\\]+\\)+")
# Of the code on a card: two texts for its red and its blue picture, two others, and labels.
EXAMPLES = {
    "texts": ["um quadrado vermelho", "um céu azul"],
    "sentences": ["um gato dormindo no sofá", "uma praia ao pôr do sol"],
    "labels": ["vermelho", "azul", "verde"],
}
_SETTINGS = (
    "effective_batch_size micro_batch_size max_steps optimizer learning_rate min_learning_rate warmup_steps "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon mixed_precision frozen_parameters gradient_checkpointing "
    "lora_rank lora_alpha lora_dropout lora_targets lora_modules_to_save interpolate caption_strategy caption_count "
    "min_similarity min_pair_similarity image_embedding_cache augmented_views eval_steps num_threads"
)
# Settings that are gone, of runs that had them, and what was usual.
_GONE = {
    "towers": "text", "trained_vocabulary": "all", "matryoshka_dims": [], "text_teacher": None,
    "teacher_language": "en", "teacher_weight": 1.0, "teacher_loss": "contrastive", "anchor_share": 0,
    "parallel_text": None, "parallel_batch_size": 256, "hard_negatives": 0, "decay_towards": "zero", "layer_decay": 1,
    "dataset_weights": [], "streaming": False, "patience": None, "accumulation": "auto",
}  # fmt: skip


def one_line(value: Any) -> str:
    """A text of others on one line, without invisible characters and folders of a machine, whatever the current one."""
    line = " ".join(str(value).split())
    line = "".join(letter for letter in line if unicodedata.category(letter)[0] != "C")  # controls, bidi, private use
    line = PATHS.sub("", line)
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"


def escaped(value: Any) -> str:
    """Text of a config or of data as Markdown that renders as itself: no markup, no HTML."""
    line = re.sub(r"([\\`*_\[\]|~$!#])", r"\\\1", one_line(value))
    line = re.sub(r"^([-+=]|\d+(?=[.)](\s|$)))", r"\\\1" if line[:1] in "-+=" else r"\1\\", line)  # no list, no heading
    return html.escape(line, quote=False)


def code(value: Any) -> str:
    """A JSON value as code, where it consists of the characters of names; else as text."""
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = one_line(written)
    return f"`{text}`" if text == PATHS.sub("", written) and PLAIN_CODE.fullmatch(text) else escaped(written)


class Numbers:
    """Numbers as a language writes them."""

    def __init__(self, language: str):
        self.swapped = str.maketrans(",.", ".," if language == "pt" else ",.")

    def number(self, value: Any, digits: int = 0, sign: bool = False, kind: str = "f") -> str:
        """A number of the files, as format's `kind` "f" or "e" writes it. Raises ValueError where it is none."""
        if not is_number(value):
            raise ValueError(f"{str(value)[:80]!r} stands where a number belongs; make the run's files again.")
        text = f"{value:{'+' if sign else ''},.{digits}{kind}}"
        return text.translate(self.swapped)

    def percent(self, share: Any, sign: bool = False) -> str:
        """A share in per cent, or a difference of shares in points; without the unit."""
        return self.number(100 * share if is_number(share) else share, 2, sign)

    def quantity(self, value: float, unit: str, thousandth: str) -> str:
        """`value` to three digits, in the unit or, where it is small, in its thousandth."""
        unit, scaled = (unit, value) if value >= 1 else (thousandth, 1000 * value)
        digits = max(0, 2 - math.floor(math.log10(scaled))) if scaled else 0
        return f"{self.number(scaled, digits)} {unit}"

    def duration(self, seconds: Any) -> str:
        """Seconds, as hours or minutes where there are many."""
        if seconds < 90:
            return f"{self.number(seconds, 1 if seconds >= 1 else 2)} s"
        unit, part = ("h", 3600) if seconds >= 5400 else ("min", 60)
        return f"{self.number(seconds / part, 1)} {unit}"

    def measure(self, value: float, is_rank: bool, sign: bool = False) -> str:
        """A rank, or a share in per cent."""
        return self.number(value, 1, sign) if is_rank else self.percent(value, sign)

    def figure(self, value: Any, sign: bool = False) -> str:
        """Mean of the seeds, ± their standard deviation where there are several; of a row of `values_of`."""
        if value is None:
            return "–"
        is_rank = value.metric in RANK_METRICS
        text = self.measure(value.mean, is_rank, sign)
        return text if value.deviation is None else f"{text} ± {self.measure(value.deviation, is_rank)}"

    def cells(self, pair: dict[str, Any]) -> list[str]:
        """Baseline, CAPIVARA, difference and chance of one figure. The better one is bold."""
        cells = [self.figure(pair["baseline"]), self.figure(pair["capivara"])]
        if pair["gain"]:
            better = 0 if is_worse(pair) else 1
            cells[better] = f"**{cells[better]}**"
        difference = "–" if pair["gain"] is None else self.measure(pair["gain"], pair["is_rank"], sign=True)
        return [*cells, difference, "–" if pair["chance"] is None else self.percent(pair["chance"])]


class Writer(Numbers):
    """What stands in the files of a run, in the words of a card's language."""

    def __init__(self, language: str, facts: CardFacts):
        super().__init__(language)
        self.facts, self.words, self.names = facts, WORDS[language], WORDS[language]["names"]
        self.several_datasets = len({value.dataset for value in facts.values}) > 1

    def language(self, key: str) -> str:
        """A language by its code."""
        return self.words["languages"].get(key) or escaped(key)

    def dataset(self, name: str) -> str:
        """A data set, by the title of its own card where that is known."""
        title = self.facts.dataset_title(name)
        return code(name) if title is None else escaped(title)

    def phrase(self, text: str) -> str:
        """What the project itself writes into its files, in English."""
        for english, own in self.words["phrases"].items():
            text = text.replace(english, own)
        return escaped(text)

    def metric(self, direction: str, key: str) -> str:
        """A metric, with its direction where it has one."""
        name = f"R@{key[7:]}" if key.startswith("recall@") else self.names.get(key) or escaped(key)
        return f"{self.names[direction]}, {name}" if direction else name

    def label(self, value: Any) -> str:
        """What a row of `values_of` is a figure of; of a gain, without the metric."""
        found = self.names[value.direction] if value.metric == GAIN else self.metric(value.direction, value.metric)
        about = self.language(value.language) if value.task == "retrieval" else code(value.protocol)
        return ", ".join([found, *[self.dataset(value.dataset)] * self.several_datasets, about])

    def intervals(self, gain: Any, measured: list[Any]) -> str:
        """The intervals of a gain that has some, a seed each."""
        found = []
        for one in (one for one in measured if one.interval_95):
            ends = f" {self.words['to']} ".join(self.percent(end, sign=True) for end in one.interval_95)
            found.append(f"{ends} ({self.words['seed']} {one.seed})" if gain.seeds > 1 else ends)
        return "; ".join(found)

    def rows(self, pairs: Iterable[dict[str, Any]]) -> list[list[str]]:
        """Of a table of figures."""
        return [[self.metric(pair["direction"], pair["metric"]), *self.cells(pair)] for pair in pairs]

    def classification_rows(self, task: str) -> list[list[str]]:
        """Of a table of classification or linear probe, data set, protocol and number of images among them."""
        found = [pair for group in self.facts.groups(task) for pair in pairs(group)]
        about = [(self.dataset(pair["dataset"]), code(pair["protocol"]), self.number(pair["n"])) for pair in found]
        return [[data, how, row[0], n, *row[1:]] for (data, how, n), row in zip(about, self.rows(found), strict=True)]

    def graph_row(self, name: str, graph: Content) -> list[str]:
        """Name, size, largest difference and lowest cosine of an ONNX graph."""
        difference, cosine = graph.get("largest_difference"), graph.get("lowest_cosine")
        return [
            code(f"onnx/{name}"),
            f"{self.number(graph['bytes'] / 1e6, 1)} MB",
            "–" if difference is None else self.number(difference, 1, kind="e"),
            "–" if cosine is None else self.number(cosine, 4),
        ]


def is_worse(pair: dict[str, Any]) -> bool:
    """Whether the model does worse than the baseline."""
    return pair["gain"] > 0 if pair["is_rank"] else pair["gain"] < 0


def is_portuguese(language: str) -> bool:
    """Whether the code of a language is that of Portuguese, such as "pt" or "pt-BR"."""
    return re.split("[-_]", language)[0] in ("pt", "por")


def table(columns: list[str], rows: Sequence[Sequence[Any]], left: int = 1) -> str:
    """Rows as a table, its first columns set to the left and the others to the right."""
    lines = [columns, ["---"] * left + ["---:"] * (len(columns) - left), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def code_examples(language: str, words: Sequence[str]) -> dict[str, str]:
    """Texts for the code of a card in its model's language: Portuguese ones, else `words`."""
    texts, template, picture = EXAMPLES, "uma imagem de cor {}", "foto.jpg"
    if not is_portuguese(language):
        texts = {key: list(words[: len(value)]) for key, value in EXAMPLES.items()}
        template, picture = "{}", "photo.jpg"
    lists = {key: json.dumps(value, ensure_ascii=False) for key, value in texts.items()}
    return {**lists, "template": template, "picture": picture}


def card_values(facts: CardFacts, language: str, name: str, is_repository: bool) -> dict[str, Any]:
    """All that a template is given but title and options; `name` is what the code loads.

    Raises ValueError where a figure is missing.
    """
    run, writer = facts.run, Writer(language, facts)
    about = {"name": name, "is_repository": is_repository, "formats": facts.formats, "words": writer.words}
    about |= {"is_own": facts.model_class == OWN_CLASS, "is_siglip": facts.model_class == "SiglipModel"}
    about |= {"loss": run.get("loss", "contrastive")}
    return {
        **about,
        "blocks": MARKDOWN_TEMPLATES.get_template("card_code.md.j2").make_module(about),
        "citation": (TEMPLATES / "citation.bib").read_text(encoding="utf-8").strip(),
        **{"run": run, "config": run["config"], "text": escaped, "code": code, "table": table},
        **{key: getattr(writer, key) for key in dir(writer) if not key.startswith("_")},
        "graph_rows": [writer.graph_row(*of) for of in (facts.graphs["graphs"] if facts.graphs else {}).items()],
        "examples": lambda words: code_examples(facts.language, _class_names(facts) or words),
        "width": facts.config.get("projection_dim") or (facts.config.get("text_config") or {}).get("projection_size"),
        "is_portuguese": is_portuguese(facts.language),
        **_of_origins(facts),
        **_of_training(facts, writer),
        **_of_results(facts, writer),
        "towers": [(key, dict(facts.config.get(key) or {})) for key in ("vision_config", "text_config")],
        "digests": [(code(file), f"`{digest[:32]}`") for file, digest in sorted(facts.digests.items())],
    }


def _class_names(facts: CardFacts) -> list[str]:
    """Names of the first classes that were measured in the language of training; empty where none were."""
    for value in facts.values:
        if value.task == "classification" and value.language == facts.language:
            return [one_line(name) for name in value.measured[0].file.content.get("classes", [])[:3]]
    return []


def _of_origins(facts: CardFacts) -> dict[str, Any]:
    """Base, data and their licences."""
    config = facts.run["config"]
    if facts.origins:
        base, data = facts.origins["model"], facts.origins["datasets"]
    else:  # of a run before they were noted
        base, *data = (Content(title=Path(str(name)).name) for name in (config["model"], *config["dataset"]))
    works = [("model", base), *(("dataset", origin) for origin in data)]
    if teacher := facts.origins.get("teacher"):  # of runs that had one
        works.append(("teacher", teacher))

    def linked(origin: Content, kind: str) -> str:
        hub_id, title = origin.get("hub_id"), escaped(origin["title"])
        return f"[{title}](https://huggingface.co/{kind}{hub_id})" if HUB_ID.fullmatch(str(hub_id)) else f"*{title}*"

    return {
        **{"base": base, "datasets": data, "works": works, "linked": linked},
        "licences": lambda origin: ", ".join(map(code, origin.get("licenses") or ())),
        "licence": licence(facts),
        "is_inherited": inherited_licence(facts) is not None,
    }


def _of_training(facts: CardFacts, numbers: Writer) -> dict[str, Any]:
    run, config, used = facts.run, facts.run["config"], energy(facts)
    curve = [point["validation"] for point in run.get("curve") or () if point.get("validation")]
    picks: dict[str, Callable[[Content], str]] = {
        **{key: lambda run, key=key: numbers.number(run[key]) for key in ("steps", "pairs", "processes")},
        "pairs_per_second": lambda run: numbers.number(run["pairs_per_second"], 1),
        "device": lambda run: escaped(run["device"]),
        "training_time": lambda run: numbers.duration(run["seconds"]["training"]),
        "evaluation_time": lambda run: numbers.duration(run["seconds"]["evaluation"]),
    }

    def each(name: str) -> str:
        """A figure that every run has, in the order of seeds; one where all agree."""
        values = [picks[name](of) for of in facts.runs]
        return values[0] if len(set(values)) == 1 else "; ".join(values)

    hardware = used and ([used[key] for key in ("gpu", "cpu") if used.get(key)] or [run["device"]])
    return {
        "each": each,
        "rotated": bool(config.get("matryoshka_dims")) or (facts.model / "rotation.safetensors").is_file(),
        "stopped_early": any(of["steps"] < config["max_steps"] for of in facts.runs),
        "seeds": ", ".join(str(of["seed"]) for of in facts.runs),
        "validation": [(way, curve[0][way], curve[-1][way]) for way in DIRECTIONS] if len(curve) > 1 else [],
        "settings": _settings(config, run.get("fixed", {})),
        "used": used,
        "hardware": ", ".join(map(escaped, hardware or ())),
    }


def _settings(config: Content, fixed: dict[str, Any]) -> list[tuple[str, str]]:
    """The hyperparameters as the run had them, and what is `fixed` in every run; what does not apply is left out."""
    found = []
    for key in (*_SETTINGS.split(), *_GONE):
        value = config.get(key, fixed.get(key))
        applies = config["lora_rank"] if key.startswith("lora_") else True
        if key in ("caption_count", "min_similarity"):
            applies = config.get("caption_strategy") != "none"
        if value in (None, "", [], {}) or value is False or not applies or (key in _GONE and value == _GONE[key]):
            continue
        if key == "image_embedding_cache" and value != "off":
            value = "on"  # a folder of the machine, otherwise
        found.append((f"`{key}`", code(value)))
    return found


def _of_results(facts: CardFacts, writer: Writer) -> dict[str, Any]:
    main = [pair for task in TASKS for group in facts.groups(task) for pair in _main_pairs(group)]
    unsure = []  # gains whose interval includes zero, with the seeds of which that is so
    for gain in (value for value in facts.values if value.metric == GAIN):
        if ends := [one for one in gain.measured if one.interval_95 and one.interval_95[0] <= 0 <= one.interval_95[1]]:
            unsure.append((gain, ends))

    def sizes(group: list[Any]) -> dict[str, Any]:
        n, measured = {value.direction: value.n for value in group}, group[0].measured[0]
        return {
            "text_to_image": n.get("text_to_image"),
            "images": n.get("image_to_text") or n.get(""),
            "revision": facts.revision(measured),
            "skipped": measured.file.content["skipped_rows"],
        }

    summary = [pair for pair in main if pair["task"] == "retrieval" and pair["language"] == facts.language]
    return {
        **{"main": main, "unsure": unsure, "sizes": sizes, "pairs": pairs, "groups": facts.groups},
        "published": published_base,
        "summary_rows": [[writer.label(pair["capivara"]), *writer.cells(pair)[:3]] for pair in summary],
        "retrieval_rows": lambda group: writer.rows(pairs(group)),
        "worse": [pair for pair in main if is_worse(pair)],
        "gains": lambda group: [value for value in group if value.metric == GAIN],
        "measured_languages": sorted({value.language for value in facts.values if value.language}),
        "measured_seeds": [of.seed for of in max(facts.values, key=lambda value: value.seeds).measured],
        "widths": _widths(facts, writer),
    }


def pairs(group: list[Any]) -> list[dict[str, Any]]:
    """The values of a group by direction, without gains, each of baseline and model."""
    found = pairs_of(value for value in group if value.metric != GAIN)
    return sorted(found, key=lambda pair: ("", *DIRECTIONS).index(pair["direction"]))


def _main_pairs(group: list[Any]) -> list[dict[str, Any]]:
    """Main figures that baseline and model both have: mean recalls, the first metric of each classification."""
    found = pairs(group)
    main = [pair for pair in found if pair["metric"] == "mean_recall"] if found[0]["direction"] else found[:1]
    return [pair for pair in main if pair["capivara"] and pair["baseline"]]


def _widths(facts: CardFacts, writer: Writer) -> list[tuple[Any, list[list[str]]]]:
    """Of each data set and language whose recall was measured at several widths its first value and rows, in falling
    order: of the mean recall, or of R@1 where there are too few images for it; with the share of the whole's recall.
    """
    groups: dict[tuple, list[Any]] = {}
    for value in (*facts.values, *facts.cut):
        protocol = value.protocol.rpartition("; first ")[0] if value.dim else value.protocol
        if value.metric in ("mean_recall", "recall@1"):
            key = value.dataset, value.split, value.language, protocol, value.precision
            groups.setdefault(key, []).append(value)
    found = []
    for group in (group for group in groups.values() if any(value.dim for value in group)):
        metric = "mean_recall" if any(value.metric == "mean_recall" for value in group) else "recall@1"
        measured, rows = pairs([value for value in group if value.metric == metric]), []
        wholes = {pair["direction"]: pair["capivara"] for pair in measured if not pair["dim"]}
        measured.sort(key=lambda pair: (DIRECTIONS.index(pair["direction"]), -(pair["dim"] or math.inf)))
        for pair in measured:
            whole, own = wholes.get(pair["direction"]), pair["capivara"]
            kept = writer.percent(own.mean / whole.mean) if pair["dim"] and own and whole and whole.mean else "–"
            width = writer.number(pair["dim"]) if pair["dim"] else writer.words["all"]
            name = writer.metric(pair["direction"], metric)
            rows.append([name, width, writer.figure(pair["baseline"]), writer.figure(own), kept])
        found.append((group[0], rows))
    return found
