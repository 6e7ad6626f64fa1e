"""The text teacher: what it reads, that it is embedded once, and that a run with it resumes to the same bits."""

import copy
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, Features, Image, Value, load_from_disk
from safetensors.torch import load_file
from test_train_accelerate import flags
from tiny import tiny_config

import train_accelerate
from caption_data.embedding_cache import cache_key
from caption_data.parallel_text import check_no_leak, parallel_table
from caption_data.selection import CaptionChoice, taught_captions
from modeling_capivara import CapivaraModel
from modeling_capivara.embedding import embed_texts
from training.arguments import parse_arguments
from training.data import Planner, training_splits
from training.inputs import teacher_root
from training.loop import Trainer
from training.matryoshka import save_rotation
from training.teacher import Teacher, TeacherTexts

ALONE = {"dataset": "", "text_teacher": "base", "parallel_text": "x", "evaluation_dataset": "d"}  # no pictures
PAIRS = [{"pt": f"pedra {i}", "en": f"a stone {i}"} for i in range(9)]


def arguments(dataset="d", **values):
    given = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return parse_arguments(["--model", "m", *(["--dataset", str(dataset)] if dataset else []), *given], "")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def teacher(tiny_model, tiny_processor):
    return Teacher(tiny_model.eval(), tiny_processor)


# What it reads


def test_the_text_that_a_caption_translates():
    plain, first = CaptionChoice(), CaptionChoice(caption_strategy="all")

    def taught(row, captions, choice=plain):
        return taught_captions(row, captions, "pt", "en", choice)

    row = {"captions-pt": ["um", "dois"], "captions-en": ["one", "two"], "generated-captions-en": ["gen"]}
    assert taught(row, ["dois", "um"]) == ["two", "one"], "columns that the strategy does not use say nothing"
    row |= {"generated-captions-pt": ["três"], "generated-captions-en": ["three"]}
    assert taught(row, ["três", "um"], first) == ["three", "one"]
    uneven = row | {"captions-en": ["one", "two", "more"], "generated-captions-en": ["three"]}
    assert taught(uneven, ["três"], first) == ["three"], "column by column"
    assert taught(uneven, ["um"], first) == ["one", "two", "more", "three"]
    several = {"captions-pt": ["um"], "captions-en": ["one", "", "a", "one"]}
    assert taught(several, ["um"]) == ["one", "a"], "any of the row's, where they are not as many"
    assert taught({"captions-pt": ["a", "b"], "captions-en": ["", "B"]}, ["a"]) == ["B"]
    with pytest.raises(ValueError, match="'en'"):
        taught({"captions-pt": ["um"], "captions-en": [" "]}, ["um"])


def test_training_rows_bring_what_the_teacher_reads(tiny_dataset_folder, tmp_path):
    data = load_from_disk(tiny_dataset_folder)
    rows = data["train"].to_list()
    rows[3]["captions-en"] = []
    DatasetDict(train=Dataset.from_list(rows, features=data["train"].features)).save_to_disk(tmp_path / "d")
    skipped = []
    (split,) = training_splits(arguments(tmp_path / "d", text_teacher="base"), skipped)
    assert split.table[0]["teacher_captions"] == ["the azul 0"] and len(split) == 11
    assert [line.row for line in skipped] == [3] and "teacher" in skipped[0].detail
    with pytest.raises(ValueError, match="no column 'captions-fr'; there are"):
        training_splits(arguments(tmp_path / "d", text_teacher="base", teacher_language="fr"), [])


def test_parallel_text_in_all_its_forms(tmp_path):
    lines(tmp_path / "a.jsonl", PAIRS)
    Dataset.from_list(PAIRS).to_csv(tmp_path / "a.csv")
    Dataset.from_list(PAIRS).to_parquet(tmp_path / "a.parquet")
    DatasetDict(train=Dataset.from_list([{"translation": row} for row in PAIRS])).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.csv", "a.parquet", "saved"):
        table = parallel_table(str(tmp_path / name), "pt", "en", skipped := [])
        assert table[1]["captions"] == ["pedra 1"] and table[1]["teacher_captions"] == ["a stone 1"] and not skipped
        assert len(table) == 9


