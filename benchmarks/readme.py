"""The figures of the README, its translation and three pages of docs/, out of the JSON in benchmarks/results alone.

python -m benchmarks.readme           # rewrites the blocks between the markers
python -m benchmarks.readme --demo runs/openmoji-pt-001   # takes over the results of a run of the demo first
python -m benchmarks.readme --real_images runs/real_images   # and of examples.real_images
python -m benchmarks.readme --exchange runs/exchange_text_side   # and of examples.exchange_text_side
python -m benchmarks.readme --check   # fails where a block is not what the JSON says
"""

import re
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image

from benchmarks import (
    captioning,
    captions,
    captions_engine,
    captions_selection,
    in_browser,
    main_job,
    recipe_tables,
    search_tables,
    static_page,
    train_step,
    trim_vocabulary,
    where_it_runs,
)
from benchmarks.timing import RESULTS, ROOT, software, table
from capivara_common.cli import flag, parse, run_command
from capivara_common.files import read_json, write_json, write_text
from eval.records.schema import DIRECTIONS, Record, read_records
from eval.records.tables import percent, retrieval_table

PICTURES = ROOT / "docs"
BLOCK = "<!-- {name}: made by `python -m benchmarks.readme` -->\n{text}\n<!-- end {name} -->"
# The summary of the demo in the README and its translation: heads of the columns, rows, and what is said of them.
SUMMARY_EN = (
    ("Model", *(f"{name}: {way}" for name in ("Portuguese", "English") for way in ("text to image", "image to text"))),
    ("Base model", "CAPIVARA, the paper's recipe", "CAPIVARA, [our recipe](docs/recipe.md)", "Chance"),
    "Mean recall (recall@1, @5 and @10) in per cent, mean ± standard deviation of {runs} seeds, among {images} test "
    "images of concepts that were never trained; {paper} and {ours} minutes per seed on {device}. Measured at commit "
    "a876dd5, with the whole vocabulary of the text encoder.",
)
SUMMARY_PT = (
    ("Modelo", *(f"{name}: {way}" for name in ("português", "inglês") for way in ("texto → imagem", "imagem → texto"))),
    ("Modelo de base", "CAPIVARA, receita do artigo", "CAPIVARA, [nossa receita](docs/recipe.md)", "Acaso"),
    "Revocação média (recall@1, @5 e @10) em por cento, com média ± desvio padrão de {runs} sementes, entre {images} "
    "imagens de teste, de conceitos que não aparecem no treinamento; {paper} e {ours} min por semente em {device}. "
    "Medido no commit a876dd5, com o vocabulário inteiro do codificador de texto.",
)


@dataclass
class ReadmeArguments:
    """Arguments of `benchmarks.readme`."""

    demo: list[Path] = flag([], "Folders of runs of configs/openmoji.yaml, one a seed.")
    real_images: Path | None = flag(None, "Output folder of examples.real_images.")
    exchange: Path | None = flag(None, "Output folder of examples.exchange_text_side.")
    check: bool = flag(False, "Change nothing, fail where a figure is not the JSON's.")


