r"""Fine-tuning by sentence-transformers' own trainer, on pictures with captions (extra: sentence_transformers).

    python -m hub_upload.export --model data/openmoji/base --output repository \
        --formats transformers,sentence_transformers
    python -m examples.tune_sentence_transformers --model repository --dataset data/openmoji/dataset --language pt \
        --output_dir runs/tuned

For whoever trains in that library already. Its loss is CLIP's, exactly, when three options are given (`build_clip_loss`):
both directions, a softmax each, and the model's own learnt scale in the place of a fixed one; gradients are cached, so
that a batch of any size fits. What it lacks beside `train_accelerate.py`: the frozen image tower sees every picture
twice in every epoch, and a picture has one caption for the whole training.

The output is a folder for sentence-transformers and `CapivaraModel.from_pretrained` alike, with `results.json`.
"""

import html
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import TrainerCallback

import modeling_capivara  # noqa: F401  registers CAPIVARA with the Auto classes: no code of the folder is run
from capivara_common.cli import check_at_least, flag, parse_arguments, run_command
from capivara_common.environment import resolve_precision
from capivara_common.files import atomic_folder, write_json, write_text
from eval.retrieval import flatten_captions
from examples import describe_run
from examples.openmoji.dataset import load_dataset_with_images
from modeling_capivara.modeling_capivara import similarity_logits
from training.trainable import clamp_logit_scale

RECALL_CUTOFFS = [1, 5, 10]

CARD_TEMPLATE = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
language: ["{language}"]
tags: [capivara]
---

# {model}, fine-tuned

On the pictures and captions of {dataset}; `results.json` has settings and figures. It inherits the licences of that
model and of those data.
"""


@dataclass
class SentenceTuningArguments:
    """Arguments of `examples.tune_sentence_transformers`."""

    model: Path = flag(..., "Folder of a model that was exported with the format sentence_transformers.")
    dataset: Path = flag(..., "Saved HF data set with the columns image and captions-LANGUAGE.")
    language: str = flag("pt", "Language of the captions.")
    output_dir: Path = flag(Path("runs/tuned"), "Folder for the model and its figures.")
    overwrite_output_dir: bool = flag(False, "Replace what is in the output folder.")
    train_split: str = flag("train", "Split that is learnt from.")
    split: str = flag("test", "Split that is measured, before and after.")
    epochs: float = flag(3.0, "Passes over the training pictures, each with one caption.")
    batch_size: int = flag(256, "Pictures, with a caption each, that the loss compares in a step.")
    mini_batch_size: int = flag(32, "Of them, how many are embedded at once; changes memory, not the result.")
    learning_rate: float = flag(1e-5, "At its height.")
    seed: int = flag(0, "Seed of the order and of the captions that are drawn.")

    def __post_init__(self) -> None:
        check_at_least(self, 2, "batch_size")
        check_at_least(self, 1, "mini_batch_size")


def load_pairs(dataset: Path, split: str, language: str, seed: int = 0) -> Dataset:
    """A row a picture, `text` before `image` as the loss takes them; of several captions one, by the seed.

    A text stands in a dictionary: a bare one that is an address or a file's name sentence-transformers would fetch.

    Raises:
        ValueError: there is no such split or column (those that are there are named), or a picture has no caption.
    """
    data = load_dataset_with_images(dataset)
    if split not in data:
        raise ValueError(f"{dataset} has no split {split!r}; it has {', '.join(data)}.")
    column = f"captions-{language}"
    if not {"image", column} <= set(data[split].column_names):
        raise ValueError(f"{dataset} needs the columns image and {column}; it has {data[split].column_names}.")
    captions = [[found] if isinstance(found, str) else found for found in data[split][column]]
    flatten_captions(captions)  # for its errors
    draw = random.Random(seed)
    texts = [{"text": draw.choice(found)} for found in captions]
    return data[split].select_columns("image").add_column("text", texts).select_columns(["text", "image"])


def build_clip_loss(encoder: SentenceTransformer, mini_batch_size: int) -> CachedMultipleNegativesRankingLoss:
    """`modeling_capivara.clip_loss` of a whole batch, of which `mini_batch_size` rows are embedded at once.

    Exact on one device without accumulation of gradients, by which the scale's would not be divided. On several, where
    it would need `gather_across_devices`, it was not tried.
    """
    return CachedMultipleNegativesRankingLoss(
        encoder,
        scale=1.0,  # in the similarity, where it is learnt
        similarity_fct=partial(similarity_logits, logit_scale=encoder[0].auto_model.logit_scale),
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
        mini_batch_size=mini_batch_size,
    )


def build_recall_evaluator(rows: Dataset) -> InformationRetrievalEvaluator:
    """Texts find their picture: its accuracy@k is `eval.retrieval`'s recall@k, but for ties."""
    names = [f"{number:08}" for number in range(len(rows))]
    return InformationRetrievalEvaluator(
        dict(zip(names, rows["text"], strict=True)), dict(zip(names, rows["image"], strict=True)),
        {name: {name} for name in names}, accuracy_at_k=RECALL_CUTOFFS, precision_recall_at_k=RECALL_CUTOFFS, write_csv=False,
    )  # fmt: skip


