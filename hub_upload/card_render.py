"""A card's front matter and text out of its facts, each figure of the text marked with its source."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from hub_upload.card_facts import HUB_ID, CardFacts, Fact
from hub_upload.card_metadata import licence, metadata
from hub_upload.card_tables import (
    DIRECTIONS,
    GAIN,
    architecture,
    energy,
    files,
    graphs,
    image_sections,
    int8_lines,
    main_figures,
    retrieval_sections,
    settings,
    several_seeds,
    summary,
    tested,
    unsure,
    worse,
)
from hub_upload.card_text import Writer, code, escaped, mark, one_line, plain

LANGUAGES = ("en", "pt")
TEMPLATES = Path(__file__).parent / "templates"
# What a card was made with, for `--check`; a comment, so that it is not seen.
OPTIONS = "<!-- made by hub_upload.card with {options} -->"


def marked_card(
    facts: CardFacts, language: str, repo_id: str | None, formats: frozenset[str]
) -> tuple[ModelCardData, list[str], str]:
    """Front matter, the sources of its model index' values, and the text with its marks.

    Raises:
        ValueError: a figure is missing, or a repository is named whose weights are in folders of seeds.
    """
    if repo_id and facts.model != ".":
        raise ValueError(
            f"{facts.folder} holds a model in each of its folders seed-*, and a repository has one. Make it of one of "
            "them first, with `python -m hub_upload.export`."
        )
    write = Writer(language)
    title = repo_id.split("/")[1] if repo_id else f"CAPIVARA ({facts.run['config']['language'].value})"
    data, sources = metadata(facts, one_line(title))
    parts = {
        "title": escaped(title),
        "name": repo_id or (facts.name if facts.model == "." else f"{facts.name}/{facts.model}"),
        "hub": repo_id is not None,
        "formats": formats,
    }
    parts |= _origin_parts(facts, write) | _training_parts(facts, write) | _result_parts(facts, write)
    body = _templates().get_template(f"model_card_{language}.md.j2").render(**parts)
    options = json.dumps({"language": language, "repo_id": repo_id, "name": None if repo_id else facts.name})
    return data, sources, f"{_tidy(body)}\n\n{OPTIONS.format(options=options)}"


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,  # a missing figure is an error
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown; texts of others are escaped where they come in
    )


def _tidy(body: str) -> str:
    """One blank line where there are several, and none between the items of a list."""
    lines: list[str] = []
    for line in (line.rstrip() for line in body.strip().split("\n")):
        if line.startswith("- ") and len(lines) > 1 and not lines[-1] and lines[-2].startswith(("- ", "  ")):
            lines.pop()
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines)


# --- What the template is given --------------------------------------------------------------------------------------


def _origin_parts(facts: CardFacts, write: Writer) -> dict[str, Any]:
    """Base, data, and their licences."""
    of, config = facts.run.get("origins"), facts.run["config"]
    if of is None:  # of a run before they were noted
        base, data = _unknown_origin(config["model"]), [_unknown_origin(name) for name in config["dataset"]]
    else:
        base, data = of["model"], list(of["datasets"])
    inherited = licence(facts)
    return {
        "base": _linked(base, "", write),
        "datasets": [_linked(origin, "datasets/", write) for origin in data],
        "license": mark(code(inherited), f"{facts.run.source}/origins/license") if inherited else None,
        "licences": [
            {
                "kind": kind,
                "title": write.text(origin["title"]),
                "licences": write.codes(list(origin.get("licenses") or ())),
                "attribution": write.text(credit) if (credit := origin.get("attribution")) else None,
            }
            for kind, origin in [("model", base), *(("dataset", origin) for origin in data)]
        ],
    }


def _unknown_origin(name: Fact) -> Fact:
    return Fact({"title": Path(str(name.value)).name}, name.source)


def _linked(origin: Fact, kind: str, write: Writer) -> str:
    """Title of a base or data set; a link where it is on the Hub."""
    hub_id, title = origin.get("hub_id"), write.text(origin["title"])
    if hub_id and HUB_ID.fullmatch(str(hub_id.value)):
        return f"[{title}](https://huggingface.co/{kind}{mark(hub_id.value, hub_id.source)})"
    return f"*{title}*"


def _training_parts(facts: CardFacts, write: Writer) -> dict[str, Any]:
    config, skipped = facts.run["config"], facts.run.get("skipped_rows")
    measured = dict.fromkeys(series.first.language for series in facts.series if series.first.language)
    languages = sorted(map(write.language_name, measured))
    return {
        "language": mark(write.language_name(str(config["language"].value)), config["language"].source),
        "measured_languages": f" {write.word('and')} ".join(filter(None, (", ".join(languages[:-1]), *languages[-1:]))),
        "both_towers": config["towers"].value == "both",
        "lora_rank": write.of(config["lora_rank"]) if config["lora_rank"].value else None,
        "interpolate": write.code(config["interpolate"]) if config["interpolate"].value != 1 else None,
        "train_split": write.code(config["train_split"]),
        "skipped": [(escaped(key), write.of(skipped[key])) for key in skipped.names()] if skipped else [],
        "batch": write.of(config["effective_batch_size"]),
        "micro_batch": write.of(config["micro_batch_size"]),
        "max_steps": write.of(config["max_steps"]),
        "stopped_early": any(run["steps"].number() < config["max_steps"].number() for run in facts.runs),
        "seeds": ", ".join(mark(str(run["seed"].value), run["seed"].source) for run in facts.runs),
        "validation": _validation(facts, write),
        "settings": settings(facts, write),
        "arch": architecture(facts, write),
        "versions": ", ".join(
            f"{escaped(key)} {write.text(facts.run['versions'][key])}" for key in facts.run["versions"].names()
        ),
        "energy": _energy(facts, write),
        **_of_each_run(facts, write),
    }


def _of_each_run(facts: CardFacts, write: Writer) -> dict[str, str]:
    """What every run has a figure of, in the order of seeds; said once where all agree."""
    picks = {
        "steps": lambda run: write.of(run["steps"]),
        "pairs": lambda run: write.of(run["pairs"]),
        "pairs_per_second": lambda run: write.of(run["pairs_per_second"], 1),
        "processes": lambda run: write.of(run["processes"]),
        "device": lambda run: write.text(run["device"]),
        "training_time": lambda run: write.duration(run["seconds"]["training"]),
        "evaluation_time": lambda run: write.duration(run["seconds"]["evaluation"]),
    }
    found = {}
    for name, pick in picks.items():
        values = [pick(run) for run in facts.runs]
        found[name] = values[0] if len(set(map(plain, values))) == 1 else "; ".join(values)
    return found


def _result_parts(facts: CardFacts, write: Writer) -> dict[str, Any]:
    results = retrieval_sections(facts, write) + image_sections(facts, write)
    pictures = {name: [path for path in facts.pictures if name in path] for name in ("retrieval", "curves")}
    return {
        "summary": summary(facts, write),
        "worse": worse(facts, write),
        "unsure": unsure(facts, write),
        "graphs": graphs(facts, write),
        "int8": int8_lines(facts, write),
        "has_baseline": bool(main_figures(facts)),
        "tested": tested(facts, write),
        "seeds_note": several_seeds(facts, write),
        "results": results,
        "gains_explained": any(series.first.metric == GAIN for series in facts.series),
        "pictures": pictures,
        "files": files(facts, write),
    }


def _validation(facts: CardFacts, write: Writer) -> str:
    """Mean recall of the validation split at the first and the last measurement of the run."""
    measured = [point["validation"] for point in facts.run.get("curve") or () if point.get("validation")]
    parts = []
    for direction in DIRECTIONS if len(measured) > 1 else ():
        ends = [measured[0][direction], measured[-1][direction]]
        before, after = (mark(write.number(100 * end.number(), 2), end.source) for end in ends)
        words = {"what": write.direction(direction), "before": before, "after": after}
        parts.append(write.word("before_after").format(**words))
    if parts and len(facts.runs) > 1:
        parts[-1] += f" ({write.word('seed')} {mark(str(facts.run['seed'].value), facts.run['seed'].source)})"
    return "; ".join(parts)


def _energy(facts: CardFacts, write: Writer) -> dict[str, Any] | None:
    used = energy(facts)
    if used is None:
        return None
    hardware = [fact for key in ("gpu", "cpu") if (fact := used.about.get(key))] or [facts.run["device"]]
    country = used.about.get("country")
    return {
        "estimated": used.estimated,
        "method": write.phrase(used.about["method"]),
        "covers": write.phrase(used.about["covers"]),
        "hardware": ", ".join(write.text(fact) for fact in hardware),
        "time": write.duration(Fact(3600 * used.hours.value, used.hours.source)),
        "country": write.code(country) if country else "–",
        "kwh": write.quantity(used.kwh.value, ("kWh", "Wh"), used.kwh.source),
        "co2e": write.quantity(used.kg_co2e.value, ("kg", "g"), used.kg_co2e.source),
    }
