"""Caption builds from a config: checked before they run, resumable at any point, with a dataset card at the end."""

import contextlib
import errno
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from caption_build import CARD, changed, files, openmoji_config, write_config
from caption_tars import picture, rows_of
from datasets import Image, Value
from huggingface_hub import DatasetCard
from tiny import save_model

from capivara_common.executors import PhaseStep, run_phases
from caption_data.rows import CAPTIONS_FEATURE, SIMILARITIES_FEATURE
from captions import select
from captions.build import BuildArguments, ManualStepRequired, build_dataset, main, read_build_plan
from captions.stages import StageArguments
from examples.openmoji.captions import OpenMojiCaptionsArguments, build_openmoji_caption_dataset
from hub_upload.upload_checks import list_and_check_files_to_send

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def template(tmp_path_factory, tiny_processor):
    """A config with filled tables, and its model."""
    folder = tmp_path_factory.mktemp("template")
    save_model(folder / "model", tiny_processor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        return write_config(folder, folder / "model")


def copy_of(template: Path, folder: Path) -> Path:
    """Copy a config with its data and tables to another folder."""
    for name in ("data", "tables"):
        shutil.copytree(template.parent / name, folder / name)
    text = template.read_text(encoding="utf-8").replace(str(template.parent), str(folder))
    (folder / "config.yaml").write_text(text.replace(f"{folder}/model", f"{template.parent}/model"), encoding="utf-8")
    return folder / "config.yaml"


@pytest.fixture
def config(template, tmp_path):
    return copy_of(template, tmp_path)


@pytest.fixture(scope="module")
def finished(template, tmp_path_factory):
    """A config whose build is complete; tests must not change it."""
    config = copy_of(template, tmp_path_factory.mktemp("finished"))
    build_dataset(BuildArguments(config))
    return config


def test_a_build_writes_a_dataset_with_its_card(finished):
    folder, tmp_path = finished.parent / "built" / "dataset", finished.parent
    data = datasets.load_dataset(str(folder))
    assert {split: rows.num_rows for split, rows in data.items()} == {"train": 11, "test": 12}
    features = {"image": Image(), **dict.fromkeys(("captions-xh", "generated-captions-xh"), CAPTIONS_FEATURE)}
    features["similarities-xh"] = SIMILARITIES_FEATURE
    assert features.items() <= data["train"].features.items() and data["train"].features["url"] == Value("string")
    rows = rows_of(folder)
    kept = [i for i in range(13) if i not in (3, 5)]
    assert [row["image"]["bytes"] for row in rows] == [picture(i) for i in kept]
    for i, row in zip(kept, rows, strict=True):
        assert len(row["captions-xh"]) == 2 == len(row["similarities-xh"])
        assert set(row["captions-xh"]) < {f"ikati {i}", f"ifoto ye {i}", "inja"}
        assert row["similarities-xh"] == sorted(row["similarities-xh"], reverse=True)
        assert row["captions-en"] == [f"a cat {i}"] and row["generated-captions-en"] == [f"a photo of {i}", "a dog"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    meta = DatasetCard(card).data.to_dict()
    assert meta["license"] == "cc-by-4.0" and meta["language"] == ["xh", "en"]
    assert meta["configs"][0]["data_files"] == [
        {"split": "train", "path": "data/train-*"}, {"split": "test", "path": "data/test-*"},
    ]  # fmt: skip
    assert "# Squares \\| \\*of\\* \\<color\\>" in card and "[Noise](<https://example.org/noise>) | CC BY 4.0" in card
    assert meta["translations"] == {"xh": "human"} and "human-translated" in meta["tags"], (
        "the table was filled by people"
    )
    assert "machine-translated" not in card and "by machine" not in card
    assert "| train | 11 | 11 | 22 | 22 |" in card
    assert "| translate | 13 | 12 | 1 unreadable image |" in card and "| select | 11 | 11 | none |" in card
    assert "| score | 12 | 11 | 1 no caption |" in card
    assert str(tmp_path) not in card + (folder / "build.json").read_text(), "no path of this machine"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "build.json", "data", "similarities.png"]
    assert len(list_and_check_files_to_send(folder, "dataset")) == 5, "all files can be pushed"


def test_complete_stages_are_not_repeated_and_no_model_is_loaded(finished, monkeypatch, caplog, capsys):
    before = files(finished.parent / "built")
    monkeypatch.setattr("captions.score.load_embedder", lambda *a: pytest.fail("the model was loaded"))
    with caplog.at_level("INFO", "capivara"):
        main(["--config", str(finished)])
    assert files(finished.parent / "built") == before
    assert "2-score, train: done" in caplog.text and "dataset: done" in caplog.text


@pytest.mark.slow
def test_an_incomplete_table_stops_the_build_without_an_error(config, tmp_path, capsys, caplog):
    """An incomplete table is not an error: the command prints which translations are missing and ends normally."""
    table = tmp_path / "tables" / "train.tsv"
    text = table.read_text(encoding="utf-8")
    # Spreadsheets may write other blanks.
    emptied = text.replace("\tikati 0\n", "\t\n").replace("\tinja\n", "\t \xa0\n")
    table.write_text(emptied, encoding="utf-8")
    with caplog.at_level("INFO", "capivara"):
        main(["--config", str(config)])
        main(["--config", str(config), "--dry_run"])
    output_text = capsys.readouterr().out
    missing = r"2 of 25 .*: line 2 \(s1_\w+\), line 4 \(s3_\w+\)"
    assert re.fullmatch(
        rf"Manual step: {table}.* 1-translate, train.*: {missing}\.\n.*\n", output_text,
    )  # fmt: skip
    assert re.search(rf"1-translate, train: .*{table}: 2 of 25 ", caplog.text)
    assert "--import " not in caplog.text, "the flag belongs to another command"
    assert not (tmp_path / "built" / "1-translate" / "train").exists() and not (tmp_path / "built" / "dataset").exists()
    table.write_text(text, encoding="utf-8")
    assert build_dataset(BuildArguments(config)) and "1-translate" not in capsys.readouterr().out


def test_two_languages_do_not_share_a_table(config, tmp_path, monkeypatch):
    """A relative path of a table is below the output folder; a table of another language is refused."""
    monkeypatch.chdir(tmp_path)
    changed(config, translate={"backend": "file", "import": "tables/{split}.tsv"})
    flags = {"language": "gn", "output": Path("guarani")}
    with pytest.raises(ManualStepRequired, match=r"guarani/tables/train\.tsv .*\n.*guarani/tables/test\.tsv"):
        build_dataset(BuildArguments(config, **flags))
    for xhosa in (tmp_path / "tables").glob("*.tsv"):
        assert xhosa.read_text(encoding="utf-8").split("\n")[0].endswith("\ttranslation:xh")
        shutil.copyfile(xhosa, tmp_path / "guarani" / "tables" / xhosa.name)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=r"guarani/tables/train\.tsv (?=.*'xh').*'gn'"):
            build_dataset(BuildArguments(config, dry_run=dry_run, **flags))
    assert not (tmp_path / "guarani" / "dataset").exists()


