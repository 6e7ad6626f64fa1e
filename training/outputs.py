"""What a run measures and writes beside its weights: result files, table, pictures, and `run.json`."""

import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from capivara_common.environment import device_description, package_versions
from capivara_common.files import read_json, write_json, write_text
from capivara_common.privacy import short_name
from eval.records.plots import plot_retrieval_sheet, plot_training_curves
from eval.records.schema import SCHEMA_VERSION, write_records
from eval.records.tables import retrieval_table
from eval.retrieval import embed_captions, gain_records, retrieval_records
from modeling_capivara.loading import load_model
from training.arguments import RunArguments
from training.checkpoints import TrainerState
from training.inputs import Inputs
from training.trainable import FIXED


def measure(args: RunArguments, inputs: Inputs, accelerator: Accelerator, folder: Path) -> None:
    """Measure the base and the model that was saved in `folder` on the test split of every language.

    Result files, table and sheet of pictures are written beside the model, the seconds of measuring into `run.json`.
    """
    started, run = time.perf_counter(), read_json(folder / "run.json", seconds=dict)
    models = {"baseline": args.model, "capivara": folder}
    models = {role: load_model(name).eval().to(accelerator.device) for role, name in models.items()}
    table, measured = [], {}
    for language, split in inputs.test.items():
        both = measured[language] = {
            role: embed_captions(model, inputs.processor, split.captions(), inputs.test_embeds)
            for role, model in models.items()
        }
        facts = {"dataset": short_name(args.evaluation_dataset), "split": args.test_split, "language": language}
        trained = facts | {"model": "capivara", "model_folder": ".", "seed": args.seed}
        records = retrieval_records(both["baseline"], **facts, model="baseline", model_folder=args.model, seed=None)
        records += retrieval_records(both["capivara"], **trained) + gain_records(*both.values(), **trained)
        name = f"retrieval_{facts['dataset'].replace('/', '_')}_{args.test_split}_{language}.json"
        write_records(
            folder / "results" / name, records, dataset=args.evaluation_dataset, fingerprint=split.fingerprint,
            model=".", device=device_description(accelerator.device), precision="float32",
        )  # fmt: skip
        table += records
    run["seconds"]["evaluation"] = time.perf_counter() - started
    write_text(folder / "table.md", retrieval_table(table))
    split, shown = inputs.test[args.language], measured[args.language]
    queries = [text for texts in split.captions() for text in texts]
    plot_retrieval_sheet(folder / "retrieval.png", split.__getitem__, queries, shown, args.seed, args.language)
    write_json(folder / "run.json", run)


def write_run(
    args: RunArguments, state: TrainerState, inputs: Inputs, origins: dict[str, Any], used: Any, folder: Path
) -> None:
    """Write the curves of a training that is done, and `run.json`, all that it was.

    `origins` is what base and data say of themselves, as `hub_upload.origins` has it; `used` codecarbon's
    `final_emissions_data`, None without `carbon_country`.
    """
    plot_training_curves(state.curve, args.language, folder / "curves.png", words=args.language)
    pairs = state.step * args.effective_batch_size
    energy = used and {
        "kwh": used.energy_consumed,
        "kg_co2e": used.emissions,
        "hours": used.duration / 3600,
        "country": args.carbon_country,
        "cpu": used.cpu_model,
        "gpu": used.gpu_model or None,
        "covers": "this session of the run, on the machine of the main process",
        "method": f"codecarbon {metadata.version('codecarbon')}, offline; estimated without a power meter",
    }
    facts = {
        "schema_version": SCHEMA_VERSION,
        "config": args.to_dict(),
        "fixed": FIXED,
        "origins": origins,
        "seed": args.seed,
        "dataset_fingerprints": state.data,
        "skipped_rows": dict(Counter(line.reason for line in inputs.skipped)),
        "versions": package_versions(),
        "device": device_description(PartialState().device),
        "processes": PartialState().num_processes,
        "steps": state.step,
        "pairs": pairs,
        "seconds": {"training": state.seconds},  # with the measurements of the validation split in it
        "pairs_per_second": pairs / state.seconds,
        "energy": energy or {},
        "curve": state.curve,
    }
    write_json(folder / "run.json", facts)
