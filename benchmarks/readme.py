"""The figures of the README, out of the JSON in benchmarks/results and out of nothing else.

python -m benchmarks.readme           # rewrites the blocks between the markers
python -m benchmarks.readme --demo runs/openmoji-pt-001   # takes over the results of a run of the demo first
python -m benchmarks.readme --real_images runs/real_images   # and of examples.real_images
python -m benchmarks.readme --check   # fails where a block is not what the JSON says
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import captions, captions_selection, scaling, train_step
from common.files import write_json, write_text
from records.schema import Record, read_records
from records.tables import retrieval_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs"
BLOCK = "<!-- {name}: made by `python -m benchmarks.readme` -->\n{text}\n<!-- end {name} -->"


def blocks() -> dict[str, str]:
    """Name of a block of the README -> its text."""
    return {
        "demo": demo_block(),
        "encode": encode_block(),
        "train_step": train_step.markdown_table(_results("train_step")),
        "scaling": scaling.markdown_table(_results("scaling")),
        "loading": loading_block(),
        "real_images": real_images_block(),
        "eval_retrieval": eval_retrieval_block(),
        "export": export_block(),
        "space": space_block(),
        "captions": captions.markdown_table(_results("captions")),
        "captions_selection": captions_selection.markdown_table(_results("captions_selection")),
    }


def _results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], facts: str) -> str:
    """A table whose first column is text and whose others are numbers, and a paragraph under it."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(heads) - 1), *lines[1:], "", facts])


def loading_block() -> str:
    loading = _results("loading")
    rows = [
        (name.replace("_", " "), f"{measured['images_per_second']:.1f}", f"{measured['share_waiting']:.0%}")
        for name, measured in loading["measured"].items()
    ]
    width, height = loading["image_size"]
    facts = (
        f"{loading['images']} JPEG files of {width} x {height} pixels out of a tar, {loading['workers']} loading "
        f"process(es), the image tower at full size in {loading['precision']}, on {loading['device']}."
    )
    return _table(("what", "images/s", "waiting for images"), rows, facts)


def real_images_block() -> str:
    found = _results("real_images")
    records = [Record(**record) for record in found["records"]]
    wanted = {"retrieval": ("mean_recall",), "classification": ("accuracy",), "linear_probe": ("accuracy",)}
    keys = dict.fromkeys(
        (r.task, r.dataset, r.language, r.protocol, r.direction, r.metric)
        for r in records
        if r.metric in wanted[r.task]
    )
    lines = ["| Task | Data set | Measure | n | Baseline | CAPIVARA | Chance |", "|---|---|---|---:|---:|---:|---:|"]
    for key in keys:
        same = [r for r in records if (r.task, r.dataset, r.language, r.protocol, r.direction, r.metric) == key]
        values = {r.model: f"{100 * r.value:.1f}" for r in same}
        task, dataset, language, protocol, direction, metric = key
        what = f"{metric.replace('_', ' ')}, {direction.replace('_', ' ')}, {language}" if direction else metric
        what = f"{metric}, {protocol}" if task == "linear_probe" else what
        chance = "" if same[0].chance is None else f"{100 * same[0].chance:.1f}"
        cells = [task.replace("_", " "), dataset, what, str(same[0].n), values["baseline"], values.get("capivara", "")]
        lines.append("| " + " | ".join([*cells, chance]) + " |")
    versions = found["versions"]
    facts = (
        f"Models of the demo, measured on {found['device']}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}. In per cent; the linear probe sees the image tower alone, which both share."
    )
    return "\n".join([*lines, "", facts])


def eval_retrieval_block() -> str:
    found = _results("eval_retrieval")
    scores, way = found["scores"], found["end_to_end"]
    names = {
        "scores": f"recall at 1, 5, 10 of {scores['images']:,} images x {scores['captions']:,} captions",
        "end_to_end": f"decode, embed and score {way['images']} images x {way['captions']} captions, full size",
    }
    rows = [
        (
            name,
            *(f"{found[part]['seconds'][who]:.2f}" for who in ("clip_benchmark", "ours")),
            f"{found[part]['ratio']:.1f}",
        )
        for part, name in names.items()
    ]
    memory = (
        f"Medians of {scores['runs']} alternating runs on {scores['device']}, recalls equal; over the embeddings ours "
        f"holds {scores['memory_over_embeddings_bytes'] / 2**20:.0f} MiB."
    )
    if "large" in found:
        large = found["large"]
        memory += (
            f" {large['images']:,} images x {large['captions']:,} captions take {large['seconds'] / 60:.0f} minutes, "
            f"with {large['memory_over_embeddings_bytes'] / 2**20:.0f} MiB over the embeddings, where all scores would "
            f"be {large['all_scores_bytes'] / 1e9:.0f} GB."
        )
    return _table(("what", "clip-benchmark, s", "ours, s", "ratio"), rows, memory)


