"""The model card states what its files say, in both languages, and `--check` sees every digit that does not."""

import json
import random
import re
import shutil
from pathlib import Path

import jinja2.meta
import pytest
from card_run import card_of, change, record_of, results_of, split_card, trained_run
from huggingface_hub import ModelCard, ModelCardData

from capivara_common.files import RUN_MARKER
from hub_upload import push
from hub_upload.card import check, main, outdated, render, write_card
from hub_upload.card_values import LANGUAGES, TEMPLATES, card_facts, template_values
from hub_upload.push import PushArguments

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("How to use", "Model details", "Uses", "Bias, risks and limitations", "Ethical considerations", "Training",
            "Evaluation", "Environmental impact", "Technical facts", "Licence", "Citation")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_dataset_folder, tiny_processor):
    return trained_run(tmp_path_factory, tiny_dataset_folder, tiny_processor)


@pytest.fixture(scope="module")
def with_card(trained, tmp_path_factory):
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("with_card") / "run")
    write_card(folder)
    return folder


@pytest.fixture
def run(with_card, tmp_path):
    """A copy of the run, with its card."""
    return shutil.copytree(with_card, tmp_path / "run")


def test_a_run_gets_a_card_with_all_sections(run):
    data, body = split_card(card_of(run))
    assert check(run) == []
    assert re.findall(r"^## (.*)$", body, re.MULTILINE)[: len(SECTIONS)] == list(SECTIONS)
    assert data["language"] == ["pt", "en"] and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "zero-shot-image-classification" and "multilingual" in data["tags"]
    assert data["license"] == "cc-by-sa-4.0" and "base_model" not in data and "datasets" not in data
    assert "![" in body and "(retrieval.png)" in body and "(curves.png)" in body
    for text in ("Quadrados coloridos", "A tiny base", "`mit`", "`cc-by-sa-4.0`", "Squares by nobody in particular."):
        assert text in body
    baseline, model = (record_of(run, "recall@1", model=role)["value"] for role in ("baseline", "capivara"))
    row = f"| Text → image, R@1 | {100 * baseline:.2f} | {100 * model:.2f} | {100 * (model - baseline):+.2f} |"
    assert row in body.replace("**", "")
    gain = record_of(run, "mean_recall_gain")
    low, high = (f"{100 * end:+.2f}" for end in gain["interval_95"])
    assert f"mean recall: {100 * gain['value']:+.2f} points; 95 % interval {low} to {high}" in body
    assert "| `learning_rate` | `0.001` |" in body and "all 10 pairs" in body


def test_metadata_are_those_of_the_json_and_survive_the_hubs_own_classes(run):
    data, _ = split_card(card_of(run))
    values = {
        (r["language"], r["direction"], r["metric"]): r["value"]
        for path in (run / "results").glob("*.json")
        for r in json.loads(path.read_text(encoding="utf-8"))["records"]
        if r["model"] == "capivara" and not r["metric"].endswith("_gain")
    }
    (index,) = data["model-index"]
    found = {
        (r["dataset"]["config"], r["task"]["type"].replace("-retrieval", "").replace("-", "_"), m["type"]): m["value"]
        for r in index["results"]
        for m in r["metrics"]
    }
    assert found == values
    assert ModelCardData(**data).to_dict() == data
    assert ModelCard(card_of(run)).data.to_dict() == data
    assert str(ModelCard(card_of(run))).strip() == card_of(run).strip()