def test_pictures_of_parallel_text_are_not_opened(tmp_path):
    """`datasets` would open any path, and fetch any address."""
    elsewhere = {"bytes": None, "path": str(lines(tmp_path / "elsewhere.png", []))}
    features = Features({"pt": Value("string"), "en": Value("string"), "picture": Image()})
    rows = Dataset.from_list([row | {"picture": elsewhere} for row in PAIRS], features=features)
    DatasetDict(train=rows).save_to_disk(tmp_path / "beside")
    sides = Dataset.from_list([{"pt": elsewhere, "en": "a"}], features=Features({"pt": Image(), "en": Value("string")}))
    DatasetDict(train=sides).save_to_disk(tmp_path / "side")
    (tmp_path / "elsewhere.png").unlink()  # to open it would fail
    assert len(parallel_table(str(tmp_path / "beside"), "pt", "en", [])) == 9
    with pytest.raises(ValueError, match="no usable pair"):
        parallel_table(str(tmp_path / "side"), "pt", "en", [])


def test_bad_parallel_text(tmp_path):
    text = Dataset.from_list([{"translation": "pedra"}])
    DatasetDict(train=text).save_to_disk(tmp_path / "text")
    with pytest.raises(ValueError, match="must hold a text for each language"):
        parallel_table(str(tmp_path / "text"), "pt", "en", [])
    with pytest.raises(ValueError, match="is empty"):
        parallel_table(str(lines(tmp_path / "nothing.jsonl", [])), "pt", "en", [])
    bad = [{"pt": "", "en": "x"}, {"pt": "y", "en": None}, {"pt": "Piano ", "en": "piano"}]
    table = parallel_table(str(lines(tmp_path / "b.jsonl", [*PAIRS, *bad])), "pt", "en", skipped := [])
    assert len(table) == 9 and [line.row for line in skipped] == [9, 10, 11]
    assert "'pt' is empty" in skipped[0].detail and "both sides are 'Piano '" in skipped[2].detail
    with pytest.raises(ValueError, match="no usable pair of sentences among 3 rows"):
        parallel_table(str(lines(tmp_path / "c.jsonl", bad)), "pt", "en", [])
    with pytest.raises(ValueError, match=r"no column 'xh'; there are \['pt', 'en'\]"):
        parallel_table(str(tmp_path / "b.jsonl"), "xh", "en", [])
    with pytest.raises(ValueError, match="does not exist"):
        parallel_table(str(tmp_path / "none.jsonl"), "pt", "en", [])
    with pytest.raises(ValueError, match="must end in one of"):
        parallel_table(str(lines(tmp_path / "b.txt", PAIRS)), "pt", "en", [])


@pytest.mark.parametrize("caption", ["Pedra  4", "A stone 4", "PEDRA\u00a04"])
def test_a_caption_that_is_measured_on_is_refused_and_named(tmp_path, caption):
    table = parallel_table(str(lines(tmp_path / "a.jsonl", PAIRS)), "pt", "en", [])
    check_no_leak(table, "a.jsonl", {"the split 'test'": [["gato"], ["casa"]]})
    named = r"(stone|pedra) 4', row 4 of a\.jsonl, is a caption of the split 'test'"
    with pytest.raises(ValueError, match=named):
        check_no_leak(table, "a.jsonl", {"the split 'test'": [["gato"], ["casa", caption]]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"anchor_share": 0.5}, "anchor_share needs a teacher"),
        ({"parallel_text": "x.jsonl"}, "parallel_text needs a teacher"),
        ({"text_teacher": "base", "teacher_weight": -1}, "teacher_weight"),
        ({"text_teacher": "base", "teacher_weight": "nan"}, "teacher_weight"),
        ({"text_teacher": "base", "anchor_share": 1}, "anchor_share below 1"),
        ({"text_teacher": "base", "teacher_language": "pt"}, "teacher_language is 'pt', the language that is trained"),
        ({"text_teacher": "base", "parallel_text": "x", "teacher_weight": 0}, "teacher_weight is 0"),
        ({"text_teacher": "base", "parallel_text": "x", "parallel_batch_size": 1}, "parallel_batch_size"),
        ({"dataset": "", "text_teacher": "base", "parallel_text": "x"}, "needs an --evaluation_dataset"),
        (ALONE | {"prepare": "openmoji"}, "there are no pictures"),
        (ALONE | {"anchor_share": 0.5}, "there are no pictures"),
        (ALONE | {"hard_negatives": 0.5}, "there are no pictures"),
    ],
)
def test_arguments_that_contradict_one_another(values, message):
    with pytest.raises(ValueError, match=message):
        arguments(**values)