def pages() -> dict[str, dict[str, Callable[[], str]]]:
    """Page -> its blocks, by name -> what makes the text."""
    return {
        "README.md": {
            "demo_summary": lambda: demo_summary(*SUMMARY_EN, decimal="."),
            "where_it_runs": lambda: where_it_runs.where_table(_where(), where_it_runs.ENGLISH, decimal="."),
        },
        "LEIAME.md": {
            "demo_summary": lambda: demo_summary(*SUMMARY_PT, decimal=","),
            "where_it_runs": lambda: where_it_runs.where_table(_where(), where_it_runs.PORTUGUESE, decimal=","),
        },
        "docs/benchmarks.md": {
            "demo": demo_block,
            "main_job": lambda: main_job.main_job_table(_results("main_job")),
            "trim_choices": lambda: trim_vocabulary.choices_table(_results("trim_vocabulary")),
            "trim_sizes": lambda: trim_vocabulary.sizes_table(_results("trim_vocabulary")),
            "search": lambda: search_tables.search_table(_results("search")),
            "search_photographs": lambda: search_tables.photos_table(_results("search")),
            "search_reduced": lambda: search_tables.reduced_table(_results("search")),
            "search_growth": lambda: search_tables.growth_table(_results("search")),
            "encode": encode_block,
            "train_step": lambda: train_step.train_step_table(_results("train_step")),
            "loading": loading_block,
            "real_images": real_images_block,
            "eval_retrieval": eval_retrieval_block,
            "export": export_block,
            "in_browser": lambda: in_browser.in_browser_table(_results("in_browser"), _results("in_browser_demo")),
            "space_load": space_load_block,
            "static_page": lambda: static_page.static_page_table(_results("static_page"), _results("static_page_full")),
            "captions": lambda: captions.captions_table(_results("captions")),
            "captions_engine": lambda: captions_engine.engine_table(_results("captions_engine")),
            "captions_selection": lambda: captions_selection.selection_table(_results("captions_selection")),
        },
        "docs/publishing.md": {"exchange_text_side": exchange_block},
        "docs/uses.md": {
            "captioning": lambda: captioning.captioning_table(_results("captioning")),
            "guiding": lambda: captioning.guiding_table(
                {name: _results(f"guiding_{name}") for name in ("cells", "pixels")}
            ),
        },
    }


def _results(name: str) -> dict[str, Any]:
    return read_json(RESULTS / f"{name}.json")


def _where() -> dict[str, Any]:
    return {name: _results(name) for name in where_it_runs.FILES}


def demo_summary(heads: tuple[str, ...], titles: tuple[str, ...], facts: str, decimal: str) -> str:
    """Mean recall of base, both recipes and chance, by language and direction, in words such as `SUMMARY_EN`."""
    found = _results("recipe")
    keys = [f"openmoji/test/{language}/{way}" for language in ("pt", "en") for way in DIRECTIONS]
    of = {row["name"]: row for row in found["rows"]}
    names = ("base", recipe_tables.REFERENCE, recipe_tables.OURS)
    rows = [[percent(of[name]["values"][key]) for key in keys] for name in names]
    rows.append([percent([found["chance"][key]]) for key in keys])
    cells = [[title, *(cell.replace(".", decimal) for cell in row)] for title, row in zip(titles, rows, strict=True)]
    minutes = [f"{statistics.mean(of[name]['seconds']) / 60:.1f}".replace(".", decimal) for name in names[1:]]
    numbers = {"runs": len(of[recipe_tables.REFERENCE]["seeds"]), "images": found["n"][keys[1]]}
    facts = facts.format(**numbers, paper=minutes[0], ours=minutes[1], device=found["device"])
    return table(heads, cells, facts)


def demo_block() -> str:
    """Recalls of every model of the demo, the gains with their intervals, and the run."""
    demo = _results("demo")
    records, run = [Record(**record) for record in demo["records"]], demo["runs"][0]
    facts = (
        f"{len(demo['runs'])} seed(s), {run['steps']} steps of {run['config']['effective_batch_size']} pairs, "
        f"{sum(run['seconds'].values()) / 60:.1f} minutes of training and evaluation per seed on {run['device']}, "
        f"{records[0].n} test captions of unseen concepts; recall in per cent."
    )
    return f"{retrieval_table(records)}\n{facts}"


def encode_block() -> str:
    """Items per second of open_clip and ours."""
    found = _results("encode")
    rows = [
        (name.replace("_", " per second, "), *_medians(measured, "median", ".1f"), f"{measured['ratio']:.2f}")
        for name, measured in found["measured"].items()
    ]
    width, height = found["image_size"]
    facts = (
        f"Full size, random weights, {found['images']} images of {width} x {height} pixels, {found['captions']} "
        f"captions of {found['tokens']} tokens, median of {found['runs']} alternating runs on {found['device']}; "
        f"{software(found, 'torch', 'transformers', 'open_clip_torch')}."
    )
    return table(("what", "open_clip", "ours", "ratio"), rows, facts)


