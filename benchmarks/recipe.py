"""Which changes to the paper's recipe help: train every variant with several seeds, measure all, keep one table.

    python -m benchmarks.recipe
    python -m benchmarks.recipe --only paper interpolate-0.5 --seeds 0

Variants are data, in benchmarks/recipe.yaml. It needs the data of `examples.openmoji.prepare` and of
`examples.openmoji.proxies`. What is done lies in the work folder and is not done again, and after each variant the
results are written (docs/recipe.md shows them). A variant that fails is listed with its error, and the others go on.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import RESULTS, ROOT, conditions
from capivara_common.cli import flag, parse, read_config, run_command, unknown, user_errors
from capivara_common.files import read_json, write_json, write_text
from capivara_common.privacy import hide_paths
from caption_data.rows import digest_of
from eval.capivara_metrics.metrics import RECALL_CUTOFFS, mean_hits, paired_bootstrap
from eval.embeddings import EmbeddingStore, distinct_texts
from eval.records.schema import DIRECTIONS
from eval.retrieval import RetrievalArguments, RetrievalData, RetrievalEmbeddings, flat_captions, load_data
from modeling_capivara import CapivaraModel
from modeling_capivara.embedder import model_embedder
from modeling_capivara.loading import load_model, load_processor, weights_digest
from training.trainable import interpolate_weights

REFERENCE, OURS = "paper", "interpolate-0.7"  # what all are compared with; what configs/openmoji_plus.yaml has
COMPARED = ("openmoji/", "twemoji/", "noto/")  # conditions that get an interval; the others are too small
DRAWINGS = ("openmoji", "twemoji", "noto")
# data set, split, languages
SETS = [
    *((name, split, ("pt", "en")) for name in DRAWINGS for split in ("validation", "test")),
    ("photos", "test", ("pt", "en")),
    ("neighbours", "test", ("es", "fa")),
]
NAMES = "names/test/hi"  # Hindi names of ImageNet's classes find the English ones, and they these: texts alone
DRIFT = "openmoji/test/en"  # whose texts the drift is measured on


@dataclass
class RecipeArguments:
    """Arguments of `benchmarks.recipe`. Raises ValueError where a seed is there twice, or none."""

    variants: Path = flag(ROOT / "benchmarks" / "recipe.yaml", "YAML file of the variants.")
    config: Path = flag(ROOT / "configs" / "openmoji.yaml", "Config that they change.")
    only: list[str] = flag([], "Names of the variants to run; all where none is given.")
    seeds: list[int] = flag([0, 1, 2], "Seeds of each.")
    base: str = flag("data/openmoji/base", "Folder of the base model.")
    openmoji: str = flag("data/openmoji/dataset", "Folder of the demo's data set.")
    proxies: Path = flag(Path("data/openmoji/proxies"), "Folder that `examples.openmoji.proxies` has made.")
    work: Path = flag(Path("runs/recipe"), "Folder of runs and measurements, half a gigabyte a run.")
    output: Path = flag(RESULTS / "recipe.json", "JSON file of the results.")

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {self.seeds}.")


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    what: str  # it is, in words
    flags: dict[str, Any] = field(default_factory=dict)  # of train_accelerate.py
    of: str | None = None  # variant whose finished runs are changed without training
    share: float = 1.0  # of the trained weights, from 0 to 1; the rest is the base's


class RunFailed(Exception):
    """A training that ended with an error; the message is its last line."""


def read_variants(path: Path) -> dict[str, Variant]:
    """The variants of a YAML file, by name.

    Raises:
        ValueError: a key is unknown, `paper` is missing, or what a variant is made `of` is none that is trained.
    """
    variants = {name: _variant(name, content, path) for name, content in read_config(path).items()}
    for variant in variants.values():
        if variant.of and (variant.of not in variants or variants[variant.of].of):
            raise ValueError(f"{path}: {variant.name} is of {variant.of!r}, which is no variant that is trained.")
    if REFERENCE not in variants:
        raise ValueError(f"{path} has no {REFERENCE!r}, which all are compared with.")
    return variants


def _variant(name: str, content: Any, path: Path) -> Variant:
    """Out of its entry in the YAML file, in which every number is text."""
    where, known = f"{path}: {name}", [one.name for one in fields(Variant)][1:]
    if not isinstance(content, dict) or not content.get("what"):
        raise ValueError(f"{where} must say `what` it is in words, got {content!r}.")
    for key in content.keys() - set(known):
        raise ValueError(unknown(key, f"key of {name} in {path}", known, ""))
    variant = Variant(**{"name": name, **content, "flags": content.get("flags") or {}})
    if not re.fullmatch(r"0(\.\d+)?|1(\.0+)?", str(variant.share)):
        raise ValueError(f"{where}: share must be a number from 0 to 1, got {variant.share!r}.")
    if variant.flags and variant.of:
        raise ValueError(f"{where} must have either flags or `of`.")
    return replace(variant, share=float(variant.share))


class Measures:
    """All data, read once; models are measured one after the other, and images embedded once an image tower."""

    def __init__(self, base: str, openmoji: str, proxies: Path, cache: Path) -> None:
        """Read the data.

        Args:
            base: folder of the base model, whose processor all have.
            openmoji: folder of the demo's data set.
            proxies: folder that `examples.openmoji.proxies` has made.
            cache: folder of the embeddings.

        Raises:
            ValueError: a data set is missing.
        """
        self.cache, self.processor = cache, load_processor(base)
        self.data: dict[str, RetrievalData] = {}
        for name, split, languages in SETS:
            folder = openmoji if name == "openmoji" else str(proxies / name)
            for language in languages:
                key, unused = f"{name}/{split}/{language}", Path("unused.json")
                self.data[key] = load_data(RetrievalArguments(base, folder, unused, split=split, language=language))
        lines = (proxies / "parallel-hi.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines]
        self.names = {
            code: [pair[code] for pair in pairs] for code in ("hi", "en")
        }  # the English ones stand for images
        model = load_model(base)
        self.base_digest = weights_digest(model)
        digests = [data.fingerprint() for data in self.data.values()]
        self.fingerprint = digest_of([self.base_digest, *digests, str(self.names)])
        found = self._embedded(model)
        self.base_english = found[DRIFT].text_embeds
        self.chance = {
            f"{key}/{direction}": sum(embeddings.chance(direction, k) for k in RECALL_CUTOFFS) / len(RECALL_CUTOFFS)
            for key, embeddings in found.items()
            for direction in DIRECTIONS
        }

    def of(self, model: CapivaraModel) -> dict[str, Any]:
        """Figures of a model.

        Returns:
            `hits`: condition and direction -> each query's mean hit at 1, 5 and 10, a share from 0 to 1; `drift`: mean
            cosine of its English texts to those of the base; `data`: digest of what it was measured on.
        """
        found = self._embedded(model)
        hits = {
            f"{key}/{direction}": [round(hit, 6) for hit in mean_hits(embeddings.ranks[direction]).tolist()]
            for key, embeddings in found.items()
            for direction in DIRECTIONS
        }
        drift = (found[DRIFT].text_embeds * self.base_english).sum(dim=1).mean().item()
        return {"hits": hits, "drift": drift, "data": self.fingerprint}

    def groups(self, key: str) -> Tensor:
        """(queries,), index of the picture that each query belongs to; `key` as in `hits`."""
        condition, _, direction = key.rpartition("/")
        if condition == NAMES:
            return torch.arange(len(self.names["hi"]))
        captions = self.data[condition].captions
        return torch.arange(len(captions)) if direction == "image_to_text" else flat_captions(captions)[1]

    def _embedded(self, model: CapivaraModel) -> dict[str, RetrievalEmbeddings]:
        embedder = model_embedder("", model.eval(), self.processor, "float32")
        images = EmbeddingStore(embedder, self.cache)  # kept for all models of this image tower
        flat = {key: flat_captions(data.captions) for key, data in self.data.items()}
        texts = [text for some, _ in flat.values() for text in some] + self.names["hi"] + self.names["en"]
        distinct = distinct_texts(texts)
        position = {text: number for number, text in enumerate(distinct)}
        embeds = embedder.texts(distinct)

        def rows(some: list[str]) -> Tensor:
            return embeds[[position[text] for text in some]]

        found = {
            key: RetrievalEmbeddings(rows(flat[key][0]), images.images(data.images).embeds, flat[key][1])
            for key, data in self.data.items()
        }
        names = torch.arange(len(self.names["hi"]))
        found[NAMES] = RetrievalEmbeddings(rows(self.names["hi"]), rows(self.names["en"]), names)
        return found


@dataclass
class Runner:
    """Makes and measures models, each once, in the work folder."""

    args: RecipeArguments
    variants: dict[str, Variant]
    measures: Measures

    def run(self, variant: Variant) -> None:
        """All seeds of a variant, as far as they are not there yet; what fails is noted beside."""
        for seed in map(str, self.args.seeds):
            path = self.folder(variant) / f"{seed}.json"
            failed = path.with_suffix(".failed")
            if path.is_file() and read_json(path).get("data") == self.measures.fingerprint:
                continue
            print(f"{variant.name}, seed {seed}", flush=True)
            try:
                model, seconds = self.model(variant, seed)
            except (RunFailed, ValueError, OSError) as error:
                write_text(failed, hide_paths(str(error)))  # it is shown in the table
                print(f"{variant.name}, seed {seed} failed: {error}", file=sys.stderr)
                continue
            write_json(path, self.measures.of(model) | {"seconds": seconds})
            failed.unlink(missing_ok=True)

    def model(self, variant: Variant, seed: str) -> tuple[CapivaraModel, float]:
        """A model, trained where it is not yet, and the seconds of training and test that are in it."""
        run = self.trained(self.variants[variant.of] if variant.of else variant, seed)
        model = load_model(run)
        interpolate_weights(model, load_model(self.args.base).state_dict(), variant.share)
        return model, sum(read_json(run / "run.json")["seconds"].values())

    def trained(self, variant: Variant, seed: str) -> Path:
        """The folder of a finished run. Raises RunFailed."""
        folder = self.folder(variant) / f"seed-{seed}"
        if (folder / "run.json").is_file():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        args, flags = self.args, []
        for name, value in variant.flags.items():
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(str(one).replace("{proxies}", str(args.proxies.absolute())) for one in values)]
        command = [sys.executable, "train_accelerate.py", "--config", str(args.config.absolute())]
        command += ["--model", str(Path(args.base).absolute()), "--dataset", str(Path(args.openmoji).absolute())]
        command += ["--output_dir", str(folder.absolute()), "--resume", "auto", "--seed", seed, *flags]
        log = folder.with_suffix(".log")
        with log.open("w", encoding="utf-8") as out:
            done = subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=out, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
            )
        if done.returncode or not (folder / "run.json").is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RunFailed(lines[-1] if lines else f"exit code {done.returncode}")
        return folder

    def folder(self, variant: Variant) -> Path:
        """Of a variant, by all that makes it: other flags, another config or base is another folder."""
        source = self.variants[variant.of] if variant.of else variant
        parts = [source.flags, variant.share, read_config(self.args.config), self.measures.base_digest]
        return self.args.work / f"{variant.name}-{digest_of([str(parts)])[:8]}"

    def rows(self) -> list[dict[str, Any]]:
        """A row a variant that has been run, after that of the base; hits of single queries stay in the work folder."""
        path = self.args.work / "base.json"
        if not path.is_file() or read_json(path).get("data") != self.measures.fingerprint:
            write_json(path, self.measures.of(load_model(self.args.base)))
        rows = [{"name": "base", "what": "not trained", **summary({"base": read_json(path)})}]
        reference = self.found(self.variants[REFERENCE])
        for variant in self.variants.values():
            found = self.found(variant)
            failed = [path.read_text(encoding="utf-8") for path in sorted(self.folder(variant).glob("*.failed"))]
            if found or failed:
                row = asdict(variant) | {"failed": failed[0] if failed else None, **summary(found)}
                rows.append(row | {"gain": self.gains(reference, found) if variant.name != REFERENCE else {}})
        return rows

    def found(self, variant: Variant) -> dict[str, dict[str, Any]]:
        """Seed -> what was measured of it, on today's data."""
        paths = sorted(self.folder(variant).glob("*.json"))
        found = {path.stem: read_json(path) for path in paths}
        return {seed: content for seed, content in found.items() if content["data"] == self.measures.fingerprint}

    def gains(self, reference: dict[str, dict], found: dict[str, dict]) -> dict[str, tuple[float, float, float]]:
        """Condition -> mean recall above the reference's, with its 95 % interval; of the seeds that both have."""
        shared = reference.keys() & found.keys()
        sides = [[side[seed] for seed in sorted(shared or side)] for side in (reference, found)]
        if not all(sides):
            return {}
        keys = [key for key in sides[0][0]["hits"] if key.startswith(COMPARED)]
        hits = {
            key: [torch.tensor([one["hits"][key] for one in side]).double().mean(0) for side in sides] for key in keys
        }
        return {key: paired_bootstrap(*hits[key], self.measures.groups(key)) for key in keys}


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of a variant's models: their seeds, and by condition the mean recall of each, a share from 0 to 1."""
    keys = next(iter(found.values()))["hits"] if found else {}
    return {
        "seeds": list(found),
        "seconds": [one["seconds"] for one in found.values() if "seconds" in one],
        "drift": [one["drift"] for one in found.values()],
        "values": {key: [sum(one["hits"][key]) / len(one["hits"][key]) for one in found.values()] for key in keys},
    }


@user_errors
def main(argv: list[str] | None = None) -> None:
    """Run the variants, and write the results after each."""
    args = parse(RecipeArguments, __doc__, argv)
    variants = read_variants(args.variants)
    for name in args.only:
        if name not in variants:
            raise ValueError(unknown(name, "variant", list(variants), f"{args.variants} has all."))
    measures = Measures(args.base, args.openmoji, args.proxies, args.work / "cache")
    runner = Runner(args, variants, measures)
    for variant in variants.values():
        if not args.only or variant.name in args.only:
            runner.run(variant)
            facts = conditions() | {"config": read_config(args.config)}
            numbers = {key: len(measures.groups(key)) for key in measures.chance}
            write_json(args.output, facts | {"n": numbers, "chance": measures.chance, "rows": runner.rows()})
    print(f"Results: {args.output}. `python -m benchmarks.readme` takes README's short table from them.")


if __name__ == "__main__":
    run_command(main, resumes=True)
