"""Texts from configs and data are escaped in a card (Markdown, HTML and YAML). Paths and secrets are refused."""

import contextlib
import shutil
from pathlib import Path

import pytest
from card_run import change, split_card, trained_run

from hub_upload.card import find_differences_between_card_and_files, write_card
from hub_upload.card_values import escape_value_for_markdown, format_as_markdown_code_or_escaped_text
from hub_upload.licenses import infer_license
from hub_upload.origins import read_origin_card_metadata

HOSTILE = (
    "</table><script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "a\nlicense: mit\n---\n# New",
    "| a | b |",
    "`code` **bold** <!-- hidden -->",
    "{{ 7 * 7 }} {% raw %}",
    "<img src=x onerror=alert(1)>",
    "\ue000 1\ue001run.json\ue002\u202e",
    "![x](http://127.0.0.1:1/spy.png)",
)


def markdown():
    """Return a Markdown renderer that does not filter HTML, the worst case."""
    return pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_escaped(text):
    reader = markdown()
    for written in (escape_value_for_markdown(text), format_as_markdown_code_or_escaped_text(text)):
        assert "\n" not in written
        tokens = [t.type for t in reader.parseInline(written)[0].children]
        assert set(tokens) <= {"text", "text_special", "code_inline"}, written
        assert [t.type for t in reader.parse(f"| a | {written} |\n|---|---|\n")].count("th_open") == 2, written


def test_escaping_keeps_urls_and_drops_folders():
    assert escape_value_for_markdown("/home/ana/pairs and ~/x/y, C:\\Users\\ana\\z") == "pairs and y, z"
    assert escape_value_for_markdown("https://example.org/a/b") == "https://example.org/a/b"
    assert (
        escape_value_for_markdown("São João é o que há") == "São João é o que há"
        and escape_value_for_markdown("- item") == "\\- item"
    )
    assert len(escape_value_for_markdown("a" * 1000)) == 300
    assert (
        format_as_markdown_code_or_escaped_text("captions-pt") == "`captions-pt`"
        and format_as_markdown_code_or_escaped_text("a`b") == "a\\`b"
    )


@pytest.mark.slow
def test_a_secret_or_a_path_of_a_machine_is_refused(tmp_path_factory, tiny_dataset_folder, tiny_processor, tmp_path):
    """An invisible character hides them from the check of the file, but the card is checked without it."""
    trained = trained_run(tmp_path_factory, tiny_dataset_folder, tiny_processor)
    for text, message in ((r"\\server\runs\ana", "server"), (f"hf_{'a' * 34}", "hf_")):
        run, hidden = tmp_path / message, f"{text[:5]}\u200b{text[5:]}"
        shutil.copytree(trained, run)
        change(run / "run.json", lambda run, title=hidden: run["origins"]["evaluation_dataset"].update(title=title))
        with pytest.raises(ValueError, match=message):
            write_card(run)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, tiny_dataset_folder, tiny_processor):
    """A run in which all texts are hostile."""
    run = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(trained_run(tmp_path_factory, tiny_dataset_folder, tiny_processor), run)
    texts = list(HOSTILE)

    def edit(content):
        content["device"], content["config"]["caption_strategy"] = texts[0], texts[1]
        content["config"]["language"] = content["config"]["eval_languages"][0] = texts[2]
        content["versions"] = {texts[3]: texts[4]}
        content["skipped_rows"] = {texts[5]: 3}
        for origin_of in (content["origins"]["model"], content["origins"]["datasets"][0]):
            origin_of |= {"title": texts[0], "licenses": [texts[2], texts[1]], "attribution": texts[6]}
            origin_of |= {"hub_id": texts[1], "base_model": [texts[2]]}
        content["origins"] |= {"license": texts[2], "teacher": dict(content["origins"]["model"])}
        content["config"] |= {"optimizer": texts[1], "mixed_precision": texts[2], "lora_targets": texts[0]}

    change(run / "run.json", edit)
    for path, text in zip(sorted((run / "results").glob("*.json")), (texts[0], texts[2]), strict=True):
        change(path, lambda r, text=text: [record.update(dataset=text, protocol=text) for record in r["records"]])
        change(path, lambda r, text=text: [record.update(split=text, language=text) for record in r["records"]])
    return run