def test_a_table_in_the_current_folder_is_named(config, tmp_path, monkeypatch, caplog):
    """Earlier versions wrote tables there; a new, empty table must not silently replace it."""
    monkeypatch.chdir(tmp_path)
    changed(config, translate={"backend": "file", "import": "tables/{split}.tsv"})
    with caplog.at_level("WARNING", "capivara"), pytest.raises(ManualStepRequired):
        build_dataset(BuildArguments(config))
    for split in ("train", "test"):
        assert re.search(rf"tables/{split}\.tsv .*{tmp_path}/built/tables/{split}\.tsv", caplog.text)


@pytest.mark.slow
def test_a_corrected_cell_changes_the_dataset(config, tmp_path, monkeypatch, caplog):
    """Only files with its row are translated and scored again; the result is that of a build from scratch."""
    build_dataset(BuildArguments(config))
    scored = {path: path.stat().st_mtime_ns for path in (tmp_path / "built" / "2-score" / "train").glob("*.parquet")}
    untouched = files(tmp_path / "built" / "1-translate" / "test")
    table = tmp_path / "tables" / "train.tsv"
    table.write_text(table.read_text(encoding="utf-8").replace("\tikati 9\n", "\tikati emnyama\n"), encoding="utf-8")
    with caplog.at_level("INFO", "capivara"):
        build_dataset(BuildArguments(config, dry_run=True))
    assert re.search(rf"1-translate, train: .*{table}", caplog.text) and "dataset: not written yet" in caplog.text
    # If the build is killed in between, the next one finds the correction again.
    with monkeypatch.context() as patch:
        patch.setattr("captions.stages.Corrections.apply", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_dataset(BuildArguments(config))
    build_dataset(BuildArguments(config))
    made_again = [path.name for path, time in scored.items() if path.stat().st_mtime_ns != time]
    assert made_again == ["train-000000008-000000012.parquet"] and len(scored) == 3
    assert files(tmp_path / "built" / "1-translate" / "test") == untouched
    captions = [text for row in rows_of(tmp_path / "built" / "1-translate" / "train") for text in row["captions-xh"]]
    assert "ikati emnyama" in captions and "ikati 9" not in captions
    (tmp_path / "built").rename(tmp_path / "corrected")
    build_dataset(BuildArguments(config))
    assert files(tmp_path / "built") == files(tmp_path / "corrected")


@pytest.mark.parametrize(("cut", "warns"), [(0.99, True), pytest.param(-1, False, marks=pytest.mark.slow)])
def test_a_build_logs_the_row_counts_of_each_stage(config, tmp_path, caplog, cut, warns):
    """A warning names a filter that drops more than half of the rows."""
    changed(config, select={"caption_strategy": "rank", "min_pair_similarity": cut})
    with caplog.at_level("INFO", "capivara"), pytest.raises(ValueError) if warns else contextlib.nullcontext():
        build_dataset(BuildArguments(config))  # raises if no row is left; the logged counts show why
    for line in (
        "1-translate, train: 13 rows in, 12 out",
        "2-score, train: 12 rows in, 11 out",
        "1-translate, test: 12 ",
    ):
        assert line in caplog.text
    named = [
        record for record in caplog.records if record.levelname == "WARNING" and "min_pair_sim" in record.getMessage()
    ]
    assert bool(named) == warns


@pytest.mark.slow
def test_failures_are_reported_and_the_same_command_resumes(config, tmp_path, monkeypatch, caplog):
    """After a failed row, a full disk or a deleted part, the same command finishes with the bytes of a build without
    failures, with any number of tasks."""
    build_dataset(BuildArguments(config, tasks=3))
    (tmp_path / "built").rename(tmp_path / "undisturbed")
    real = select.select_row_captions

    def poisoned(args, row):
        if row["captions-en"] == ["a cat 9"]:
            raise ZeroDivisionError("no such row was expected")
        return real(args, row)

    with monkeypatch.context() as patch:
        patch.setattr(select, "select_row_captions", poisoned)
        message = r"3-select, train: rows: .*\n  task 1: ZeroDivisionError: .*rows 6 to 10 of train\.\n"
        with pytest.raises(ValueError, match=message):
            build_dataset(BuildArguments(config, tasks=2))
    parts = [path.name for path in (tmp_path / "built" / "3-select" / "train").glob("*.parquet")]
    assert parts == ["train-000000000-000000006.parquet"] and not (tmp_path / "built" / "dataset").exists()
    logs = tmp_path / "built" / "logs" / "3-select" / "train" / "rows"
    assert "in poisoned" in (logs / "failures" / "00001.txt").read_text(), "with its traceback"
    with caplog.at_level("INFO", "capivara"):
        build_dataset(BuildArguments(config, dry_run=True))
    assert "3-select, train: rows: task 1: ZeroDivisionError" in caplog.text

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("captions.build.pa.concat_tables", full)
        with pytest.raises(OSError, match=r"built/dataset"):
            main(["--config", str(config)])
    assert not (tmp_path / "built" / "dataset").exists() and not list(logs.glob("failures/*"))
    part = sorted((tmp_path / "built" / "2-score" / "train").glob("*.parquet"))[1]
    kept = {path: path.stat().st_mtime_ns for path in part.parent.glob("*.parquet") if path != part}
    part.unlink()
    build_dataset(BuildArguments(config, tasks=2))
    assert files(tmp_path / "built") == files(tmp_path / "undisturbed")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_executor_flags_apply_to_stages_without_their_own(config):
    changed(config, score={"model": "m", "gpus_per_task": "1", "time": "12:00:00"})
    flags = {"executor": "slurm", "tasks": 400, "partition": "gpu", "time": "04:00:00"}
    plan = read_build_plan(config, BuildArguments(config, **flags, sbatch=["account=a", "qos=b"]).executor_flags())
    translated, score, select = plan.steps["train"]
    assert (translated.time, score.time, select.gpus_per_task, score.gpus_per_task) == ("04:00:00", "12:00:00", 0, 1)
    assert {args.tasks for args in (translated, score, select)} == {400} and select.sbatch == ["account=a", "qos=b"]
    assert "--tasks" not in score.command() and "--time" not in score.command()


SLURM = {"executor": "slurm", "tasks": 2, "partition": "main", "time": "00:10:00"}


def test_every_slurm_job_depends_on_the_previous_job(config, tmp_path, monkeypatch):
    """Options of the user, such as the output file of sbatch, are in the job scripts."""
    jobs: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        "datatrove.executor.slurm.launch_slurm_job",
        # datatrove's job for statistics has no other arguments, and no job depends on it.
        lambda script, _, *args: (
            (args and jobs.append((re.search(r"job-name=(\S+)", script)[1], *args))) or f"id-{len(jobs)}"
        ),
    )
    monkeypatch.setattr(shutil, "which", lambda name: name)
    logs = tmp_path / "elsewhere"
    (tmp_path / "start.sh").touch()
    flags = SLURM | {"gpus_per_task": 1, "sbatch": ["output=a/%j.out"], "logging_dir": logs}
    flags["node_script"] = tmp_path / "start.sh"
    assert build_dataset(BuildArguments(config, **flags)) is None
    phases = ["rows", "report"]
    assert [name.removeprefix("captions-") for name, *_ in jobs] == [
        *(f"1-translate-train-{name}" for name in phases), "2-score-train-rows", "3-select-train-rows",
        "3-select-train-report", *(f"1-translate-test-{name}" for name in phases), "dataset",
    ]  # fmt: skip
    waits = [[arg for arg in args if arg.startswith("--dependency")] for _, *args in jobs]
    assert waits == [[], *([f"--dependency=afterok:id-{number}"] for number in range(1, len(jobs)))]
    scripts = {name: (logs / name / "launch_script.slurm").read_text() for name in ("2-score/train/rows", "dataset")}
    assert "#SBATCH --gpus=1" in scripts["2-score/train/rows"] and "#SBATCH --gpus" not in scripts["dataset"]
    assert "#SBATCH --array=0-1\n" in scripts["2-score/train/rows"] and "#SBATCH --array=0-0\n" in scripts["dataset"]
    source = f"; source {tmp_path}/start.sh\n"
    assert source in scripts["2-score/train/rows"] and source not in scripts["dataset"]
    for script in scripts.values():
        assert "#SBATCH --kill-on-invalid-dep=yes" in script and "#SBATCH --output=a/%j.out\n" in script
        assert re.search(rf"#SBATCH --error={logs}/\S+/slurm_logs/%A_%a\.out\n", script)


