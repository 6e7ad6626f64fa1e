"""The model card states the values of its files in both languages, and `--check` finds every changed digit."""

import ast
import contextlib
import json
import random
import re
import shutil
import statistics

import jinja2.meta
import pytest
from card_run import SEEDS, card_of, change, record_of, results_of, runs_of_seeds, split_card, trained_run
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

from capivara_common.files import RUN_MARKER, write_json
from hub_upload import push
from hub_upload.card import (
    TEMPLATE_VERSION,
    find_differences_between_card_and_files,
    find_differences_between_generated_card_and_files,
    main,
    render_card,
    write_card,
)
from hub_upload.card_values import FORMAT_FILES, LANGUAGES, TEMPLATE_FOLDER, build_template_values, collect_run_metadata
from hub_upload.push import PushArguments

SECTIONS = ["How to use", "Model details", "Uses and limits", "Training", "Evaluation", "License", "Citation"]
MARKER = "## Citation\n"  # tests add lines before this heading
HUB_DATA = "laicsiifes/flickr30k-pt-br"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def with_card(tmp_path_factory, tiny_dataset_folder, tiny_processor):
    trained = trained_run(tmp_path_factory, tiny_dataset_folder, tiny_processor)
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("with_card") / "run")
    write_card(folder)
    return folder


@pytest.fixture
def run(with_card, tmp_path):
    """A copy of the trained run, with its card."""
    return shutil.copytree(with_card, tmp_path / "run")


def test_a_run_gets_a_card_with_all_sections(run):
    data, body = split_card(card_of(run))
    assert find_differences_between_card_and_files(run) == []
    assert re.findall(r"^## (.*)$", body, re.MULTILINE)[:-1] == SECTIONS
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


def test_the_model_index_has_all_results_and_is_readable_by_huggingface_hub(run):
    data, _ = split_card(card_of(run))
    values = {
        (r["language"], r["direction"], r["metric"]): r["value"]
        for path in (run / "results").glob("*.json")
        for r in json.loads(path.read_text(encoding="utf-8"))["records"]
        if r["model"] == "capivara" and not r["metric"].endswith("_gain")
    }
    (index,) = data["model-index"]
    indexed = {
        (r["dataset"]["config"], r["task"]["type"].replace("-retrieval", "").replace("-", "_"), m["type"]): m["value"]
        for r in index["results"]
        for m in r["metrics"]
    }
    assert indexed == values
    assert ModelCard(card_of(run)).data.to_dict() == data


def test_the_portuguese_card_has_the_same_figures(run):
    english, portuguese = (str(render_card(collect_run_metadata(run), language)) for language in ("en", "pt"))
    figures = [re.findall(r"\| [-+*\d.,]+ (?=\|)", text.translate(swapped)) for text, swapped in
               ((english, {}), (portuguese, str.maketrans(",.", ".,")))]  # fmt: skip
    assert len(figures[0]) > 50 and figures[0] == figures[1]
    headings = [re.findall(r"^#+ ", text, re.MULTILINE) for text in (english, portuguese)]
    assert headings[0] == headings[1]
    text = split_card(portuguese)[1]
    assert "revocação média" in text and "Licença" in text and "## Usos e limites" in text
    assert not re.search(
        r"\b(the|of|and|with|from)\b", re.sub(r"```.*?```|`[^`]*`|\[.*?\]\(.*?\)|<!--.*", "", text, flags=re.S)
    )
    write_card(run, language="pt")
    assert find_differences_between_card_and_files(run) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_variable_block_and_label_of_a_template_is_defined(run, language):
    """Jinja would print nothing for a sentence or label that the template of a language lacks."""
    texts = [
        (TEMPLATE_FOLDER / name).read_text(encoding="utf-8")
        for name in (f"model_card_{language}.md.j2", "model_card.md.j2")
    ]
    trees = [jinja2.Environment().parse(text) for text in texts]
    given = {*build_template_values(collect_run_metadata(run), language, None), "title", "options", "card_data"}
    named = set().union(*map(jinja2.meta.find_undeclared_variables, trees))
    assert named - given <= {"of", "e", "w"}
    blocks = [{block.name for block in tree.find_all(jinja2.nodes.Block)} for tree in trees]
    labels = set(re.findall(r"\bw\.(\w+)", "".join(texts)))
    assert blocks[0] == blocks[1] and labels <= set(re.findall(r'"([\w.]+)":', texts[0]))


