"""Translation of captions: each distinct sentence once, with any number of tasks and every backend."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from caption_tars import picture, saved_train
from datasets import Dataset, DatasetDict, Image, Value
from google_server import KEY, google_service, translated
from seq2seq_models import m2m100_folder, marian_folder

from capivara_common.files import read_json
from caption_data.rows import CAPTIONS_FEATURE
from caption_data.sources import open_split
from captions.stages import check_stage_and_count_rows
from captions.translate import main
from captions.translation_memory import TranslationMemory
from captions.translation_tables import unescape_cell

ROOT = Path(__file__).resolve().parent.parent
ROWS = 24
LONG = " ".join(f"Cat {i} sits on mat {i}." for i in range(430))  # more than 10,000 characters
NASTY = 'it\'s "a cat"\ton a mat\r\nand \\n a dog\u2028'


def rows() -> list[dict]:
    """Make rows whose sentences mostly occur several times, in both columns; some have special characters."""
    return [
        {
            "captions-en": [f"a photo of thing {i % 7}"] + ["a cat on a mat"] * (i % 2),
            "generated-captions-en": [f"thing {i} in a park", f"a photo of thing {i % 5}", ["", NASTY, LONG][i % 3]],
        }
        for i in range(ROWS)
    ]


def distinct() -> set[str]:
    return {text for row in rows() for column in row.values() for text in column if text}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """A saved dataset with English captions."""
    features = {
        "image": Image(),
        "id": Value("int32"),
        "captions-en": CAPTIONS_FEATURE,
        "generated-captions-en": CAPTIONS_FEATURE,
    }
    columns = [[row[name] for row in rows()] for name in list(features)[2:]]
    return saved_train(
        tmp_path_factory.mktemp("translate") / "data", features, map(picture, range(ROWS)), range(ROWS), *columns
    )


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    with google_service() as service:
        yield service


def google_flags(service, dataset: str, output: Path, *more: str) -> list[str]:
    return [
        *("--dataset", dataset, "--output", str(output), "--language", "pt", "--backend", "google"),
        *("--google_endpoint", service.url, "--batch_rows", "3", "--rows_per_part", "6", "--batch_size", "4", *more),
    ]


def written(output: Path) -> list[dict]:
    return list(open_split(str(output), "train", "image").rows())


def check_rows(output: Path, language: str = "pt") -> None:
    """Check that all rows are written once, in order, with their images and all translations in their positions."""
    result, expected = written(output), rows()
    assert [row["id"] for row in result] == list(range(ROWS))
    for number, (row, source) in enumerate(zip(result, expected, strict=True)):
        assert row["image"]["bytes"] == picture(number)
        for column, texts in source.items():
            assert row[column] == texts, "existing captions do not change"
            for text, translation in zip(texts, row[column.removesuffix("en") + language], strict=True):
                if text == LONG:  # translated in pieces, each of which is reversed
                    assert len(translation.replace(f"{language}: ", "")) == pytest.approx(len(LONG), abs=3)
                else:
                    assert translation == (translated(text, language) if text else "")


@pytest.mark.slow
def test_each_distinct_sentence_is_translated_once(service, dataset, tmp_path, capsys):
    main(google_flags(service, dataset, tmp_path / "pt", "--tasks", "3", "--rows_per_part", "1"))
    check_rows(tmp_path / "pt")
    sent = Counter(service.sentences())
    assert set(sent.values()) == {1}
    assert {text for text in sent if text in distinct()} == distinct() - {LONG}, "the long sentence is sent in pieces"
    assert "24 rows written, 0 skipped" in capsys.readouterr().out
    main(google_flags(service, dataset, tmp_path / "again", "--memory", str(tmp_path / "pt.memory")))
    check_rows(tmp_path / "again")
    assert Counter(service.sentences()) == sent, "another run with the same memory sends nothing"
    main(google_flags(service, dataset, tmp_path / "es", "--memory", str(tmp_path / "pt.memory"), "--language", "es"))
    check_rows(tmp_path / "es", "es")
    assert len(service.sentences()) == 2 * sum(sent.values()), "another language is another translation"


@pytest.mark.slow
def test_logs_of_failed_tasks_do_not_contain_the_key(service, dataset, tmp_path):
    """Google refuses requests of two processes: logs, failures and outputs contain the reason, but not the key."""
    flags = google_flags(service, dataset, tmp_path / "pt", "--workers", "2", "--rows_per_part", "2")
    service.faults[:] = ["none", *[403] * 20]
    command = [sys.executable, "-m", "captions.translate", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "task 0: " in done.stderr and "task 1: " in done.stderr and "403" in done.stderr
    written_down = [path.read_text(errors="replace") for path in (tmp_path / "pt.logs").rglob("*") if path.is_file()]
    assert not [text for text in [done.stdout, done.stderr, *written_down] if KEY in text]


def test_the_memory_separates_translators_and_names_damaged_files(tmp_path):
    nasty = {"quotes \"' and \0 \t\n": "ção 🦫", "x" * 10_000: "", "a cat": "um gato"}
    fingerprint = {"backend": "transformers", "model": "marian", "target": "por"}
    memory = TranslationMemory(tmp_path, fingerprint)
    memory.add(nasty)
    memory.add({"a dog": "um cão"})
    again = TranslationMemory(tmp_path, dict(reversed(fingerprint.items())))
    stored = {text: answer.text for text, answer in again.find({*nasty, "a dog", "a fish"}).items()}
    assert stored == nasty | {"a dog": "um cão"}
    assert TranslationMemory(tmp_path, fingerprint | {"beams": 4}).find(set(nasty)) == {}
    (memory.folder / "broken.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ValueError, match=r"broken\.parquet"):
        again.find({"a dog"})


@pytest.mark.slow
def test_a_run_that_google_interrupts_continues(service, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("captions.http_service.MAX_TRIES", 2)
    monkeypatch.setattr("captions.http_service.FIRST_WAIT_S", 0.01)
    flags = google_flags(service, dataset, tmp_path / "pt")
    service.faults[:] = ["none", 429, "none", "none", 500, "none", "none", 503, 503]
    with pytest.raises(OSError, match=r"\b2 times.*503") as caught:
        main(flags)
    assert KEY not in str(caught.value)
    main(flags)
    check_rows(tmp_path / "pt")
    assert sum(service.answered.values()) == len(service.answered), "no translated sentence is sent again"


def test_languages_and_keys_are_refused_before_any_work(service, dataset, tmp_path, monkeypatch):
    for flags, message in [
        (["--language", "kk"], r"'kk'.*\b9\b"),
        (["--language", "p!t"], "language.*'p!t'"),
        (["--language", "en"], "'en'"),
    ]:
        with pytest.raises(ValueError, match=message):
            main(google_flags(service, dataset, tmp_path / "pt", *flags))
    monkeypatch.setenv("GOOGLE_API_KEY", "wrong")
    with pytest.raises(ValueError, match=r"<key>"):
        main(google_flags(service, dataset, tmp_path / "pt"))
    monkeypatch.delenv("GOOGLE_API_KEY")
    with pytest.raises(ValueError, match="GOOGLE_API_KEY"):
        main(google_flags(service, dataset, tmp_path / "pt"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="--tasks"):
        main(google_flags(service, dataset, tmp_path / "pt"))
    assert service.requests == [] and [path.name for path in tmp_path.iterdir()] == ["pt.logs"]


# Models


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["marian", "m2m100"])
def test_a_model_translates_a_dataset(dataset, tmp_path, kind, capsys):
    model = marian_folder(tmp_path / "m" / "model") if kind == "marian" else m2m100_folder(tmp_path / "m" / "model")
    flags = ["--dataset", dataset, "--output", str(tmp_path / "xh"), "--language", "xh", "--model", str(model)]
    flags += ["--max_new_tokens", "4", "--batch_size", "16", "--rows_per_part", "10"]
    main([*flags, "--tasks", "2"])
    translated_rows = written(tmp_path / "xh")
    assert [row["id"] for row in translated_rows] == list(range(ROWS))
    for row in translated_rows:
        for column in ("captions", "generated-captions"):
            assert len(row[f"{column}-xh"]) == len(row[f"{column}-en"])
    pairs = {pair for row in translated_rows for pair in zip(row["captions-en"], row["captions-xh"], strict=True)}
    assert len(pairs) == 8, "each sentence has one translation"
    assert check_stage_and_count_rows(tmp_path / "xh").rows == ROWS
    assert "translations look wrong" in capsys.readouterr().out


# Tables


def file_flags(dataset: str, output: Path, *more: str) -> list[str]:
    return [
        *("--dataset", dataset, "--output", str(output), "--language", "yo", "--backend", "file"),
        *("--batch_rows", "3", "--rows_per_part", "6", *more),
    ]


@pytest.mark.slow
def test_a_table_is_written_filled_and_read(dataset, tmp_path, caplog):
    table = tmp_path / "yo.tsv"
    main(file_flags(dataset, tmp_path / "yo", "--import", str(table)))
    assert f"{len(distinct())} sentences" in caplog.text and not (tmp_path / "yo").exists()
    head, *lines = table.read_text(encoding="utf-8").split("\n")[:-1]
    assert {unescape_cell(line.split("\t")[1]) for line in lines} == distinct()
    main(file_flags(dataset, tmp_path / "yo", "--import", str(table)))
    assert "34 of 34 " in caplog.text and head in table.read_text(encoding="utf-8")
    filled = [line + "yo: " + line.split("\t")[1] for line in lines]
    table.write_text("\n".join([head, *filled]) + "\n", encoding="utf-8")
    main(file_flags(dataset, tmp_path / "yo", "--import", str(table), "--tasks", "2"))  # all tasks read the same table
    for row, source in zip(written(tmp_path / "yo"), rows(), strict=True):
        for column, texts in source.items():
            assert row[column.removesuffix("en") + "yo"] == [text and f"yo: {text}" for text in texts]

    table.write_text("\n".join([head, *filled[:2], *filled[3:], filled[0]]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"yo\.tsv, line 4: .*\bs3_\w+ .*\bs4_\w+ "):
        main(file_flags(dataset, tmp_path / "other", "--import", str(table)))
    assert not (tmp_path / "other").exists()


def test_a_corrected_cell_changes_only_its_part(dataset, tmp_path):
    """Only the files with a changed row are written again; with another setting the folder is refused, unchanged."""
    table = tmp_path / "yo.tsv"
    flags = file_flags(dataset, tmp_path / "yo", "--import", str(table))
    main(flags)
    filled = table.read_text(encoding="utf-8").replace("\t\n", "\told\n")
    table.write_text(filled, encoding="utf-8")
    main(flags)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "yo").glob("*.parquet")}
    table.write_text(filled.replace("thing 7 in a park\told", "thing 7 in a park\tnew"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"settings\.drop_flagged: False .*True"):
        main([*flags, "--drop_flagged"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    main(flags)
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == ["train-000000006-000000012.parquet"]
    cells = [text for row in written(tmp_path / "yo") for text in row["generated-captions-yo"]]
    assert cells.count("new") == 1 and "new" in written(tmp_path / "yo")[7]["generated-captions-yo"]


def test_a_table_states_its_languages_and_its_source(dataset, tmp_path):
    """A table of another language, of no stated language or of other data is refused before anybody fills it."""
    table, flags = tmp_path / "table.tsv", file_flags(dataset, tmp_path / "yo", "--import", str(tmp_path / "table.tsv"))
    main(flags)
    head, *lines = table.read_text(encoding="utf-8").split("\n")
    digest, source, target = head.split("\t")
    assert (source, target) == ("source:en", "translation:yo") and len(digest.removeprefix("id:")) >= 16
    for wrong in ("id\tsource\ttranslation", f"{digest}\tsource:en\ttranslation:sw", f"{digest}\tsource:fr\t{target}"):
        table.write_text("\n".join([wrong, *(line and f"{line}x" for line in lines)]), encoding="utf-8")
        with pytest.raises(ValueError, match=r"table\.tsv"):
            main(flags)
        assert not (tmp_path / "yo").exists()
    table.write_text("\n".join([head.replace(digest, "id:0123456789abcdef"), *lines]), encoding="utf-8")
    main(flags)  # another dataset with the same sentences is accepted
    table.write_text("\n".join([head.replace(digest, "id:0123456789abcdef"), *lines[1:]]), encoding="utf-8")
    with pytest.raises(ValueError, match="0123456789abcdef"):
        main(flags)


@pytest.mark.parametrize("language", ["swahili", "zz"])
def test_an_invalid_language_code_is_refused(dataset, tmp_path, language):
    with pytest.raises(ValueError, match=f"'{language}'"):
        main(["--dataset", dataset, "--output", str(tmp_path / "out"), "--language", language, "--model", "m"])


# Quality, columns, errors


@pytest.mark.slow
def test_flagged_translations_are_counted_shown_and_dropped(dataset, tmp_path, capsys):
    table = tmp_path / "yo.tsv"
    main(file_flags(dataset, tmp_path / "yo", "--import", str(table)))
    lines = table.read_text(encoding="utf-8").split("\n")[:-1]
    wrong = {"a cat on a mat": "a cat on a mat", "thing 3 in a park": "-", "thing 4 in a park": "&amp; кошка кошка"}
    for number, line in enumerate(lines[1:], 1):
        source = unescape_cell(line.split("\t")[1])
        lines[number] += wrong.get(source, line.split("\t")[1][::-1].replace("\\", "/"))
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    main(file_flags(dataset, tmp_path / "kept", "--import", str(table)))
    report = read_json(tmp_path / "kept" / "quality.json")
    counts = {flag: kind["captions"] for flag, kind in report["flags"].items() if kind["captions"]}
    assert counts == {"copy": ROWS // 2, "empty": 1, "markup": 1, "wrong script": 1}
    assert report["flagged"] == ROWS // 2 + 2
    example = {"source": "thing 3 in a park", "translation": "-"}
    assert report["flags"]["empty"]["examples"] == [example]
    assert "12  copy" in capsys.readouterr().out
    assert written(tmp_path / "kept")[3]["generated-captions-yo"][0] == "-"

    main(file_flags(dataset, tmp_path / "dropped", "--import", str(table), "--drop_flagged"))
    dropped = written(tmp_path / "dropped")
    assert [len(row["captions-yo"]) for row in dropped] == [1] * ROWS, "the copies are dropped"
    assert len(dropped[3]["generated-captions-yo"]) == 2
    (flagged,) = [entry for entry in dropped[3]["quality-yo"]["flagged"] if entry["column"].startswith("generated")]
    assert flagged == {"column": "generated-captions-yo", "position": 0, "flags": ["empty"]} | example
    assert read_json(tmp_path / "dropped" / "quality.json")["flags"] == report["flags"]


def test_captions_of_other_names_and_types_are_translated(service, tmp_path):
    """The column is renamed; a caption may be a text, a list, None or a number, and have a lone surrogate."""
    folder = tmp_path / "images"
    folder.mkdir()
    captions = ["a cat", ["a dog", "a cat"], None, "half \ud83e", 7, ["a", 3]]
    lines = []
    for number, caption in enumerate(captions):
        (folder / f"{number}.png").write_bytes(picture(number))
        lines.append(json.dumps({"file_name": f"{number}.png", "caption": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    main(google_flags(service, str(folder), tmp_path / "pt", "--rename", "caption=captions-en"))
    expected = [["a cat"], ["a dog", "a cat"], [], ["half ?"], [], ["a", ""]]
    expected = [[text and translated(text, "pt") for text in texts] for texts in expected]
    assert [row["captions-pt"] for row in written(tmp_path / "pt")] == expected
    assert sorted(service.sentences()) == ["a", "a cat", "a dog", "half ?"]
    assert not check_stage_and_count_rows(tmp_path / "pt").skipped, "other types count as missing"
    with pytest.raises(ValueError, match=r"captions-en.*generated-captions-en.*--rename OLD=capt"):
        main(google_flags(service, str(folder), tmp_path / "other"))


@pytest.mark.parametrize("column", ["captions-pt", "similarities-pt"])
def test_existing_translations_are_not_replaced(service, tmp_path, column):
    data = {
        "image": [{"bytes": picture(0), "path": None}],
        "captions-en": [["a cat"]],
        column: [["um gato"] if "cap" in column else [0.5]],
    }
    DatasetDict(train=Dataset.from_dict(data)).save_to_disk(tmp_path / "data")
    flags = google_flags(service, str(tmp_path / "data"), tmp_path / "pt")
    with pytest.raises(ValueError, match=f"{column}.*--rename {column}=old-"):
        main(flags)
    main([*flags, "--rename", f"{column}=old-{column}"])
    assert {f"old-{column}", "captions-pt"} <= written(tmp_path / "pt")[0].keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backend", "file"], "--import"),
        (["--import", "x.tsv"], "--backend file"),
        (["--language", "hi"], "--model.*en to hi"),
        (["--num_beams", "5"], "--num_beams"),
    ],
)
def test_invalid_flags_are_refused(dataset, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        main(["--dataset", dataset, "--output", str(tmp_path / "pt"), "--language", "pt", *flags])