def test_a_teacher_of_another_width(tiny_model, tiny_processor, tmp_path):
    config = tiny_config()
    config.projection_dim = 12
    CapivaraModel(config).save_pretrained(tmp_path / "narrow")
    tiny_processor.save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="narrow are 12 wide, those of the model are 24"):
        Teacher.load(str(tmp_path / "narrow"), tiny_model, tiny_processor)


def test_a_teacher_of_a_turned_space(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "turned")
    tiny_processor.save_pretrained(tmp_path / "turned")
    assert Teacher.load(str(tmp_path / "turned"), tiny_model, tiny_processor)
    save_rotation(torch.eye(24), tmp_path / "turned")
    with pytest.raises(ValueError, match="Give its base"):
        Teacher.load(str(tmp_path / "turned"), tiny_model, tiny_processor)


@pytest.mark.parametrize(
    ("cache", "root"),
    [("auto", "home/teacher_embeddings"), ("mine", "mine/teacher_embeddings"), (".", "teacher_embeddings")],
)
def test_where_its_embeddings_are_kept(cache, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPIVARA_CACHE", "home")
    assert teacher_root(arguments(image_embedding_cache=cache)).as_posix() == root


# Its embeddings


def table_of(texts: list[list[str]]) -> Dataset:
    return Dataset.from_dict({"teacher_captions": texts})


def test_embeddings_are_those_of_the_tower_and_made_once(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("training.teacher.SHARD_TEXTS", 4)
    texts = [["a", "b c"], ["the house"], ["d", "e", "f"], ["stone"]]
    found = TeacherTexts.of(table_of(texts), "teacher_captions")
    found.embed(teacher, tmp_path, Accelerator(cpu=True), "here")
    flat = [text for row in texts for text in row]
    expected = embed_texts(teacher.model, teacher.processor, flat)
    torch.testing.assert_close(found.embeds(np.arange(7)), expected, rtol=0, atol=1e-3)
    assert [found.text(row, number) for row, number in ((0, 1), (2, 5), (3, 6))] == ["b c", "f", "stone"]

    monkeypatch.setattr("training.teacher.embed_texts", None)  # would fail
    TeacherTexts.of(table_of(texts), "teacher_captions").embed(teacher, tmp_path, Accelerator(cpu=True), "here")
    with pytest.raises(TypeError):
        TeacherTexts.of(table_of([*texts, ["new"]]), "teacher_captions").embed(
            teacher, tmp_path, Accelerator(cpu=True), "here"
        )
    changed = Teacher(copy.deepcopy(teacher.model), teacher.processor)
    with torch.no_grad():
        changed.model.text_projection[0].weight.add_(0.1)
    with pytest.raises(TypeError):  # of other weights: made anew
        TeacherTexts.of(table_of(texts), "teacher_captions").embed(changed, tmp_path, Accelerator(cpu=True), "here")
    keys = {cache_key(found._depends_on(teacher, precision)) for precision in ("no", "bf16")}
    assert len(keys) == 2 and found.cache.folder.name in keys


def test_a_plan_draws_the_translation_and_the_anchors(tiny_processor):
    captions = [[f"gato {i}", f"casa {i}"] for i in range(10)]
    english = TeacherTexts.of(table_of([[f"cat {i}", f"house {i}"] for i in range(10)]), "teacher_captions")
    names = TeacherTexts.of(table_of([[f"stone {i}"] for i in range(6)]), "teacher_captions")
    alone = [[f"pedra {i}"] for i in range(6)]
    planner = Planner([captions], [8], tiny_processor, 3, 1, 0, [english, names], 0.25, alone, 4)
    words = {"gato": "cat", "casa": "house", "pedra": "stone", "cat": "cat", "house": "house"}
    for step in range(5):
        plan = planner(step)
        texts = [t for b in plan.batches for t in tiny_processor.batch_decode(b.input_ids, skip_special_tokens=True)]
        taught = [(english, names)[s].text(r, t) for s, r, t in zip(plan.sources, plan.rows, plan.taught, strict=True)]
        assert [f"{words[text.split()[0]]} {text.split()[1]}" for text in texts] == taught
        assert sum(text.split()[0] in ("cat", "house") for text in texts) == 2, "a quarter of eight"
        assert plan.pairs == 8 and plan.sources.tolist() == [0] * 8 + [1] * 4
        assert [(b.index, b.start) for b in plan.batches] == [(0, 0), (1, 3), (2, 6), (3, 8), (4, 11)]
    plain = Planner([captions], [8], tiny_processor, 3, 1, 0)(0)
    assert np.array_equal(np.sort(planner(0).rows[:8]), np.sort(plain.rows)), "the same pairs as without a teacher"


# Runs


class Killed(BaseException):
    """Ends a run within this process."""


@pytest.fixture
def base_folder(saved_tiny_folder):
    return saved_tiny_folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    for name in ("plot_training_curves", "draw_sheet"):
        monkeypatch.setattr(train_accelerate, name, lambda *args, **options: None)


@pytest.mark.slow
def test_a_taught_run_and_its_continuation(base_folder, tiny_dataset_folder, tmp_path, monkeypatch):
    parallel = lines(tmp_path / "names.jsonl", PAIRS)
    taught = {
        "text_teacher": "base", "anchor_share": 0.25, "parallel_text": parallel, "parallel_batch_size": 3,
        "save_steps": 2, "eval_steps": 3,
    }  # fmt: skip
    whole = train_accelerate.main(flags(base_folder, tiny_dataset_folder, tmp_path / "whole", **taught))
    facts = json.loads((whole / "run.json").read_text())
    known = [point["teacher_language"] for point in facts["curve"] if "teacher_language" in point]
    assert known[0]["cosine_to_base"] == pytest.approx(1, abs=1e-4)
    assert known[-1]["cosine_to_base"] < 0.999
    assert {"text_to_image", "image_to_text", "loss"} < known[0].keys()
    assert all(point["teacher_loss"] > 0 for point in facts["curve"][1:])
    assert facts["origins"]["datasets"][-1]["name"].endswith("names.jsonl")

    after, original = [], Trainer._one_step

    def stopping(self, plan, *args):
        if plan.step == 3:
            raise Killed
        after.append(plan.step)
        return original(self, plan, *args)

    argv = flags(base_folder, tiny_dataset_folder, tmp_path / "cut", **taught)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_one_step", stopping)
        train_accelerate.main(argv)
    cut = train_accelerate.main([*argv, "--resume", "auto"])
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_run_on_parallel_text_alone(base_folder, tiny_dataset_folder, tmp_path):
    argv = flags(
        base_folder, tiny_dataset_folder, tmp_path / "out", evaluation_dataset=tiny_dataset_folder, text_teacher="base",
        parallel_text=lines(tmp_path / "names.jsonl", PAIRS), parallel_batch_size=6,
    )  # fmt: skip
    place = argv.index("--dataset")
    argv = argv[:place] + argv[place + 2 :]
    with pytest.raises(SystemExit, match="matryoshka_dims are trained on images: give a --dataset"):
        train_accelerate.main([*argv, "--matryoshka_dims", "12"])
    out = train_accelerate.main(argv)
    facts = json.loads((out / "run.json").read_text())
    assert facts["pairs"] == 6 * facts["steps"] and facts["curve"][-1]["loss"] == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base_folder, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("text_model", "text_projection")) for name in changed)