@pytest.mark.slow
def test_a_card_from_an_older_template_is_checked_by_its_values(run, capsys):
    """Its text may differ. Its front matter, values and digests may not, and it must not contain HTML."""
    text = card_of(run).replace("random scores would give", "dice would give")
    (run / "README.md").write_text(text, encoding="utf-8")
    assert any("dice" in fault for fault in find_differences_between_card_and_files(run))
    text = text.replace(f', "version": {TEMPLATE_VERSION}', "")
    (run / "README.md").write_text(text, encoding="utf-8")
    main(["--check", str(run)])
    output = capsys.readouterr().out
    assert "older template" in output and "All values" not in output
    for added in ("<script>", "| <b>a | b |", "<!-- made by hub_upload.card with {} -->"):
        (run / "README.md").write_text(text.replace(MARKER, f"{added}\n\n{MARKER}"), encoding="utf-8")
        assert find_differences_between_card_and_files(run) == [f"README.md: the card has {added!r}, unlike its files."]
    for old in (r"interval ([-+])", r"(`run.json` \| `)", r"(R@1 \| \**)", r"(license: )"):
        changed = re.sub(old, r"\g<1>9", text, count=1)
        assert changed != text
        (run / "README.md").write_text(changed, encoding="utf-8")
        assert find_differences_between_card_and_files(run), old


def test_templates_contain_no_figures():
    """Digits in the templates are parts of names. All other numbers must come from the files of the run."""
    allowed = (
        r"arxiv\.org/abs/2310\.13683|95 ?%|8 bits|int8|CO2e|co2e|santos2023capivara|\{2023\}|model_type|\(320, 240\)"
        r"|R@k|dim=-1|a11y|SHA-256|float32|float16|top[-_]5|11-?point_?|mAP de 11|adam_beta[12]"
    )
    for path in TEMPLATE_FOLDER.iterdir():
        text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}|```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
        assert not re.findall(r".*\d.*", re.sub(allowed, "", text)), path.name


@pytest.mark.slow
def test_one_changed_digit_of_the_card_or_a_file_fails(run):
    generator = random.Random(0)
    for path, places in [(run / "README.md", 20), (run / "run.json", 6), (run / "config.json", 6),
                         *((path, 6) for path in (run / "results").glob("*.json"))]:  # fmt: skip
        text = path.read_text(encoding="utf-8")
        # Not in the last line: its digit is the template version, and the text of other versions is not compared.
        for place in generator.sample([match.start() for match in re.finditer(r"\d(?=.*\n)", text)], places):
            digit = str((int(text[place]) + generator.randint(1, 9)) % 10)
            path.write_text(text[:place] + digit + text[place + 1 :], encoding="utf-8")
            faults = find_differences_between_card_and_files(run)
            assert any(path.name in fault for fault in faults), f"{text[max(0, place - 60) : place + 20]!r}"
        path.write_text(text, encoding="utf-8")
    assert find_differences_between_card_and_files(run) == []


@pytest.mark.slow
def test_only_harmless_lines_may_be_added_by_hand_and_none_removed(run):
    text = card_of(run)
    numbers = ("Also tried: recall 99.9.", "Dez por cento (１０ %) melhor.", "½ better.")
    for added in (*numbers, "See [more](javascript:alert).", "<!--", "```", "## Results"):
        (run / "README.md").write_text(text.replace(MARKER, f"{added}\n\n{MARKER}"), encoding="utf-8")
        assert find_differences_between_card_and_files(run), added
    (run / "README.md").write_text(text.replace(MARKER, f"We thank our annotators.\n\n{MARKER}"), encoding="utf-8")
    assert find_differences_between_card_and_files(run) == []
    (run / "README.md").write_text(text.replace("- multilingual\n", "- multilingual\n- best\n"), encoding="utf-8")
    assert find_differences_between_card_and_files(run) == ["README.md: the card has '- best', unlike its files."]
    for removed in ("| Text → image, R@1 ", "- The figures hold", "## Results"[3:], "license: "):
        lines = [line for line in text.split("\n") if removed not in line]
        (run / "README.md").write_text("\n".join(lines), encoding="utf-8")
        assert find_differences_between_card_and_files(run), removed