def loading_block() -> str:
    """Images per second and the share of waiting."""
    found = _results("loading")
    rows = [
        (name.replace("_", " "), f"{measured['images_per_second']:.1f}", f"{measured['share_waiting']:.0%}")
        for name, measured in found["measured"].items()
    ]
    width, height = found["image_size"]
    facts = (
        f"{found['images']} JPEG files of {width} x {height} pixels out of a tar, {found['workers']} loading "
        f"process(es), the image tower at full size in {found['precision']}, on {found['device']}."
    )
    return table(("what", "images/s", "waiting for images"), rows, facts)


def real_images_block() -> str:
    """Every measure of the demo's models on images from PyPI."""
    found = _results("real_images")
    cells: dict[tuple[str, ...], dict[str, str]] = {}  # task, data set, measure, n -> model -> value
    for record in (Record(**one) for one in found["records"]):
        if record.metric != ("mean_recall" if record.task == "retrieval" else "accuracy"):
            continue
        measure = record.metric.replace("_", " ")
        if record.task == "retrieval":
            measure += f", {record.direction.replace('_', ' ')}, {record.language}"
        elif record.task == "linear_probe":
            measure += f", {record.protocol}"
        row = cells.setdefault((record.task.replace("_", " "), record.dataset, measure, str(record.n)), {})
        row[record.model] = percent([record.value])
        row["chance"] = "" if record.chance is None else percent([record.chance])
    rows = [(*key, *(row.get(name, "") for name in ("baseline", "capivara", "chance"))) for key, row in cells.items()]
    facts = (
        f"Models of the demo, measured on {found['device']}; {software(found, 'torch', 'transformers')}. In per cent; "
        "the linear probe sees the image tower alone, which both share."
    )
    heads = ("Task", "Data set", "Measure", "n", "Baseline", "CAPIVARA", "Chance")
    return table(heads, rows, facts, text_columns=3)


def eval_retrieval_block() -> str:
    """Seconds of clip-benchmark and ours, and our memory."""
    found = _results("eval_retrieval")
    scores, large = found["scores"], found["large"]
    title = f"recall at 1, 5, 10 of {scores['images']:,} images x {scores['captions']:,} captions"
    row = (title, *(f"{scores['seconds'][who]:.2f}" for who in ("clip_benchmark", "ours")), f"{scores['ratio']:.1f}")
    facts = (
        f"Medians of {scores['runs']} alternating runs on {scores['device']}, recalls equal; ours holds "
        f"{scores['memory_over_embeddings_bytes'] / 2**20:.0f} MiB beside the embeddings. {large['images']:,} images x "
        f"{large['captions']:,} captions take {large['seconds'] / 60:.0f} minutes, with "
        f"{large['memory_over_embeddings_bytes'] / 2**20:.0f} MiB beside the embeddings, where all scores would be "
        f"{large['all_scores_bytes'] / 1e9:.0f} GB."
    )
    return table(("what", "clip-benchmark, s", "ours, s", "ratio"), [row], facts)


def export_block() -> str:
    """Seconds of a load by open_clip and ours, and the memory of an export."""
    found = _results("export")
    titles = {"load": "cold load", "load_and_read": "cold load, every weight read once"}
    rows = [
        (title, *_medians(found["load"][name], "median_s", ".2f"), f"{found['load'][name]['ratio']:.2f}")
        for name, title in titles.items()
    ]
    facts = (
        f"Full size, {found['weights_bytes'] / 1e9:.2f} GB of weights, median of {found['runs']} alternating runs on "
        f"{found['device']}; page cache: {found['load']['page_cache']}. After the imports, the export holds "
        f"{found['export']['ratio_to_weights']:.2f} times the weights at its peak."
    )
    return table(("what", "open_clip, s", "ours, s", "ratio"), rows, facts)