def export_block() -> str:
    found = _results("export")
    loads = {"cold load": found["load"]["load"], "cold load, every weight read once": found["load"]["load_and_read"]}
    rows = [
        (name, *(f"{load[who]['median_s']:.2f}" for who in ("open_clip", "ours")), f"{load['ratio']:.2f}")
        for name, load in loads.items()
    ]
    facts = (
        f"Full size, {found['weights_bytes'] / 1e9:.2f} GB of weights, median of {found['runs']} alternating runs on "
        f"{found['device']}; page cache: {found['load']['page_cache']}. Over the imports, the export holds "
        f"{found['export']['ratio_to_weights']:.2f} times the weights at its peak, the push "
        f"{found['push']['ratio_to_weights']:.2f} times."
    )
    return _table(("what", "open_clip, s", "ours, s", "ratio"), rows, facts)


def space_block() -> str:
    found, load = _results("space"), _results("space_load")
    demo, full = (found["milliseconds"][name]["answer"]["wall"]["median"] for name in ("demo", "full_size"))
    return (
        f"Among {found['pictures']:,} pictures a text of {found['tokens']} tokens is answered in {demo:.0f} ms by the "
        f"demo's model and in {full:.0f} ms at full size (medians of {found['questions']}, page included, on "
        f"{found['device']}). With {load['visitors']['at_once']:,} visitors at once and then "
        f"{load['visitors']['in_a_row']:,} in a row its memory grew by {load['growth_mb']:.0f} MB; of "
        f"{load['answers']['200']:,} requests, {load['not_answered']} had no answer and "
        f"{load['answers'].get('of them told to come back', 0)} were told to come back (`python -m "
        "benchmarks.space_load`, on a machine with other work)."
    )


def demo_block() -> str:
    demo = _results("demo")
    records = [Record(**record) for record in demo["records"]]
    minutes = sum(demo["runs"][0]["seconds"].values()) / 60
    run = demo["runs"][0]
    facts = (
        f"{len(demo['runs'])} seed(s), {run['steps']} steps of {run['config']['effective_batch_size']} pairs, "
        f"{minutes:.1f} minutes of training and evaluation a seed on {run['device']}, {records[0].n} test captions of "
        "unseen concepts; recall in per cent."
    )
    return f"{retrieval_table(records)}\n{facts}"


def encode_block() -> str:
    encode = _results("encode")
    rows = [
        (
            name.replace("_", " per second, "),
            *(f"{measured[who]['median']:.1f}" for who in ("open_clip", "ours")),
            f"{measured['ratio']:.2f}",
        )
        for name, measured in encode["measured"].items()
    ]
    versions = encode["versions"]
    width, height = encode["image_size"]
    facts = (
        f"Full size, random weights, {encode['images']} images of {width} x {height} pixels, "
        f"{encode['captions']} captions of {encode['tokens']} tokens, median of {encode['runs']} alternating runs on "
        f"{encode['device']}; torch {versions['torch']}, transformers {versions['transformers']}, open_clip "
        f"{versions['open_clip_torch']}."
    )
    return _table(("what", "open_clip", "ours", "ratio"), rows, facts)


def take_over(run: Path) -> None:
    """Copy records, run facts and pictures of a run of the demo to where they are committed."""
    paths = sorted((run / "results").glob("*.json"), reverse=True)
    records = [asdict(record) for path in paths for record in read_records(path)]
    folders = sorted(run.glob("seed-*")) or [run]
    runs = [json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in folders]
    write_json(RESULTS / "demo.json", {"records": records, "runs": runs})
    PICTURES.mkdir(exist_ok=True)
    for name in ("curves.png", "retrieval.png"):
        shutil.copyfile(folders[0] / name, PICTURES / name)


def filled(text: str) -> str:
    """The README's text with every block replaced by what the JSON says."""
    for name, content in blocks().items():
        pattern = re.compile(rf"<!-- {name}: .*?<!-- end {name} -->", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README.md must hold the block {name!r} once.")
        text = pattern.sub(lambda _, name=name, content=content: BLOCK.format(name=name, text=content.strip()), text)
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder of a run of configs/openmoji.yaml")
    parser.add_argument("--real_images", type=Path, help="output folder of examples.real_images")
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a figure is not the JSON's")
    args = parser.parse_args(argv)
    if args.demo:
        take_over(args.demo)
    if args.real_images:
        shutil.copyfile(args.real_images / "real_images.json", RESULTS / "real_images.json")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if not args.check:
        write_text(readme, filled(text))
    elif filled(text) != text:
        sys.exit("README.md is not what benchmarks/results says; run `python -m benchmarks.readme`.")


if __name__ == "__main__":
    main()