def test_slurm_requests_a_table_if_no_stage_can_run(finished, monkeypatch):
    """Complete stages must not be submitted again instead of writing the table."""
    table = finished.parent / "tables" / "test.tsv"
    text = table.read_text(encoding="utf-8")
    table.unlink()
    monkeypatch.setattr("datatrove.executor.slurm.launch_slurm_job", lambda *args: pytest.fail("a job was submitted"))
    with pytest.raises(ManualStepRequired, match=r"test\.tsv.*1-translate, test.* 25 of 25"):
        build_dataset(BuildArguments(finished, **SLURM))
    table.write_text(text, encoding="utf-8")


SEEN_GPUS = """
import os
from capivara_common.tasks import Phase

def run(args, rank, world_size):
    (args.output / f"{rank}-{world_size}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])

PHASE = Phase(run, is_parallel=True)
"""


@pytest.mark.slow
def test_each_worker_has_its_own_gpu(config, monkeypatch, tmp_path):
    """There are as many workers as GPUs, and each task sees one GPU."""
    step = read_build_plan(config).steps["train"][1]
    (tmp_path / "seen_gpus.py").write_text(SEEN_GPUS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr("capivara_common.executors.START_METHOD", "fork")
    step.output.mkdir(parents=True)
    import seen_gpus

    run_phases([PhaseStep(seen_gpus.PHASE, step, tmp_path / "logs", "seen")], step)
    seen = {path.name: path.read_text() for path in step.output.iterdir()}
    assert seen.keys() == {"0-2", "1-2"} and set(seen.values()) == {"2", "5"}


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_workers_that_die_at_their_start_are_reported(executor, monkeypatch, tmp_path):
    """A phase is incomplete until its tasks have ended, and the next phase does not start. Ray only logs a death."""
    monkeypatch.setattr("capivara_common.executors.START_METHOD", "fork")
    monkeypatch.setattr("capivara_common.executors._run_tasks_in_worker", lambda *_: os._exit(1))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr("capivara_common.executors.require_packages", lambda *_: None)
    monkeypatch.setattr("capivara_common.executors.RayPipelineExecutor.run", lambda _: None)
    args = StageArguments("no/such", tmp_path / "out", executor=executor, tasks=3, workers=2)
    steps = [PhaseStep(args.phases["rows"], args, tmp_path / name, name) for name in ("first", "second")]
    (tmp_path / "first" / "completions").mkdir(parents=True)
    (tmp_path / "first" / "completions" / "00001").touch()  # from an earlier start
    with pytest.raises(ValueError, match=r"first: 3 .*(\n  task [012]: .*){3}"):
        run_phases(steps, args)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("partition", "gpu\n#SBATCH --wrap=x", "partition .*SBATCH"),
        ("time", "1\x1b", r"time .*x1b"),
        ("sbatch", "comment=x $(touch x)", r"sbatch .*touch x"),
        ("logging_dir", "a b", "folder of the logs"),
        ("output", "50%j", "folder of the logs"),
        ("node_script", "no/such.sh", r"node_script .*no/such\.sh"),
    ],
)
def test_values_that_are_unsafe_in_a_slurm_script_are_refused(config, tmp_path, monkeypatch, flag, value, message):
    """A line break, for example, would begin another directive. A relative log folder is below the current folder."""
    monkeypatch.chdir(tmp_path)
    flags = {"executor": "slurm", "tasks": 2, "partition": "gpu", "time": 1, flag: value}
    with pytest.raises(ValueError, match=message):
        main(["--config", str(config), *(f"--{name}={value}" for name, value in flags.items())])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "no/such/folder"}, r"no/such/folder does not exist"),
        ({"rename": ["captions-en=a", "generated-captions-en=b"]}, r"no column captions-en or generated-captions-en"),
    ],
)
def test_missing_columns_and_splits_are_reported_before_any_stage(config, tmp_path, changes, message):
    """They are also reported before a table is requested."""
    shutil.rmtree(tmp_path / "tables")
    with pytest.raises(ValueError, match=message):
        main(["--config", str(changed(config, **changes))])
    assert not (tmp_path / "built").exists(), "no stage has started"