def test_the_portuguese_card_has_the_same_figures(run):
    english, portuguese = (str(render(card_facts(run), language)) for language in ("en", "pt"))
    numbers = [sorted(re.findall(r"[-+]?\d+[.,]\d+", split_card(text)[1])) for text in (english, portuguese)]
    assert len(numbers[0]) > 50 and len(numbers[0]) == len(numbers[1])
    figures = [re.findall(r"\| [-+*\d.,]+ (?=\|)", text.translate(swapped)) for text, swapped in
               ((english, {}), (portuguese, str.maketrans(",.", ".,")))]  # fmt: skip
    assert len(figures[0]) > 50 and figures[0] == figures[1]
    headings = [re.findall(r"^#+ ", text, re.MULTILINE) for text in (english, portuguese)]
    assert headings[0] == headings[1]
    text = split_card(portuguese)[1]
    assert "revocação média" in text and "Licença" in text and "## Considerações éticas" in text
    assert not re.search(
        r"\b(the|of|and|with|from)\b", re.sub(r"```.*?```|`[^`]*`|\[.*?\]\(.*?\)|<!--.*", "", text, flags=re.S)
    )
    write_card(run, language="pt")
    assert check(run) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_template_has_all_that_it_names(run, language):
    """Jinja would print nothing for what it is not given, and for a sentence or label that a language lacks."""
    texts = [
        (TEMPLATES / name).read_text(encoding="utf-8") for name in (f"model_card_{language}.md.j2", "model_card.md.j2")
    ]
    trees = [jinja2.Environment().parse(text) for text in texts]
    given = {*template_values(card_facts(run), language, "x", False), "title", "options", "card_data"}
    named = set().union(*map(jinja2.meta.find_undeclared_variables, trees))
    assert named - given <= {"of", "e", "w"}
    blocks = [{block.name for block in tree.find_all(jinja2.nodes.Block)} for tree in trees]
    labels = set(re.findall(r"\bw\.(\w+)", "".join(texts)))
    assert blocks[0] == blocks[1] and labels <= set(re.findall(r'"([\w.]+)":', texts[0]))


def test_a_card_of_an_older_template_is_checked_by_its_values(run, capsys):
    """Its words may be others; its front matter, values and digests may not, and no HTML may hide them."""
    text = card_of(run).replace("random scores would give", "dice would give")
    (run / "README.md").write_text(text, encoding="utf-8")
    assert any("dice" in fault for fault in check(run))
    text = text.replace(', "version": 4', "")
    (run / "README.md").write_text(text, encoding="utf-8")
    main(["--check", str(run)])
    assert "its words were not compared" in (said := capsys.readouterr().out) and "Every figure" not in said
    marker = "## Technical facts\n"
    for added in ("<script>", "| <b>a | b |", "<!-- made by hub_upload.card with {} -->"):
        (run / "README.md").write_text(text.replace(marker, f"{added}\n\n{marker}"), encoding="utf-8")
        assert check(run) == [f"README.md: it says {added!r}."]
    for old in (r"interval ([-+])", r"(`run.json` \| `)", r"(R@1 \| \**)", r"(license: )"):
        changed = re.sub(old, r"\g<1>9", text, count=1)
        assert changed != text
        (run / "README.md").write_text(changed, encoding="utf-8")
        assert check(run), old


def test_templates_hold_no_figure():
    """Digits in them are names, not measurements: every other number must come through a fact."""
    allowed = (
        r"arxiv\.org/abs/2310\.13683|95 ?%|8 bits|int8|CO2e|co2e|santos2023capivara|\{2023\}|model_type|\(320, 240\)"
        r"|R@k|dim=-1|a11y|SHA-256|float32|float16|top[-_]5|11-?point_?|mAP de 11|adam_beta[12]"
    )
    for path in TEMPLATES.iterdir():
        text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}|```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
        assert not re.findall(r".*\d.*", re.sub(allowed, "", text)), path.name


@pytest.mark.slow
def test_one_changed_digit_of_the_card_or_a_file_fails(run):
    generator = random.Random(0)
    for path, places in [(run / "README.md", 20), (run / "run.json", 6), (run / "config.json", 6),
                         *((path, 6) for path in (run / "results").glob("*.json"))]:  # fmt: skip
        text = path.read_text(encoding="utf-8")
        for place in generator.sample([match.start() for match in re.finditer(r"\d", text)], places):
            digit = str((int(text[place]) + generator.randint(1, 9)) % 10)
            path.write_text(text[:place] + digit + text[place + 1 :], encoding="utf-8")
            faults = check(run)
            assert any(path.name in fault for fault in faults), f"{text[max(0, place - 60) : place + 20]!r}"
        path.write_text(text, encoding="utf-8")
    assert check(run) == []


@pytest.mark.slow
def test_what_is_added_by_hand(run):
    text = card_of(run)
    marker = "## Technical facts\n"
    numbers = ("Also tried: recall 99.9.", "Dez por cento (１０ %) melhor.", "½ better.")
    for added in (*numbers, "See [more](javascript:alert).", "<!--", "```", "## Results"):
        (run / "README.md").write_text(text.replace(marker, f"{added}\n\n{marker}"), encoding="utf-8")
        assert check(run), added
    (run / "README.md").write_text(text.replace(marker, f"We thank our annotators.\n\n{marker}"), encoding="utf-8")
    assert check(run) == []
    (run / "README.md").write_text(text.replace("- multilingual\n", "- multilingual\n- best\n"), encoding="utf-8")
    assert check(run) == ["README.md: it says '- best'."]
    for gone in ("| Text → image, R@1 ", "- The figures hold", "## Results"[3:], "license: "):
        lines = [line for line in text.split("\n") if gone not in line]
        (run / "README.md").write_text("\n".join(lines), encoding="utf-8")
        assert check(run), gone