def exchange_block() -> str:
    """Recall in two vector stores by the base's text side and by the one that is laid over them."""
    found = _results("exchange_text_side")
    titles = {"base": "the base's", "exchanged": "the exported one"}
    rows = [
        (store, titles[side], *(percent([value]) for value in figures.values()))
        for store, sides in found["recall"].items()
        for side, figures in sides.items()
    ]
    facts = (
        f"{found['captions']} Portuguese captions among {found['pictures']} pictures of the demo's test split, recall "
        f"in per cent; {found['embedded_again']} pictures were embedded again; "
        f"{software(found, 'qdrant-client', 'lancedb', 'sentence-transformers')}."
    )
    return table(("Store", "Text side", "R@1", "R@5", "R@10", "Mean"), rows, facts, text_columns=2)


def space_load_block() -> str:
    """Memory and answers of the page under load."""
    found = _results("space_load")
    visitors, answers, times = found["visitors"], found["answers"], found.get("milliseconds_in_a_row")
    speed = f" A search takes {times['median']:.0f} ms (median, in a row)." if times else ""
    return (
        f"With {visitors['at_once']:,} visitors at once and then {visitors['in_a_row']:,} in a row the page's memory "
        f"grew by {found['growth_mb']:.0f} MB; of {answers['200']:,} requests, {found['not_answered']} had no answer "
        f"and {answers.get('of them told to come back', 0)} were asked to come back later, on {found['device']}.{speed}"
    )


def _medians(measured: dict[str, Any], key: str, form: str) -> list[str]:
    """Of open_clip and of ours."""
    return [format(measured[who][key], form) for who in ("open_clip", "ours")]


def take_over(runs: list[Path]) -> None:
    """Copy records, run facts and pictures of runs of the demo, a seed each, to where they are committed."""
    records = []
    for run in runs:
        for path in sorted((run / "results").glob("*.json"), reverse=True):
            for record in read_records(path):
                if record.model != "baseline":
                    record = replace(record, model_folder=f"seed-{record.seed}")
                elif run != runs[0]:
                    continue  # the same in all
                records.append(asdict(record))
    write_json(RESULTS / "demo.json", {"records": records, "runs": [read_json(run / "run.json") for run in runs]})
    for name in ("curves.png", "retrieval.png"):
        save_small_picture(runs[0] / name, PICTURES / name)


def save_small_picture(source: Path, target: Path) -> None:
    """A copy of a drawing in 256 colours, a third of the size and the same to the eye."""
    with PIL.Image.open(source) as picture:
        picture.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE).save(target, "PNG", optimize=True)


def filled(page: str, text: str) -> str:
    """The text of a page with every block replaced by what the JSON says.

    Raises:
        ValueError: it does not hold one of its blocks once.
    """
    for name, make in pages()[page].items():
        pattern = re.compile(rf"<!-- {name}: .*?<!-- end {name} -->", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{page} must hold the block {name!r} once.")
        block = BLOCK.format(name=name, text=make().strip())
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def main(argv: list[str] | None = None) -> None:
    """Fill the blocks of all pages, or check them."""
    args = parse(ReadmeArguments, __doc__, argv)
    if args.demo:
        take_over(args.demo)
    if args.real_images:
        shutil.copyfile(args.real_images / "real_images.json", RESULTS / "real_images.json")
    if args.exchange:
        shutil.copyfile(args.exchange / "results.json", RESULTS / "exchange_text_side.json")
    for page in pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        if not args.check:
            write_text(ROOT / page, filled(page, text))
        elif filled(page, text) != text:
            sys.exit(f"{page} is not what benchmarks/results says; run `python -m benchmarks.readme`.")


if __name__ == "__main__":
    run_command(main)