def test_a_missing_package_is_reported_before_any_stage(config, monkeypatch):
    changed(config, score={"model": "open_clip:xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k"})
    monkeypatch.setattr("capivara_common.environment.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"score.*\[open-clip\]"):
        build_dataset(BuildArguments(config, dry_run=True))


def test_a_dry_run_lists_the_work_and_writes_nothing(config, tmp_path, caplog):
    before = files(tmp_path)
    with caplog.at_level("INFO", "capivara"):
        main(["--config", str(config), "--dry_run"])
    assert files(tmp_path) == before
    for text in ("1-translate, train: not started", "python -m captions.score --dataset", "dataset: not written yet"):
        assert text in caplog.text
    assert f"--import_file {tmp_path}/tables/test.tsv" in caplog.text and "--rows_per_part 6" in caplog.text


@pytest.mark.slow
def test_changed_settings_need_another_output_folder(config, tmp_path):
    build_dataset(BuildArguments(config))
    changed(config, select={"caption_strategy": "rank", "caption_count": 1, "rows_per_part": 6})
    with pytest.raises(ValueError, match=r"settings\.caption_count: 2 .* 1\b"):
        build_dataset(BuildArguments(config))
    shutil.rmtree(tmp_path / "built" / "3-select")
    with pytest.raises(ValueError, match=r"built/dataset"):
        build_dataset(BuildArguments(config))
    shutil.rmtree(tmp_path / "built" / "dataset")
    build_dataset(BuildArguments(config))
    assert all(len(row["captions-xh"]) == 1 for row in rows_of(tmp_path / "built" / "dataset"))


@pytest.mark.slow
def test_a_config_may_omit_stages(config, tmp_path):
    """An English build is only scored and selected; a split that no stage processes is copied."""
    changed(config, translate=None, language="en")
    folder = build_dataset(BuildArguments(config))
    assert sorted(path.name for path in (tmp_path / "built").iterdir() if path.is_dir()) == [
        "0-read", "1-score", "2-select", "dataset", "logs",
    ]  # fmt: skip
    data = datasets.load_dataset(str(folder))
    assert data["train"].num_rows == 11 and data["test"]["captions-en"][:] == [[f"a cat {i}"] for i in range(12)]
    assert data["test"][0]["similarities-en"] is None and data["test"][0]["image"].size == (9, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"langage": "pt"}, r"config\.yaml.*`langage`.*`language`"),
        ({"score": {"modle": "x"}}, r"score.*`modle`.*`model`"),
        ({"dataset": None}, r"`dataset`.*--dataset"),
        ({"card": None}, r"`card`"),
        ({"card": CARD | {"sources": []}}, r"card\.sources"),
        ({"card": CARD | {"license": "Free for all"}}, r"card\.license.*'Free for all'"),
        ({"evaluation_splits": ["train"]}, r"evaluation_splits.*'train'"),
        ({"translate": None, "score": None, "select": None}, r"generate, translate, score, select"),
    ],
)
def test_errors_in_a_config_are_found_before_any_work(config, tmp_path, changes, message):
    changed(config, **changes)
    with pytest.raises(ValueError, match=message):
        main(["--config", str(config)])
    assert not list(tmp_path.glob("built/*/*/*.parquet"))