def test_a_card_that_another_program_wrote_is_a_fault(run):
    (run / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n", encoding="utf-8")
    (fault,) = find_differences_between_card_and_files(run)
    assert "python -m hub_upload.card" in fault
    for name, fault in (('"us/x\\"); import os; (\\""', "import os"), ("5", str(run))):
        options = f'{{"language": "en", "repo_id": {name}}}'
        (run / "README.md").write_text(f"---\na: b\n---\n\n# Mine\n\n<!-- made by hub_upload.card with {options} -->\n")
        assert fault in find_differences_between_card_and_files(run)[0]
    (run / "README.md").unlink()
    with pytest.raises(ValueError, match=r"README\.md.*python -m hub_upload\.card"):
        find_differences_between_card_and_files(run)


def test_a_push_refuses_an_outdated_card_and_accepts_a_handwritten_one(run):
    args = PushArguments(model=run, repo_id="us/model")
    assert (
        find_differences_between_generated_card_and_files(run) == []
        and push.warn_or_fail_if_card_is_outdated(args) is None
    )
    change(results_of(run), lambda content: content["records"][0].update(value=0.999))
    assert find_differences_between_generated_card_and_files(run)
    push.warn_or_fail_if_card_is_outdated(args)  # a preview warns only
    with pytest.raises(ValueError, match=r"README\.md"):
        push.warn_or_fail_if_card_is_outdated(PushArguments(model=run, repo_id="us/model", push=True))
    (run / "README.md").write_text("# Written by hand: 99 % right\n", encoding="utf-8")
    assert (
        find_differences_between_generated_card_and_files(run) == []
        and push.warn_or_fail_if_card_is_outdated(args) is None
    )


def test_folders_of_this_machine_do_not_appear_in_a_card(run):
    def insert_absolute_paths(content):
        content["config"] |= {"model": "/home/ana/base", "image_embedding_cache": "/home/ana/cache"}
        content["origins"]["model"]["title"] = "/home/ana/base"
        content["device"] = "/home/ana/gpu"

    change(run / "run.json", insert_absolute_paths)
    change(results_of(run), lambda results: [r.update(dataset="/home/ana/squares") for r in results["records"]])
    write_card(run)
    assert (
        "ana" not in card_of(run) and "squares" in card_of(run) and find_differences_between_card_and_files(run) == []
    )


def test_the_command_writes_and_checks_cards_and_refuses_wrong_flags(run, tmp_path, capsys):
    before = card_of(run)
    main(["--model", str(run), "--language", "pt", "--output", str(tmp_path / "ficha.md")])
    assert "Usos e limites" in (tmp_path / "ficha.md").read_text(encoding="utf-8") and card_of(run) == before
    main(["--check", str(run)])
    assert "All values" in capsys.readouterr().out
    (run / "README.md").write_text(before.replace("all 10 pairs", "all 11 pairs"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"the files give .*all 10 pairs.*\n.*the card has .*all 11 pairs"):
        main(["--check", str(run)])
    for argv, message in (
        ([], "--model FOLDER"),
        (["--model", str(run), "--check", str(run)], "--model FOLDER"),
        (["--model", str(run), "--repo_id", "justaname"], "owner/name"),
        (["--model", str(tmp_path / "none")], re.escape(str(tmp_path / "none"))),
        (["--model", str(run), "--modell", "x"], "modell"),
    ):
        with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
            main(argv)


# --- Sources: each figure comes from a file, several seeds are averaged, Hub ids only if loaded from the Hub ---------


WRONG_FILES = {
    "run.json without steps": ("run.json", lambda run: run.pop("steps"), r"KeyError\('steps'\)"),
    "no config": ("run.json", lambda run: run.pop("config"), r"KeyError\('config'\)"),
    "a record without a value": ("pt", lambda r: r["records"][2].pop("value"), r"records/2.*'value'"),
    "a share above 1": ("pt", lambda r: r["records"][0].update(value=8.3), r"8\.3"),
    "a value that is text": ("pt", lambda r: r["records"][0].update(value="0.5"), "value"),
    "another schema": ("pt", lambda r: r.update(schema_version=1), "schema_version.*2.*1"),
    "another role": ("pt", lambda r: r["records"][0].update(model="best"), "model.*baseline, capivara"),
    "two values": ("pt", lambda r: r["records"].append({**r["records"][0], "value": 0.9}), r"0\.9\b"),
    "a token": ("run.json", lambda run: run["config"].update(model="hf_" + "a" * 34), r"hf_…"),
}


@pytest.mark.parametrize("fault", WRONG_FILES)
def test_a_missing_or_wrong_value_in_a_file_is_an_error(run, fault):
    name, edit, message = WRONG_FILES[fault]
    change(run / name if name == "run.json" else results_of(run, name), edit)
    with pytest.raises(ValueError, match=message):
        main(["--model", str(run)])


def test_a_folder_without_results_or_run_json_is_refused(run):
    results_of(run).write_text('{"benchmarks": 3}', encoding="utf-8")  # such as a suite's summary
    assert {value.language for value in collect_run_metadata(run)["values"]} == {"en"}
    shutil.rmtree(run / "results")
    with pytest.raises(ValueError, match="results"):
        collect_run_metadata(run)
    (run / "run.json").unlink()
    with pytest.raises(ValueError, match=r"run\.json"):
        collect_run_metadata(run)


def published(folder) -> list[dict]:
    """Return the metrics in the model index of a card."""
    results = split_card(card_of(folder))[0]["model-index"][0]["results"]
    return [metric for result in results for metric in result["metrics"]]


@pytest.mark.slow
def test_a_card_of_several_seeds_has_means_and_deviations(tmp_path):
    folder = shutil.copytree(SEEDS, tmp_path / "seeds")
    write_card(folder)
    assert find_differences_between_card_and_files(folder) == []
    expected = "recall@1", "text_to_image", "capivara"
    records = json.loads(results_of(folder).read_text(encoding="utf-8"))["records"]
    shares = [r["value"] for r in records if (r["metric"], r["direction"], r["model"]) == expected]
    mean = f"{100 * statistics.mean(shares):.2f} ± {100 * statistics.stdev(shares):.2f}"
    for text in (mean, "3 training runs, seeds 0, 1, 2", "(seed 2)", 'name = "seed-0"'):
        assert text in card_of(folder)
    assert {metric["args"]["seed"] for metric in published(folder)} == {0} and len(shares) == 3
    with pytest.raises(ValueError, match="seed-"):
        write_card(folder, repo_id="us/model")
    # An export of one seed has its weights and run.json, but the results of all seeds.
    shutil.copytree(folder / "seed-1", tmp_path / "one")
    shutil.copytree(folder / "results", tmp_path / "one" / "results")
    write_card(tmp_path / "one", repo_id="us/model")
    assert mean in card_of(tmp_path / "one") and find_differences_between_card_and_files(tmp_path / "one") == []
    assert {metric["args"]["seed"] for metric in published(tmp_path / "one")} == {1}


def test_separate_runs_of_seeds_have_the_card_of_one_run_with_several_seeds(tmp_path):
    together = shutil.copytree(SEEDS, tmp_path / "together")
    write_card(together)
    separate = runs_of_seeds(tmp_path / "separate")
    write_card(separate)
    assert find_differences_between_card_and_files(separate) == []
    cards = [card_of(together), card_of(separate)]
    without_files = [re.sub(r"^\| `(seed-\d/)?results/.*\n", "", card, flags=re.MULTILINE) for card in cards]
    assert without_files[0] == without_files[1] and cards[1].count("| `seed-1/results/") == 2


@pytest.mark.parametrize(
    ("model", "metric", "queries", "is_refused"),
    [("baseline", "recall@1", 2.9, False), ("baseline", "recall@1", 4, True), ("capivara", "recall@1", 1, True)],
)  # fmt: skip
def test_repeated_measurements_of_the_base_may_differ_by_few_queries(tmp_path, model, metric, queries, is_refused):
    """Two seeds measure the same figure, and their values differ by the hits of some queries."""
    folder = runs_of_seeds(tmp_path / "seeds")

    def edit(content: dict) -> None:
        record = next(r for r in content["records"] if (r["model"], r["metric"]) == (model, metric))
        change_of_value = queries / record["n"]
        if record["value"] + change_of_value > 1:
            change_of_value = -change_of_value
        other = {**record, "value": record["value"] + change_of_value}
        content["records"].append(other) if model == "capivara" else record.update(other)

    change(next((folder / "seed-2" / "results").glob("*_pt.json")), edit)
    with pytest.raises(ValueError, match=r"Remove the result file") if is_refused else contextlib.nullcontext():
        assert len(collect_run_metadata(folder)["runs"]) == 3


def test_an_unfinished_run_is_not_taken_for_a_seed(tmp_path):
    folder = shutil.copytree(SEEDS, tmp_path / "seeds")
    partial = shutil.copytree(folder / "seed-2", folder / "seed-3.partial")
    change(partial / "run.json", lambda run: run.update(seed=3))
    write_json(partial / "results" / "half.json", {"records": []})
    assert [run["seed"] for run in collect_run_metadata(folder)["runs"]] == [0, 1, 2]
    (partial / RUN_MARKER).touch()
    with pytest.raises(ValueError, match=r"seed-3\.partial.*--resume auto"):
        collect_run_metadata(partial)


@pytest.mark.slow
def test_only_models_and_datasets_from_the_hub_get_ids_and_revisions(run):
    """The run is changed as if base and Portuguese data had been loaded from the Hub."""

    def set_hub_ids(content):
        content["origins"]["model"] |= {"hub_id": "laion/base", "revision": COMMIT, "title": "laion/base"}
        content["origins"]["datasets"][0] |= {"hub_id": HUB_DATA, "revision": COMMIT}
        content["origins"]["evaluation_dataset"] |= {"name": HUB_DATA}

    def revisions() -> set:
        write_card(run)
        assert find_differences_between_card_and_files(run) == []
        return {r["dataset"].get("revision") for r in split_card(card_of(run))[0]["model-index"][0]["results"]}

    change(run / "run.json", set_hub_ids)
    change(results_of(run), lambda results: [record.update(dataset=HUB_DATA) for record in results["records"]])
    change(results_of(run), lambda results: results.update(dataset_revision=COMMIT))
    assert revisions() == {COMMIT, None}
    data, body = split_card(card_of(run))
    assert (data["base_model"], data["datasets"]) == ("laion/base", [HUB_DATA])
    assert f"https://huggingface.co/datasets/{HUB_DATA}" in body
    change(results_of(run), lambda results: results.update(dataset_revision=None))  # as the trainer writes it
    hub_metadata = {"hub_id": HUB_DATA, "revision": COMMIT}
    change(run / "run.json", lambda content: content["origins"]["evaluation_dataset"].update(hub_metadata))
    assert revisions() == {COMMIT, None}
    change(results_of(run), lambda results: results.update(dataset_fingerprint="of other data"))
    assert revisions() == {None}


@pytest.mark.slow
def test_a_license_can_be_stated_only_if_base_and_data_leave_it_open(run, tmp_path):
    with pytest.raises(ValueError, match=r"cc-by-sa-4\.0.*\bmit\b"):
        write_card(run, license="mit")
    change(run / "run.json", lambda content: content["origins"].update(license=None))
    write_card(run)
    assert "license" not in split_card(card_of(run))[0] and "No license is stated" in card_of(run)
    main(["--model", str(run), "--license", "cc-by-4.0"])
    text = card_of(run)
    assert split_card(text)[0]["license"] == "cc-by-4.0" and find_differences_between_card_and_files(run) == []
    assert "licensed **`cc-by-4.0`**, as stated by its publisher" in text and "No license is stated" not in text
    write_card(run, language="pt", license="cc-by-4.0")
    assert (
        "sob a licença **`cc-by-4.0`**, indicada por quem o publica" in card_of(run)
        and find_differences_between_card_and_files(run) == []
    )
    (run / "README.md").write_text(text.replace("cc-by-4.0", "mine"), encoding="utf-8")
    assert "'mine'" in find_differences_between_card_and_files(run)[0]


def test_a_model_of_a_non_commercial_base_gets_no_other_license(run):
    """If base and data determine no license, the publisher states one, which must forbid what the base forbids."""

    def state_licenses(content):
        content["origins"]["license"] = None
        content["origins"]["model"] |= {"title": "facebook/metaclip-2", "licenses": ["cc-by-nc-4.0"]}

    change(run / "run.json", state_licenses)
    for license in ("mit", "cc-by-sa-4.0"):
        with pytest.raises(ValueError, match=rf"\b{license}\b.*facebook/metaclip-2.*\bcc-by-nc-4\.0\b"):
            write_card(run, license=license)
    write_card(run, license="cc-by-nc-sa-4.0")
    assert (
        split_card(card_of(run))[0]["license"] == "cc-by-nc-sa-4.0"
        and find_differences_between_card_and_files(run) == []
    )
    (run / "README.md").write_text(card_of(run).replace("cc-by-nc-sa-4.0", "mit"), encoding="utf-8")
    assert any("mit" in fault for fault in find_differences_between_card_and_files(run))


@pytest.mark.parametrize("language", ["en", "pt"])
def test_a_card_of_a_model_for_spanish_has_no_portuguese_examples(run, language):
    change(run / "run.json", lambda content: content["config"].update(language="es", eval_languages=["es", "en"]))
    text = str(render_card(collect_run_metadata(run) | {"formats": [*FORMAT_FILES]}, language))
    assert not re.findall("quadrado|céu|gato|praia|vermelho|verde|imagem de cor|foto.jpg|Bra[sz]il", text)
    example, place = {
        "en": ("a text in Spanish", "common\n  where Spanish is spoken but"),
        "pt": ("um texto em espanhol", "comum\n  onde se fala espanhol, mas"),
    }[language]
    assert text.count(f'["{example}", ') == 3 and place in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(code)


def card_with(run, config: dict, **origins) -> str:
    """Change `config` and `origins` of a run, and return its new card."""

    def edit(content: dict) -> None:
        content["config"] |= config
        content["origins"] |= origins

    change(run / "run.json", edit)
    write_card(run)
    assert find_differences_between_card_and_files(run) == []
    return card_of(run)


@pytest.mark.slow
def test_settings_without_effect_are_left_out_of_a_card(run):
    text = card_with(run, {"weight_decay": 0.2, "caption_strategy": "none"})
    assert not [key for key in ("caption_count", "lora_alpha", "max_bad_share") if f"`{key}" in text]
    text = card_with(run, {"caption_strategy": "first"})
    assert "| `caption_count` | `5` |" in text
    assert "| `adam_beta1` | `0.9` |" in text, "a setting that is the same in every run is missing"
    text = card_with(run, {"towers": "both", "lora_rank": 4, "adam_beta2": 0.999})
    # adam_beta2 was a setting in earlier runs.
    assert "Both towers were trained" in text and "| `adam_beta2` | `0.999` |" in text
    assert re.search(r"`lora_modules_to_save` \| .*text\\?_projection", text)


def test_the_license_of_a_teacher_is_stated(run):
    teacher = {"name": "x", "title": "us/teacher", "hub_id": "us/teacher", "licenses": ["cc-by-4.0"]}
    teacher["attribution"] = "By us."
    assert "- Teacher, us/teacher: `cc-by-4.0`. By us." in card_with(run, {}, teacher=teacher)


def test_classification_and_linear_probe_get_a_table(run):
    common = {"dataset": "cifar-10", "split": "test", "direction": "", "n": 100, "model_folder": "."}
    common["metric"] = "accuracy"
    rows = [("classification", "pt", "ours", "baseline", 0.5), ("classification", "pt", "ours", "capivara", 0.45)]
    rows += [("linear_probe", "", "16 shots", "capivara", 0.75)]
    records = [
        {**common, "task": task, "language": language, "protocol": protocol, "model": model, "value": value}
        for task, language, protocol, model, value in rows
    ]
    other_results = json.loads(results_of(run).read_text(encoding="utf-8"))
    (run / "results" / "cifar.json").write_text(json.dumps({**other_results, "records": records}), encoding="utf-8")
    write_card(run)
    text = card_of(run)
    assert "| `cifar-10` | `ours` | accuracy | 100 | **50.00** | 45.00 | -5.00 |" in text
    assert "| `cifar-10` | `16 shots` | accuracy | 100 | – | 75.00 | – | – |" in text
    assert "The model is worse than the baseline on:\n  - accuracy, `cifar-10`, `ours`: 45.00, baseline 50.00" in text
    assert find_differences_between_card_and_files(run) == []


@pytest.mark.parametrize("ranks", [{"baseline": 9.0, "capivara": 3.0}, {"baseline": 3.0, "capivara": 9.0}])
def test_the_lower_median_rank_is_the_better_one(run, ranks):
    def edit(results):
        for record in results["records"]:
            if (record["metric"], record["direction"]) == ("median_rank", "text_to_image"):
                record["value"] = ranks[record["model"]]

    change(results_of(run), edit)
    run_metadata = collect_run_metadata(run)
    pairs = [pair for group in run_metadata["groups"] for pair in group["pairs"] if pair["metric"] == "median_rank"]
    (pair,) = (p for p in pairs if (p["language"], p["direction"]) == ("pt", "text_to_image"))
    assert pair["is_worse"] == (ranks["capivara"] == 9.0)
    shown = [f"**{rank:.1f}**" if rank == 3.0 else f"{rank:.1f}" for rank in ranks.values()]
    assert f"| {shown[0]} | {shown[1]} |" in str(render_card(run_metadata, "en"))


def test_parameters_of_all_shards_are_counted(run):
    parameters, tensors = collect_run_metadata(run)["parameters"], load_file(run / "model.safetensors")
    assert parameters == sum(tensor.size for tensor in tensors.values())
    (run / "model.safetensors").unlink()
    for number in (1, 2):
        part = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 2]}
        save_file(part, run / f"model-{number:05d}-of-00002.safetensors")
    assert collect_run_metadata(run)["parameters"] == parameters


