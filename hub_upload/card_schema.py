"""Rules of the Hub and of this project that any model card must keep, whoever wrote it: `card_faults`."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from common.privacy import machine_path_in, secret_in
from hub_upload.card_facts import HUB_ID, is_number

LANGUAGE = re.compile(r"[a-z]{2,3}")  # ISO 639-1 or -3
SPECIAL_LANGUAGES = ("multilingual", "code")
# Identifiers of https://huggingface.co/docs/hub/repositories-licenses
_LICENCES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl "
    "gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql "
    "ofl-1.1 ncsa unlicense zlib pddl lgpl-lr gemma unknown other"
)
LICENCES = frozenset(_LICENCES.split())
# Tasks of the Hub that a model with these two towers can serve.
PIPELINE_TAGS = (
    "zero-shot-image-classification", "image-classification", "image-feature-extraction", "feature-extraction",
    "sentence-similarity",
)  # fmt: skip
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---[ \t]*\n", re.DOTALL)
CODE = re.compile(r"^(```+)[^\n]*\n.*?^\1[ \t]*$|(`+)(?!`).+?(?<!`)\2(?!`)", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--(?!-?>)(?:(?!--).)*-->", re.DOTALL)
TAG = re.compile(r"<[/!?A-Za-z][^>]*>?")
LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]*)")


class _StrictLoader(yaml.SafeLoader):
    """YAML whose keys stand once; PyYAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Raises ValueError where the text is no YAML, or a key stands twice."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a key that is a list
        raise ValueError(" ".join(str(error).split())) from error


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body. Raises ValueError where there is no front matter, or it is no mapping."""
    found = FRONT_MATTER.match(text)
    if not found:
        raise ValueError("the card must begin with a front matter between two lines of ---")
    content = read_yaml(found[1])
    if not isinstance(content, dict):
        raise ValueError("the front matter must hold `key: value` lines")
    return content, text[found.end() :]


def card_faults(text: str) -> list[str]:
    """What is wrong with a card's form, whatever its figures; empty where nothing is."""
    try:
        data, body = split_card(text)
    except ValueError as error:
        return [f"front matter: {error}."]
    faults = [f"front matter: {fault}." for fault in _metadata_faults(data)]
    faults += [f"text: {fault}." for fault in _body_faults(body)]
    if path := machine_path_in(text):
        faults.append(f"text: a path of a machine: {path[:60]!r}.")
    if secret := secret_in(text):
        faults.append(f"text: it holds {secret[0]}.")
    return faults


def _metadata_faults(data: dict[str, Any]) -> Iterator[str]:
    yield from _licence_faults(data)
    for code in _listed(data.get("language")):
        if not isinstance(code, str) or not (LANGUAGE.fullmatch(code) or code in SPECIAL_LANGUAGES):
            yield f"language {code!r} is no ISO 639 code of two or three letters"
    for key, wanted in (("library_name", ("transformers",)), ("pipeline_tag", PIPELINE_TAGS)):
        if data.get(key) not in wanted:
            yield f"{key} must be {' or '.join(wanted)}, got {data.get(key)!r}"
    for name in _listed(data.get("base_model")):
        if not isinstance(name, str) or not HUB_ID.fullmatch(name):
            yield f"base_model {name!r} is no Hub id, such as owner/name"
    for key in ("datasets", "tags"):
        names = data.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            yield f"{key} must be a list of names, got {names!r}"
        elif key == "datasets":
            yield from (f"datasets: {name!r} is no Hub id" for name in names if not HUB_ID.fullmatch(name))
    yield from _emission_faults(data.get("co2_eq_emissions"))
    if "model-index" in data:
        yield from _index_faults(data["model-index"])


def _licence_faults(data: dict[str, Any]) -> Iterator[str]:
    if "license" not in data:  # unknown, which the text says
        return
    if not isinstance(data["license"], str) or data["license"] not in LICENCES:
        yield f"license {data['license']!r} is no identifier of the Hub's; leave it out where it is unknown"
    elif data["license"] == "other" and not data.get("license_name"):
        yield "license other needs a license_name"


def _emission_faults(emitted: Any) -> Iterator[str]:
    if emitted is None:
        return
    if not isinstance(emitted, dict) or not is_number(emitted.get("emissions")) or emitted["emissions"] < 0:
        yield "co2_eq_emissions needs `emissions`, grams from 0 on"
    elif not isinstance(emitted.get("source"), str) or not emitted["source"]:
        yield "co2_eq_emissions needs a `source`"


def _index_faults(index: Any) -> Iterator[str]:
    if not isinstance(index, list) or not all(isinstance(entry, dict) for entry in index):
        yield "model-index must be a list of models"
        return
    for entry in index:
        results = entry.get("results")
        if not isinstance(entry.get("name"), str) or not isinstance(results, list) or not results:
            yield "model-index needs a name and results"
            continue
        for number, result in enumerate(results):
            yield from (f"model-index, result {number}: {fault}" for fault in _result_faults(result))


def _result_faults(result: Any) -> Iterator[str]:
    parts = result if isinstance(result, dict) else {}
    for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
        content = parts.get(part)
        for key in keys:
            if not isinstance(content, dict) or not isinstance(content.get(key), str) or not content[key]:
                yield f"{part} needs a {key}"
    metrics = parts.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        yield "it has no metrics"
        return
    for metric in metrics:
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            yield "a metric needs a type"
        elif not is_number(metric.get("value")):
            yield f"the value of {metric['type']} must be a number, got {metric.get('value')!r}"


def _body_faults(body: str) -> Iterator[str]:
    """HTML outside of code, and links to anything but pages and files."""
    prose = COMMENT.sub("", CODE.sub("", body))
    for tag in TAG.findall(prose):
        yield f"HTML must be written as text: {tag[:60]!r}"
    for target in LINK.findall(prose):
        if re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE) and not re.match("https?://", target, re.IGNORECASE):
            yield f"a link must lead to a page or a file: {target[:60]!r}"
    if not re.search(r"^# \S", prose, re.MULTILINE):
        yield "it has no title"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