@pytest.mark.parametrize("language", ["en", "pt"])
def test_hostile_texts_change_neither_front_matter_nor_markup_of_a_card(hostile, tmp_path, language):
    shutil.copytree(hostile, tmp_path / "run")
    write_card(tmp_path / "run", language=language)
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    data, body = split_card(text)
    blocks = markdown().parse(body)
    tokens = {token.type for block in blocks for token in (block, *(block.children or ()))}
    assert find_differences_between_card_and_files(tmp_path / "run") == [] and "html_inline" not in tokens
    assert [block.content.strip() for block in blocks if block.type == "html_block"] == [text.split("\n")[-1]]
    assert not {"license", "base_model", "datasets"} & set(data) and "<script" not in body
    assert "alert(1)" in body and "{{ 7 \\* 7 }}" in body and "# New" not in body.split("\n")


@pytest.mark.parametrize(
    ("stated", "license"),
    [
        ([["mit"], ["cc-by-sa-4.0"]], "cc-by-sa-4.0"),
        ([["mit"], ["mit"]], "mit"),
        ([["mit"], []], None),
        ([["mit"], ["apache-2.0"]], None),
        ([["cc-by-nc-4.0"], ["cc-by-sa-4.0"]], None),
        ([["mit"], ["mit", "cc-by-4.0"]], "cc-by-4.0"),
        ([["cc-by-nc-4.0"], ["mit"], ["cc-by-4.0"]], "cc-by-nc-4.0"),
        ([["cc-by-nc-4.0"], ["cc-by-nc-sa-4.0"]], None),
    ],
)
def test_the_most_restrictive_license_is_inherited(stated, license):
    assert infer_license(stated) == license


def test_origins_are_read_from_the_cards_of_base_and_data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text(
        "---\nlicense: [mit, cc-by-4.0]\nbase_model: owner/base\n---\n\n# Pairs\n", encoding="utf-8"
    )
    origin = read_origin_card_metadata(str(tmp_path / "data"), "dataset")
    assert origin["licenses"] == ["mit", "cc-by-4.0"] and origin["base_model"] == ["owner/base"]
    assert (origin["title"], origin["hub_id"], origin["attribution"]) == ("Pairs", None, None)
    (tmp_path / "data" / "train.parquet").touch()
    for files in ("*.tar", "train.parquet"):  # the card is in the same folder
        assert read_origin_card_metadata(str(tmp_path / "data" / files), "dataset")["licenses"] == [
            "mit",
            "cc-by-4.0",
        ], files
    with contextlib.chdir(tmp_path / "data"):
        assert read_origin_card_metadata("emoji", "dataset")["licenses"] == [], (
            "a Hub id must not be taken for a local file"
        )
    (tmp_path / "data" / "README.md").write_bytes(b"---\nlicense: mit\n---\n# \xff\n")
    assert read_origin_card_metadata(str(tmp_path / "data"), "dataset")["licenses"] == ["mit"]
    unknown = read_origin_card_metadata("owner/not-in-the-cache", "dataset")  # tests have no network
    assert unknown["hub_id"] is None and unknown["licenses"] == [] and unknown["title"] == "owner/not-in-the-cache"
    assert read_origin_card_metadata("shards/*.tar", "dataset")["hub_id"] is None
    assert read_origin_card_metadata("/srv/ana/data", "dataset")["name"] == "data", (
        "the name of a person's folder must not be published"
    )
    assert read_origin_card_metadata("../ana/data", "dataset")["name"] == "data"
    assert read_origin_card_metadata(f"{Path.cwd()}/data/openmoji/base", "model")["name"] == "openmoji/base"