@pytest.mark.slow
def test_files_of_other_formats_add_code_examples_to_the_card(run):
    names = ("open_clip_config.json", "open_clip_model.safetensors", "modules.json", "onnx/text_model.onnx")
    for name in (*names, "onnx/vision_model.onnx"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    graphs = {"text_model.onnx": {"bytes": 2_500_000, "largest_difference": 2e-7}}
    graphs |= {"text_model_quantized.onnx": {"bytes": 700_000, "lowest_cosine": 0.9974}}
    (run / "onnx" / "quantisation.json").write_text(json.dumps({"graphs": graphs}), encoding="utf-8")
    assert find_differences_between_card_and_files(run), "a card that is older than these files must be a fault"
    write_card(run, repo_id="us/model")
    data, body = split_card(card_of(run))
    assert {"open_clip", "sentence-transformers", "onnx"} <= set(data["tags"])
    assert 'name = "hf-hub:us/model"' in body and 'SentenceTransformer("us/model", trust_remote_code=True)' in body
    assert 'snapshot_download("us/model"' in body and "# model" in body
    assert "| `onnx/text_model.onnx` | 2.5 MB | 2.0e-07 | – |" in body and "| 0.7 MB | – | 0.9974 |" in body
    write_card(run)
    assert 'name = "local-dir:."' in card_of(run) and find_differences_between_card_and_files(run) == []
