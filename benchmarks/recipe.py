"""Which changes to the paper's recipe help: train every variant with several seeds, measure all, keep one table.

    python -m benchmarks.recipe
    python -m benchmarks.recipe --only interpolate-0.5 --seeds 0
    python -m benchmarks.recipe --base data/openmoji/base-sigmoid --output benchmarks/results/recipe_sigmoid.json

Variants are data, in benchmarks/recipe.yaml; the loss is the base's, as `examples.openmoji.prepare` has aligned it. It
needs the data of that and of `examples.openmoji.proxies`. Finished runs lie in the work folder and are not trained
again; all are measured, and the results are written after each variant (docs/recipe.md shows them).
"""

import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import RESULTS, ROOT, conditions
from capivara_common.cli import flag, parse, read_config, run_command, unknown
from capivara_common.files import read_json, write_json
from caption_data.rows import digest_of
from eval.capivara_metrics.metrics import mean_hits, paired_bootstrap
from eval.embeddings import EmbeddingStore
from eval.records.schema import DIRECTIONS
from eval.retrieval import RetrievalArguments, RetrievalEmbeddings, load_data, retrieval_records
from modeling_capivara import CapivaraModel
from modeling_capivara.loading import load_model, load_processor, weights_digest
from modeling_capivara.two_towers import model_embedder
from training.trainable import interpolate_weights

REFERENCE, OURS = "paper", "interpolate-0.7"  # what all are compared with; what configs/openmoji_plus.yaml has
COMPARED = ("openmoji/", "twemoji/", "noto/")  # conditions that get an interval; the others are too small
DRAWINGS = ("openmoji", "twemoji", "noto")
SETS = [*((name, split) for name in DRAWINGS for split in ("validation", "test")), ("photos", "test")]


@dataclass
class RecipeArguments:
    """Arguments of `benchmarks.recipe`. Raises ValueError where a seed is there twice, or none."""

    variants: Path = flag(ROOT / "benchmarks" / "recipe.yaml", "YAML file of the variants.")
    config: Path = flag(ROOT / "configs" / "openmoji.yaml", "Config that they change.")
    only: list[str] = flag([], f"Names of the variants to run, beside {REFERENCE}; all where none is given.")
    seeds: list[int] = flag([0, 1, 2], "Seeds of each.")
    base: str = flag("data/openmoji/base", "Folder of the base model.")
    openmoji: str = flag("data/openmoji/dataset", "Folder of the demo's data set.")
    proxies: Path = flag(Path("data/openmoji/proxies"), "Folder that `examples.openmoji.proxies` has made.")
    work: Path = flag(Path("runs/recipe"), "Folder of runs and embeddings, half a gigabyte a run.")
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


def read_variants(path: Path) -> dict[str, Variant]:
    """The variants of a YAML file, by name, `paper` first. Raises ValueError where one can't be."""
    variants, keys = {}, [one.name for one in fields(Variant)][1:]
    for name, content in read_config(path).items():
        if not isinstance(content, dict) or not content.get("what"):
            raise ValueError(f"{path}: {name} must say `what` it is in words, got {content!r}.")
        for key in content.keys() - set(keys):
            raise ValueError(unknown(key, f"key of {name} in {path}", keys, ""))
        made = variants[name] = Variant(name, **content | {"share": float(content.get("share", 1))})
        if not 0 <= made.share <= 1:
            raise ValueError(f"{path}: {name}: share must be a number from 0 to 1, got {made.share}.")
        if made.of and (made.flags or made.of not in variants or variants[made.of].of):
            raise ValueError(f"{path}: {name} must have flags, or be `of` a variant above that is trained.")
    if next(iter(variants), None) != REFERENCE:
        raise ValueError(f"{path} must begin with {REFERENCE!r}, which all are compared with.")
    return variants


class Measures:
    """All data, read once; models are measured one after the other, and images embedded once an image tower."""

    def __init__(self, args: RecipeArguments) -> None:
        """Read the data. Raises ValueError where a data set is missing."""
        self.processor, self.cache, self.data = load_processor(args.base), args.work / "cache", {}
        for name, split in SETS:
            folder = args.openmoji if name == "openmoji" else str(args.proxies / name)
            for language in ("pt", "en"):
                read = RetrievalArguments(args.base, folder, Path("unused.json"), split=split, language=language)
                self.data[f"{name}/{split}/{language}"] = load_data(read)

    def embedded(self, model: CapivaraModel) -> dict[str, RetrievalEmbeddings]:
        """Data set, split and language, such as "noto/test/pt" -> embeddings of a model."""
        store = EmbeddingStore(model_embedder("", model.eval(), self.processor, "float32"), self.cache)
        return {condition: data.embedded(store)[0] for condition, data in self.data.items()}

    def hits(self, model: CapivaraModel) -> dict[str, Tensor]:
        """Such a condition and direction -> each query's mean hit at 1, 5 and 10, a share from 0 to 1."""
        found = self.embedded(model).items()
        return {f"{key}/{direction}": mean_hits(of.ranks[direction]) for key, of in found for direction in DIRECTIONS}


