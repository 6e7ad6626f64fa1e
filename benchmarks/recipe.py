"""The paper's recipe on the embedded default, and parts of the way to its result by weights, with several seeds.

    python -m benchmarks.recipe
    python -m benchmarks.recipe --base data/openmoji/base-sigmoid --output benchmarks/results/recipe_sigmoid.json

The loss is the base's, as `examples.openmoji.prepare` has aligned it. It needs the data of that and of
`examples.openmoji.proxies`. Finished runs lie in the work folder and are not trained again; all are measured
(docs/recipe.md shows the results).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train_accelerate
from benchmarks.timing import CODE_ROOT, RESULTS_FOLDER, describe_conditions
from capivara_common.cli import flag, parse_arguments, read_yaml_config, run_command
from capivara_common.files import read_json, write_json
from caption_data.rows import json_digest
from eval.capivara_metrics.metrics import mean_hits, paired_bootstrap
from eval.embeddings import EmbeddingStore
from eval.records.schema import DIRECTIONS
from eval.retrieval import (
    RetrievalArguments,
    RetrievalData,
    RetrievalEmbeddings,
    compute_retrieval_records,
    load_retrieval_data,
)
from modeling_capivara import CapivaraModel
from modeling_capivara.loading import load_model, load_processor, weights_digest
from modeling_capivara.two_towers import build_embedder
from training.trainable import interpolate_weights

REFERENCE_ROW = "paper"  # what the others are compared with: all of the way
TRAINED_SHARES = {
    REFERENCE_ROW: 1.0,
    "interpolate-0.5": 0.5,
    "interpolate-0.7": 0.7,
}  # of the trained weights, the rest the base's
DRAWING_SETS = ("openmoji", "twemoji", "noto")  # whose conditions get an interval; the photographs are too few
EVALUATION_SPLITS = [*((name, split) for name in DRAWING_SETS for split in ("validation", "test")), ("photos", "test")]
HitsByCondition = dict[
    str, Tensor
]  # such as "noto/test/pt/text_to_image" -> each query's mean hit at 1, 5 and 10, 0 to 1


@dataclass
class RecipeArguments:
    """Arguments of `benchmarks.recipe`. Raises ValueError where a seed is there twice, or none."""

    gone = dict.fromkeys(("only", "variants"), "three shares of the weights are measured, from one training a seed")
    config: Path = flag(CODE_ROOT / "configs" / "openmoji.yaml", "Config of the training.")
    seeds: list[int] = flag([0, 1, 2], "Seeds of each.")
    base: str = flag("data/openmoji/base", "Folder of the base model.")
    openmoji: str = flag("data/openmoji/dataset", "Folder of the demo's data set.")
    proxies: Path = flag(Path("data/openmoji/proxies"), "Folder that `examples.openmoji.proxies` has made.")
    work: Path = flag(Path("runs/recipe"), "Folder of runs and embeddings, half a gigabyte a run.")
    output: Path = flag(RESULTS_FOLDER / "recipe.json", "JSON file of the results.")

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {self.seeds}.")


def load_evaluation_data(args: RecipeArguments) -> dict[str, RetrievalData]:
    """Data set, split and language, such as "noto/test/pt" -> its data; ValueError where a data set is missing."""
    folders = {name: args.openmoji if name == "openmoji" else str(args.proxies / name) for name, _ in EVALUATION_SPLITS}
    return {
        f"{name}/{split}/{code}": load_retrieval_data(
            RetrievalArguments(args.base, folders[name], Path("unused.json"), split=split, language=code)
        )
        for name, split in EVALUATION_SPLITS
        for code in ("pt", "en")
    }


def find_or_train_run(seed: int, args: RecipeArguments, base_digest: str) -> Path:
    """The folder of a finished run; another config or base is another folder. Raises as `train_accelerate.main`."""
    made_of = json_digest([str([read_yaml_config(args.config), base_digest])])[:8]
    folder = args.work / made_of / f"seed-{seed}"
    if (folder / "run.json").is_file():
        return folder
    flags = {"config": args.config, "output_dir": folder, "resume": "auto", "seed": seed}
    flags |= {"model": args.base, "dataset": args.openmoji}
    train_accelerate.main([f"--{name}={value}" for name, value in flags.items()])
    return folder


def build_row(
    name: str, hits: list[HitsByCondition], reference: list[HitsByCondition], groups: dict[str, Tensor]
) -> dict[str, Any]:
    """By condition each seed's mean recall, a share from 0 to 1, and how far the means of the seeds are above the
    reference's, with the 95 % interval of a bootstrap over `groups`: the index of the picture of each query."""

    def means(side: list[HitsByCondition], key: str) -> Tensor:
        return torch.stack([one[key] for one in side]).double().mean(0)

    compared = [key for key in groups if key.startswith(DRAWING_SETS) and hits is not reference]
    return {
        "name": name,
        "values": {key: [one[key].double().mean().item() for one in hits] for key in groups},
        "gain": {key: paired_bootstrap(means(reference, key), means(hits, key), groups[key]) for key in compared},
    }


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, measure all, and write the results."""
    args = parse_arguments(RecipeArguments, __doc__, argv)
    data, processor, base = load_evaluation_data(args), load_processor(args.base), load_model(args.base)

    def embedded(model: CapivaraModel) -> dict[str, RetrievalEmbeddings]:  # images once an image tower
        store = EmbeddingStore(build_embedder("", model.eval(), processor, "float32"), args.work / "cache")
        return {condition: one.embed(store)[0] for condition, one in data.items()}

    def measured(model: CapivaraModel) -> HitsByCondition:
        found = embedded(model).items()
        return {f"{key}/{direction}": mean_hits(of.ranks[direction]) for key, of in found for direction in DIRECTIONS}

    groups, chance = {}, {}
    for key, of in embedded(base).items():
        for record in compute_retrieval_records(
            of, dataset=key, split="", language="", model="baseline", model_folder=""
        ):
            if record.metric == "mean_recall":
                condition = f"{key}/{record.direction}"
                groups[condition], chance[condition] = of.query_groups(record.direction), record.chance
    hits: dict[str, list[HitsByCondition]] = {name: [] for name in TRAINED_SHARES}
    digest, seconds, before = weights_digest(base), [], [measured(base)]
    for seed in args.seeds:
        run = find_or_train_run(seed, args, digest)
        seconds.append(sum(read_json(run / "run.json")["seconds"].values()))
        for name, share in TRAINED_SHARES.items():
            interpolate_weights(model := load_model(run), base.state_dict(), share)
            hits[name].append(measured(model))
    about = {"seeds": args.seeds, "seconds": seconds}
    rows = [build_row("base", before, before, groups)]
    rows += [build_row(name, found, hits[REFERENCE_ROW], groups) | about for name, found in hits.items()]
    facts = {
        "config": read_yaml_config(args.config),
        "n": {key: len(of) for key, of in groups.items()},
        "chance": chance,
    }
    write_json(args.output, describe_conditions() | facts | {"rows": rows})
    print(f"Results: {args.output}. `python -m benchmarks.readme` takes README's short table from them.")


if __name__ == "__main__":
    run_command(main, resumable=True)
