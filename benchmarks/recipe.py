"""Measure how much the CAPIVARA paper's training recipe improves recall on the OpenMoji demo, with several seeds.

    python -m benchmarks.recipe
    python -m benchmarks.recipe --base data/openmoji/base-sigmoid --output benchmarks/results/recipe_sigmoid.json

Run `examples.openmoji.prepare` and `examples.openmoji.proxies` first. The demo's base model is fine-tuned with each
seed. The trained weights are measured alone and mixed with the base weights (WiSE-FT weight interpolation, arXiv
2109.01903). The second command trains with the sigmoid loss.

Finished training runs stay in the work folder and are not repeated. docs/explanation/recipe.md shows the results.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train_accelerate
from benchmarks.tools import CODE_ROOT, RESULTS_FOLDER, describe_measurement_conditions
from capivara_common.cli import flag, parse_arguments, read_yaml_config, run_main_and_report_user_errors
from capivara_common.files import json_digest, read_json, write_json
from eval import retrieval
from eval.capivara_metrics.metrics import mean_hits, paired_bootstrap
from eval.embeddings import CachedEmbedder
from eval.records.result_files import DIRECTIONS
from modeling_capivara import CapivaraModel
from modeling_capivara.loading import load_model, load_processor, weights_digest
from modeling_capivara.two_towers import build_embedder
from training.trainable import interpolate_weights

# Name of the result row of the trained model without weight interpolation. All other rows are compared with this row.
REFERENCE_ROW = "paper"
# Share α of the trained weights in the weight interpolation (WiSE-FT), for each result row by its name. The row's model
# has the weights α * trained weights + (1 - α) * base weights.
TRAINED_SHARES = {REFERENCE_ROW: 1.0, "interpolate-0.5": 0.5, "interpolate-0.7": 0.7}
# Datasets of drawings. Only they get confidence intervals, because the dataset `photos` has too few images for them.
DRAWING_SETS = ("openmoji", "twemoji", "noto")
EVALUATION_SPLITS = [*((name, split) for name in DRAWING_SETS for split in ("validation", "test")), ("photos", "test")]
# Keys are conditions "DATASET/SPLIT/LANGUAGE/DIRECTION", such as "noto/test/pt/text_to_image". Values have the shape
# (queries,). The value of a query is 0, 1/3, 2/3 or 1: the share of the cutoffs k = 1, 5 and 10 for which the item that
# belongs to the query is among the first k results.
HitsByCondition = dict[str, Tensor]


@dataclass
class RecipeArguments:
    """Command-line arguments of `benchmarks.recipe`, which trains and evaluates the demo model with several seeds.

    Raises:
        ValueError: If no seed is given or a seed is given twice.
    """

    config: Path = flag(CODE_ROOT / "configs" / "openmoji.yaml", "YAML file with the training flags.")
    seeds: list[int] = flag([0, 1, 2], "Seeds of the training runs, one run per seed.")
    base: str = flag("data/openmoji/base", "Folder of the base model, from `examples.openmoji.prepare`.")
    openmoji: str = flag("data/openmoji/dataset", "Folder of the OpenMoji dataset, from `examples.openmoji.prepare`.")
    proxies: Path = flag(Path("data/openmoji/proxies"), "Output folder of `examples.openmoji.proxies`.")
    work: Path = flag(Path("runs/recipe"), "Folder for runs and embeddings. Needs half a gigabyte per run.")
    output: Path = flag(RESULTS_FOLDER / "recipe.json", "JSON file for the results.")

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more different numbers, got {self.seeds}.")


def _load_evaluation_data(args: RecipeArguments) -> dict[str, retrieval.RetrievalData]:
    """Load all evaluation datasets.

    Returns:
        The data by dataset, split and language, such as "noto/test/pt".

    Raises:
        ValueError: If a dataset is missing.
    """
    data = {}
    for (name, split), code in product(EVALUATION_SPLITS, ("pt", "en")):
        folder, unused = args.openmoji if name == "openmoji" else str(args.proxies / name), Path("unused.json")
        arguments = retrieval.RetrievalArguments(args.base, folder, unused, split=split, language=code)
        data[f"{name}/{split}/{code}"] = retrieval.load_retrieval_data(arguments)
    return data


def find_or_train_run(seed: int, args: RecipeArguments, base_digest: str) -> Path:
    """Return the folder of the training run with a given seed. The run is trained first if it does not exist.

    Args:
        seed: Seed of the training.
        args: Command-line arguments of the benchmark: config, base model, dataset and work folder of the training.
        base_digest: Digest of the base model's weights.

    Returns:
        Output folder of the finished run, with the trained weights and run.json.
    """
    # A finished run is reused if its config, base model and seed are the same.
    digest = json_digest([str([read_yaml_config(args.config), base_digest])])[:8]
    folder = args.work / digest / f"seed-{seed}"
    if (folder / "run.json").is_file():
        return folder
    flags = {"config": args.config, "output_dir": folder, "resume": "auto", "seed": seed}
    flags |= {"model": args.base, "dataset": args.openmoji}
    train_accelerate.main([f"--{name}={value}" for name, value in flags.items()])
    return folder


def _build_row_of_recalls_and_gains(
    name: str, hits: list[HitsByCondition], reference: list[HitsByCondition], groups: dict[str, Tensor]
) -> dict[str, Any]:
    """Summarize one row of the results: the recall of one kind of model, and its gain over the reference row.

    Args:
        name: Name of the row, such as "interpolate-0.5".
        hits: Hits of the row's models, one dict per seed.
        reference: Hits of the models of the reference row, one dict per seed.
        groups: For each condition, the image index of each query.

    Returns:
        A dict with these keys:

        - "name": name of the row.
        - "values": `{condition: mean recall (0 to 1) of each seed}`.
        - "gain": `{condition: (gain, low, high)}`, only for drawings and empty for the reference row. The gain is the
          mean recall minus that of the reference row. Low and high are the ends of its 95 % interval (paired
          bootstrap).
    """

    def average_seeds(hits_of_seeds: list[HitsByCondition], key: str) -> Tensor:
        return torch.stack([seed_hits[key] for seed_hits in hits_of_seeds]).double().mean(0)

    values = {key: [seed_hits[key].double().mean().item() for seed_hits in hits] for key in groups}
    gains = {}
    for key in groups:
        if key.startswith(DRAWING_SETS) and hits is not reference:
            gains[key] = paired_bootstrap(average_seeds(reference, key), average_seeds(hits, key), groups[key])
    return {"name": name, "values": values, "gain": gains}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark: train every seed that has no finished run, evaluate all runs, and write the results as JSON.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(RecipeArguments, __doc__, argv)
    data, processor, base = _load_evaluation_data(args), load_processor(args.base), load_model(args.base)

    # `CachedEmbedder` caches image embeddings, so models with the same image tower embed the images only once.
    def embed(model: CapivaraModel) -> dict[str, retrieval.RetrievalEmbeddings]:
        cached_embedder = CachedEmbedder(build_embedder("", model.eval(), processor, "float32"), args.work / "cache")
        return {key: dataset.embed(cached_embedder)[0] for key, dataset in data.items()}

    def measure(model: CapivaraModel) -> HitsByCondition:
        return {
            f"{key}/{direction}": mean_hits(embeddings.ranks[direction])
            for key, embeddings in embed(model).items()
            for direction in DIRECTIONS
        }

    groups, chance = {}, {}
    for key, embeddings in embed(base).items():
        metadata = {"dataset": key, "split": "", "language": "", "model": "baseline", "model_folder": ""}
        for record in retrieval.compute_retrieval_records(embeddings, **metadata):
            if record.metric == "mean_recall":
                condition = f"{key}/{record.direction}"
                groups[condition], chance[condition] = embeddings.query_groups(record.direction), record.chance
    hits: dict[str, list[HitsByCondition]] = {name: [] for name in TRAINED_SHARES}
    digest, seconds, base_hits = weights_digest(base), [], [measure(base)]
    for seed in args.seeds:
        run = find_or_train_run(seed, args, digest)
        seconds.append(sum(read_json(run / "run.json")["seconds"].values()))
        for name, share in TRAINED_SHARES.items():
            model = load_model(run)
            interpolate_weights(model, base.state_dict(), share)
            hits[name].append(measure(model))
    rows = [_build_row_of_recalls_and_gains("base", base_hits, base_hits, groups)]
    for name, row_hits in hits.items():
        row = _build_row_of_recalls_and_gains(name, row_hits, hits[REFERENCE_ROW], groups)
        rows.append(row | {"seeds": args.seeds, "seconds": seconds})
    counts = {key: len(queries) for key, queries in groups.items()}
    results = {"config": read_yaml_config(args.config), "n": counts, "chance": chance, "rows": rows}
    write_json(args.output, describe_measurement_conditions() | results)
    print(f"Results: {args.output}. `python -m benchmarks.documentation_tables` updates the tables.")


if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