def trained(variant: Variant, seed: int, args: RecipeArguments, base_digest: str) -> Path:
    """The folder of a finished run, by all that makes it: other flags, another config or base is another folder.

    Raises ValueError where the training fails.
    """
    made_of = digest_of([str([variant.flags, read_config(args.config), base_digest])])[:8]
    folder = (args.work / f"{variant.name}-{made_of}" / f"seed-{seed}").absolute()
    if (folder / "run.json").is_file():
        return folder
    print(f"{variant.name}, seed {seed}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    flags = {"config": args.config.absolute(), "output_dir": folder, "resume": "auto", "seed": seed}
    flags |= {"model": Path(args.base).absolute(), "dataset": Path(args.openmoji).absolute()} | variant.flags
    words = [f"--{name}={value}" for name, value in flags.items() if not isinstance(value, list)]
    words += [word for name, value in flags.items() if isinstance(value, list) for word in (f"--{name}", *value)]
    log = folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as out:
        command = [sys.executable, "train_accelerate.py", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, check=False, env=environment)
    if done.returncode:
        *_, last = ["", *log.read_text(encoding="utf-8", errors="replace").strip().splitlines()]
        raise ValueError(f"{variant.name}, seed {seed} ended with {done.returncode}, see {log}: {last}")
    return folder


def values(hits: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    """By condition the mean recall of each model, a share from 0 to 1."""
    return {key: [of_model[key].double().mean().item() for of_model in hits] for key in hits[0]}


def gains(
    reference: list[dict[str, Tensor]], hits: list[dict[str, Tensor]], groups: dict[str, Tensor]
) -> dict[str, tuple[float, float, float]]:
    """Condition -> mean recall above the reference's, seeds averaged, with its 95 % interval.

    `groups` has the index of the picture that each query of a condition belongs to.
    """

    def averaged(side: list[dict[str, Tensor]], key: str) -> Tensor:
        return torch.stack([one[key] for one in side]).double().mean(0)

    keys = [key for key in groups if key.startswith(COMPARED)]
    return {key: paired_bootstrap(averaged(reference, key), averaged(hits, key), groups[key]) for key in keys}


def main(argv: list[str] | None = None) -> None:
    """Run the variants, and write the results after each."""
    args = parse(RecipeArguments, __doc__, argv)
    variants = read_variants(args.variants)
    for name in args.only:
        if name not in variants:
            raise ValueError(unknown(name, "variant", list(variants), f"{args.variants} has all."))
    measures, base = Measures(args), load_model(args.base)
    digest, before = weights_digest(base), measures.embedded(base)
    groups, chance = {}, {}
    for key, of in before.items():
        for record in retrieval_records(of, dataset=key, split="", language="", model="baseline", model_folder=""):
            if record.metric == "mean_recall":
                condition = f"{key}/{record.direction}"
                groups[condition], chance[condition] = of.groups(record.direction), record.chance
    facts = {"config": read_config(args.config), "n": {key: len(of) for key, of in groups.items()}, "chance": chance}
    rows: list[dict[str, Any]] = [{"name": "base", "what": "not trained", "values": values([measures.hits(base)])}]
    hits: dict[str, list[dict[str, Tensor]]] = {}
    for name, variant in variants.items():
        if args.only and name not in (REFERENCE, *args.only):
            continue
        hits[name], seconds = [], []
        for seed in args.seeds:
            run = trained(variants[variant.of] if variant.of else variant, seed, args, digest)
            model = load_model(run)
            interpolate_weights(model, base.state_dict(), variant.share)
            hits[name].append(measures.hits(model))
            seconds.append(sum(read_json(run / "run.json")["seconds"].values()))
        gain = gains(hits[REFERENCE], hits[name], groups) if name != REFERENCE else {}
        found = {"seeds": args.seeds, "seconds": seconds, "values": values(hits[name]), "gain": gain}
        rows.append(asdict(variant) | found)
        write_json(args.output, conditions() | facts | {"rows": rows})
    print(f"Results: {args.output}. `python -m benchmarks.readme` takes README's short table from them.")


if __name__ == "__main__":
    run_command(main, resumes=True)