class ClampLogitScaleCallback(TrainerCallback):
    """Keeps the learnt scale below CLIP's bound."""

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """After every step of the optimiser."""
        clamp_logit_scale(model[0].auto_model.logit_scale)


def main(argv: list[str] | None = None) -> None:
    """Measure, train, measure again, and save."""
    args = parse_arguments(SentenceTuningArguments, __doc__, argv)
    if not (args.model / "modules.json").is_file():
        raise ValueError(f"{args.model} is no export of the format sentence_transformers (modules.json is missing).")
    rows = load_pairs(args.dataset, args.train_split, args.language, args.seed)
    if len(rows) < args.batch_size:
        raise ValueError(f"{args.train_split} has {len(rows)} pictures, fewer than a batch: lower --batch_size.")
    measure = build_recall_evaluator(load_pairs(args.dataset, args.split, args.language))
    with atomic_folder(args.output_dir, args.overwrite_output_dir) as folder:
        encoder = SentenceTransformer(str(args.model))
        encoder[0].auto_model.freeze_image_encoder()  # as in the paper
        training = Arguments(
            output_dir=str(folder),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,  # share of all steps
            seed=args.seed,
            dataloader_drop_last=True,  # a last batch of one pair has no wrong answer
            save_strategy="no",
            logging_steps=10,
            use_cpu=encoder.device.type == "cpu",
            bf16=resolve_precision("auto", encoder.device) == "bf16",
            dataloader_pin_memory=encoder.device.type != "cpu",
            report_to="none",
        )
        loss = build_clip_loss(encoder, args.mini_batch_size)
        trainer = SentenceTransformerTrainer(encoder, training, rows, loss=loss, callbacks=[ClampLogitScaleCallback()])
        before = measure(encoder.eval())
        seconds = trainer.train().metrics["train_runtime"]
        recalls = {
            when: {f"recall@{k}": float(found[f"cosine_accuracy@{k}"]) for k in RECALL_CUTOFFS}
            for when, found in (("before", before), ("after", measure(encoder.eval())))
        }
        encoder.save_pretrained(str(folder), create_model_card=False)
        facts = describe_run(args, encoder.device, "sentence-transformers")
        shown = {name: html.escape(facts["config"][name]) for name in ("model", "dataset", "language")}
        write_json(folder / "results.json", facts | {"text_to_image": recalls, "training_s": seconds})
        write_text(folder / "README.md", CARD_TEMPLATE.format(**shown))
    for when, found in recalls.items():
        print(f"{when:8}" + "".join(f"{name:>12} {100 * value:6.2f} %" for name, value in found.items()))
    print(args.output_dir)


if __name__ == "__main__":
    run_command(main)