@pytest.mark.parametrize("language", ["pt", "hi", "xh"])
def test_the_configs_of_the_paper_are_complete(language, tmp_path):
    config = ROOT / "configs" / f"captions_{language}.yaml"
    plan = read_build_plan(config, dataset="shards/*.tar", output=tmp_path / "out")
    generate, translated, score, select = plan.steps["train"]
    assert [args.title for args in (generate, select)] == ["1-generate, train", "4-select, train"]
    assert generate.model == "Salesforce/blip2-opt-2.7b-coco" and generate.max_new_tokens == 50
    assert translated.language == score.language == select.language == language == plan.language
    assert score.model == "open_clip:xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k"
    assert (select.caption_strategy, select.caption_count, select.min_pair_similarity) == ("rank", 5, 0.2)
    assert score.dataset == str(tmp_path / "out" / "2-translate" / "train")
    with pytest.raises(ValueError, match="`dataset`"):
        read_build_plan(config)


@pytest.mark.slow
def test_the_openmoji_build_restores_the_portuguese_names(tmp_path, tiny_folder, tiny_dataset_folder):
    """With a tiny model, the translated captions are exactly the Portuguese captions of the dataset."""
    source = datasets.load_from_disk(tiny_dataset_folder)
    config = openmoji_config(tmp_path, tiny_folder)
    folder = build_openmoji_caption_dataset(OpenMojiCaptionsArguments(tiny_dataset_folder, config))
    for split, rows in source.items():
        built = rows_of(folder, split)
        assert [row["captions-pt"] for row in built] == [captions[:1] for captions in rows["captions-pt"]]
    assert "All emojis designed by OpenMoji" in (folder / "README.md").read_text(encoding="utf-8")


GUIDE = (ROOT / "docs" / "how-to" / "your_language.md").read_text(encoding="utf-8")


def test_the_config_in_the_guide_is_valid(tmp_path):
    (tmp_path / "my.yaml").write_text(re.search(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[1], encoding="utf-8")
    plan = read_build_plan(tmp_path / "my.yaml")
    assert list(plan.steps) == ["train", "validation", "test"] and len(plan.steps["train"]) == 4
