"""What a run measures: the validation split during training, the test split before and after it."""

from pathlib import Path

from accelerate import Accelerator

from capivara_common.environment import device_description
from capivara_common.files import write_text
from capivara_common.privacy import short_name
from eval.records.picture_sheets import plot_retrieval_sheet
from eval.records.schema import Record, header, write_records
from eval.records.tables import retrieval_table
from eval.retrieval import (
    RetrievalEmbeddings,
    embed_captions,
    gain_records,
    retrieval_records,
    validation_measures,
)
from modeling_capivara import CapivaraModel
from training.arguments import RunArguments
from training.inputs import Inputs


def validate(model: CapivaraModel, inputs: Inputs) -> dict[str, dict[str, float]]:
    """What is measured during training.

    Returns:
        `validation`: mean recall of the validation split in each direction, a share from 0 to 1, and its loss in nats.
    """
    model.eval()
    embeddings = embed_captions(model, inputs.processor, inputs.validation.captions(), inputs.validation_embeds)
    return {"validation": validation_measures(embeddings, model.logit_scale)}


def embed_test(model: CapivaraModel, inputs: Inputs) -> dict[str, RetrievalEmbeddings]:
    """Language -> the test split embedded by the model."""
    model.eval()
    return {
        language: embed_captions(model, inputs.processor, split.captions(), inputs.test_embeds)
        for language, split in inputs.test.items()
    }


def baseline_records(args: RunArguments, baseline: dict[str, RetrievalEmbeddings]) -> list[Record]:
    """The base model's figures in each language."""
    records = []
    for language, embeddings in baseline.items():
        records += retrieval_records(embeddings, **_record_fields(args, language, "baseline", args.model, None))
    return records


def trained_records(
    args: RunArguments,
    baseline: dict[str, RetrievalEmbeddings],
    trained: dict[str, RetrievalEmbeddings],
) -> list[Record]:
    """The records of a trained model on the test split, of all languages, and its gains over the base model."""
    records, gains = [], []
    for language, embeddings in trained.items():
        fields = _record_fields(args, language, "capivara", ".", args.seed)
        records += retrieval_records(embeddings, **fields)
        gains += gain_records(baseline[language], embeddings, **fields)
    return records + gains


def draw_sheet(
    args: RunArguments,
    inputs: Inputs,
    baseline: dict[str, RetrievalEmbeddings],
    trained: dict[str, RetrievalEmbeddings],
    path: Path,
) -> None:
    """Draw five test captions, chosen by the rule of `sheet_queries`, with what each model finds for them."""
    split = inputs.test[args.language]
    models = {"baseline": baseline[args.language], "capivara": trained[args.language]}
    plot_retrieval_sheet(
        images=split,
        queries=[text for texts in split.captions() for text in texts],
        right_images=models["capivara"].image_of_text.tolist(),
        scores=lambda role, query: models[role].image_embeds @ models[role].text_embeds[query],
        ranks={role: embeddings.ranks("text_to_image") for role, embeddings in models.items()},
        seed=args.seed,
        language=args.language,
        path=path,
    )


def write_results(
    args: RunArguments, records: list[Record], inputs: Inputs, accelerator: Accelerator, folder: Path
) -> None:
    """Write the result files, one a language, and the table of all."""
    for language in args.eval_languages:
        facts = header(
            dataset=args.evaluation_dataset,
            dataset_fingerprint=inputs.test[language].fingerprint,
            model=".",
            device=device_description(accelerator.device),
            precision="float32",
        )
        name = f"retrieval_{short_name(args.evaluation_dataset).replace('/', '_')}_{args.test_split}_{language}.json"
        write_records(folder / "results" / name, [record for record in records if record.language == language], facts)
    write_text(folder / "table.md", retrieval_table(records))


def _record_fields(args: RunArguments, language: str, model: str, model_folder: str, seed: int | None) -> dict:
    return {
        "dataset": short_name(args.evaluation_dataset),
        "split": args.test_split,
        "language": language,
        "model": model,
        "model_folder": model_folder,
        "seed": seed,
    }
