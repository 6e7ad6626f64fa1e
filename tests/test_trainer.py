"""`ExactBatchTrainer`: its gradients equal those of the whole batch at once, at every optimizer step."""

import numpy as np
import pytest
import torch
from tiny import TINY_TEXT, randomize, tiny_config
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_capivara import CapivaraModel
from training.trainer import ExactBatchTrainer

CAPTIONS = ["gato", "uma foto de um gato azul", "a casa", "o carro verde e a árvore", "pão", "são joão", "água", "cão"]
CAPTIONS += ["um céu azul", "a capivara"]
MICRO, ACCUMULATED = 2, 4  # ten pairs make a step of eight pairs and a step of two pairs


def pairs() -> list[dict]:
    pixels = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 40, 36, 3), dtype=np.uint8)
    return [{"text": text, "image": image} for text, image in zip(CAPTIONS, pixels, strict=True)]


def build(frozen: bool) -> CapivaraModel:
    """Build a model without dropout, so that the whole batch can be compared with one forward pass."""
    config = tiny_config(text_config={**TINY_TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    model = randomize(CapivaraModel(config))
    if frozen:
        model.freeze_image_encoder()
    return model.train()


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def collator(processor):
    def collate(rows: list[dict]) -> dict:
        texts, images = [row["text"] for row in rows], [row["image"] for row in rows]
        return {**processor(text=texts, images=images, return_tensors="pt"), "return_loss": True}

    return collate


def trained(kind: type[Trainer], model, processor, folder, data: list[dict], micro: int = MICRO, accumulated: int = 4):
    """Train one epoch in the order of the data; return the gradients of every optimizer step and the logged losses."""
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulated, num_train_epochs=1,
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0, logging_steps=1, use_cpu=True,
        remove_unused_columns=False, report_to="none", save_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    gradients = Gradients()
    collate = collator(processor)
    trainer = kind(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[gradients])
    trainer.train()
    return gradients.steps, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def largest_difference(actual: dict, expected: dict) -> float:
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    return max((actual[name] - gradient).abs().max().item() for name, gradient in expected.items()) / scale.item()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["both towers", "frozen image tower"])
def test_gradients_are_those_of_the_whole_batch(tiny_processor, tmp_path, frozen):
    data = pairs()
    exact = trained(ExactBatchTrainer, build(frozen), tiny_processor, tmp_path, data)
    # transformers' own Trainer, with enough memory for the whole batch.
    whole = trained(Trainer, build(frozen), tiny_processor, tmp_path, data, MICRO * ACCUMULATED, 1)
    assert len(exact[0]) == len(whole[0]) == 2
    for actual, expected in zip(exact[0], whole[0], strict=True):
        assert largest_difference(actual, expected) < 1e-5
    assert exact[1] == pytest.approx(whole[1], rel=1e-3)


def test_transformers_trainer_counts_tokens_and_accepts_a_last_batch_of_one_pair(tiny_processor, tmp_path):
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, per_device_eval_batch_size=2, num_train_epochs=1, use_cpu=True,
        include_num_input_tokens_seen="all", logging_steps=1, remove_unused_columns=False, report_to="none",
        save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    data, collate = pairs()[:3], collator(tiny_processor)
    trainer = Trainer(build(False), arguments, collate, train_dataset=data, eval_dataset=data)
    trainer.train()
    batches = [collate(data[:2]), collate(data[2:])]
    assert trainer.state.num_input_tokens_seen == sum(batch["input_ids"].numel() for batch in batches)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] > 0 and losses[1] == 0
    with torch.no_grad():  # mean over three pairs; the loss of the last pair, alone in its batch, is 0
        expected = trainer.model.eval()(**batches[0]).loss.item() * 2 / 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_works_and_an_incomplete_batch_is_refused(tiny_processor, tmp_path):
    options = {"use_cpu": True, "remove_unused_columns": False, "report_to": "none"}
    arguments = TrainingArguments(tmp_path, gradient_accumulation_steps=2, **options)
    batch = tiny_processor(text=CAPTIONS, images=[row["image"] for row in pairs()], return_tensors="pt")

    def collate_all(rows: list[dict]) -> dict:
        return {**batch, "return_loss": True}

    trainer = ExactBatchTrainer(build(False), arguments, collate_all, train_dataset=pairs(), eval_dataset=pairs()[:3])
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.data_collator = lambda rows: {name: batch[name] for name in ("input_ids", "pixel_values")}
    with pytest.raises(ValueError, match=r"attention_mask.*input_ids, pixel_values"):
        trainer.train()