def test_a_card_that_was_not_made_here(run):
    (run / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n", encoding="utf-8")
    assert check(run) == [
        "README.md: it was not made by `python -m hub_upload.card`, so its figures have no known source."
    ]
    for name, fault in (('"x\\"); import os; (\\""', "no name of a folder"), ("5", "has another form")):
        options = f'{{"language": "en", "repo_id": null, "name": {name}}}'
        (run / "README.md").write_text(f"---\na: b\n---\n\n# Mine\n\n<!-- made by hub_upload.card with {options} -->\n")
        assert fault in check(run)[0]
    (run / "README.md").unlink()
    with pytest.raises(ValueError, match=r"has no README\.md"):
        check(run)
    partial = run.rename(run.with_name("run.partial"))
    (partial / RUN_MARKER).touch()
    with pytest.raises(ValueError, match="is an unfinished run"):
        check(partial)


def test_a_push_looks_at_cards_that_were_made_here(run):
    args = PushArguments(model=run, repo_id="us/model")
    assert outdated(run) == [] and push.check_card(args) is None
    change(results_of(run), lambda content: content["records"][0].update(value=0.999))
    assert outdated(run)
    push.check_card(args)  # warns
    with pytest.raises(ValueError, match="Nothing was sent"):
        push.check_card(PushArguments(model=run, repo_id="us/model", push=True))
    (run / "README.md").write_text("# Written by hand: 99 % right\n", encoding="utf-8")
    assert outdated(run) == [] and push.check_card(args) is None


def test_no_path_of_a_machine(run):
    def lead_away(content):
        content["config"] |= {"model": "/home/ana/base", "image_embedding_cache": "/home/ana/cache"}
        content["origins"]["model"]["title"] = "/home/ana/base"
        content["device"] = "/home/ana/gpu"

    change(run / "run.json", lead_away)
    change(results_of(run), lambda results: [r.update(dataset="/home/ana/squares") for r in results["records"]])
    write_card(run)
    assert "ana" not in card_of(run) and "squares" in card_of(run) and check(run) == []


def test_the_command(run, tmp_path, capsys):
    before = card_of(run)
    main(["--model", str(run), "--language", "pt", "--output", str(tmp_path / "ficha.md")])
    assert "Considerações éticas" in (tmp_path / "ficha.md").read_text(encoding="utf-8") and card_of(run) == before
    main(["--check", str(run)])
    assert "Every figure" in capsys.readouterr().out
    (run / "README.md").write_text(before.replace("all 10 pairs", "all 11 pairs"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"the files give .*all 10 pairs.*\n.*it says .*all 11 pairs"):
        main(["--check", str(run)])
    for argv, message in (
        ([], "Give --model FOLDER"),
        (["--model", str(run), "--check", str(run)], "Give --model FOLDER"),
        (["--model", str(run), "--repo_id", "justaname"], "owner/name"),
        (["--model", str(tmp_path / "none")], "is no folder"),
        (["--model", str(run), "--modell", "x"], "modell"),
    ):
        with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
            main(argv)