def test_leaks_and_small_texts_end_a_run_before_any_work(base_folder, tiny_dataset_folder, tmp_path, monkeypatch):
    leak = lines(tmp_path / "leak.jsonl", [*PAIRS, {"pt": "foto 1 azul verde", "en": "something"}])
    taught = {"text_teacher": "base", "parallel_batch_size": 4, "image_embedding_cache": tmp_path / "none"}
    with pytest.raises(
        SystemExit,
        match=r"'foto 1 azul verde', row 9 of .*is a caption of the split '(validation|test)', column 'captions-pt'",
    ):
        train_accelerate.main(flags(base_folder, tiny_dataset_folder, tmp_path / "o", parallel_text=leak, **taught))
    english = lines(tmp_path / "english.jsonl", [*PAIRS, {"pt": "outra coisa", "en": "The azul 0"}])
    with pytest.raises(SystemExit, match=r"'The azul 0', row 9 of .*, column 'captions-en'"):
        argv = flags(
            base_folder, tiny_dataset_folder, tmp_path / "o", parallel_text=english, eval_languages="pt", **taught
        )
        train_accelerate.main(argv)
    few = lines(tmp_path / "few.jsonl", PAIRS[:3])
    with pytest.raises(SystemExit, match="exceeds the 3 usable pairs"):
        train_accelerate.main(flags(base_folder, tiny_dataset_folder, tmp_path / "o", parallel_text=few, **taught))
    assert not (tmp_path / "none").exists()
