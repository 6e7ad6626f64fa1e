"""Rows of the word embeddings that occur are trained alone: the same weights as where the whole table is trained."""

import pytest
import torch
from accelerate import Accelerator
from exact_step_process import CAPTIONS, SEED, build, make_batch
from safetensors.torch import load_file
from test_train_accelerate import flags
from tiny import TINY_TEXT

import train_accelerate
from modeling_capivara.kept_pieces import used_ids
from modeling_capivara.loading import load_model
from training.step import ExactStep, sparse_embedding_gradients
from training.vocabulary import UsedRows, used_vocabulary, whole_vocabulary

TABLE = "text_model.embeddings.word_embeddings.weight"


def trained(processor, ids=None, decay: float = 0.0, min_rows: int = 0):
    """A tiny model after three steps, dropout on, with the rows of `ids` trained, or all; and its parameters' number"""
    model, accelerator = build(trained_images=False), Accelerator(cpu=True)
    batches, embeds = make_batch(False)
    everything = torch.arange(TINY_TEXT["vocab_size"])
    with used_vocabulary(model, everything if ids is None else ids), sparse_embedding_gradients(model, min_rows):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=1e-2, weight_decay=decay, fused=True)
        step = ExactStep(model, model.logit_scale, accelerator, SEED, "recompute")
        for number in range(3):
            optimizer.zero_grad(set_to_none=False)
            step(number, batches, len(CAPTIONS), embeds)
            optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, sum(p.numel() for p in parameters)


@pytest.mark.parametrize("min_rows", [0, 10_000])  # gradients of looked-up rows, and autograd's own
def test_the_weights_are_those_of_the_whole_table(tiny_processor, min_rows):
    ids = used_ids(tiny_processor, CAPTIONS)
    assert 4 < len(ids) < TINY_TEXT["vocab_size"] / 2
    (used, fewer), (whole, more) = (trained(tiny_processor, rows, min_rows=min_rows) for rows in (ids, None))
    assert more - fewer == (TINY_TEXT["vocab_size"] - len(ids)) * TINY_TEXT["hidden_size"]
    before = build(trained_images=False).state_dict()
    moved = (used[TABLE] != before[TABLE]).any(dim=1).nonzero().flatten().tolist()
    assert moved and set(moved) == set(ids.tolist()) - {tiny_processor.tokenizer.pad_token_id}
    assert used.keys() == whole.keys() == before.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(used[name], tensor, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("decay", [0.2, 0.02])
def test_a_decay_moves_unused_rows(tiny_processor, decay):
    """Why `used` is refused with one: coupled L2 is all the gradient of an unused row, which Adam takes at full length.

    Each number moves by the learning rate in every step, whatever the decay, towards zero: 5863 steps of the paper move
    all of the table by the sum of their rates, 0.0018.
    """
    ids = used_ids(tiny_processor, CAPTIONS)
    used, whole = (trained(tiny_processor, rows, decay=decay)[0][TABLE] for rows in (ids, None))
    torch.testing.assert_close(used[ids], whole[ids], rtol=0, atol=1e-5)
    unused = torch.ones(len(used), dtype=torch.bool).index_fill(0, ids, False)
    before = build(trained_images=False).state_dict()[TABLE][unused]
    far = before.abs() > 0.05  # farther from zero than three steps go
    assert torch.equal(used[unused], before) and far.float().mean() > 0.5
    moved = (before - whole[unused])[far] * before[far].sign()
    torch.testing.assert_close(moved, torch.full_like(moved, 3 * 1e-2), rtol=0.02, atol=0)


def test_other_tokens_are_embedded_as_before_and_not_trained(tiny_processor):
    model = build(trained_images=False).eval()
    tokens = tiny_processor(text=["uma foto azul", "wxyz"], return_tensors="pt")
    expected = model(**tokens).text_embeds
    with used_vocabulary(model, used_ids(tiny_processor, ["uma foto", "azul"])):
        assert torch.equal(model(**tokens).text_embeds, expected)
        with pytest.raises(ValueError, match="in none of the texts of this training"):
            model.train()(**tokens)


def test_a_model_in_training_is_saved_whole(tiny_processor, tmp_path):
    model = build(trained_images=False)
    with used_vocabulary(model, used_ids(tiny_processor, CAPTIONS)):
        used = model.get_input_embeddings()
        used.part.weight.data += 1
        with whole_vocabulary(model):
            model.save_pretrained(tmp_path)
        assert model.get_input_embeddings() is used
    saved = load_model(tmp_path).state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    with whole_vocabulary(model):
        assert not isinstance(model.get_input_embeddings(), UsedRows)


def test_a_frozen_table_is_left_alone(tiny_processor):
    model = build(trained_images=False)
    model.get_input_embeddings().requires_grad_(False)
    with used_vocabulary(model, used_ids(tiny_processor, CAPTIONS)):
        assert not isinstance(model.get_input_embeddings(), UsedRows)


@pytest.mark.slow
def test_a_run_saves_the_same_model_and_smaller_checkpoints(tiny_folder, tiny_dataset_folder, tmp_path):
    folders = {}
    for which in ("used", "all"):
        out = tmp_path / which
        options = {"save_steps": 3, "trained_vocabulary": which}
        folders[which] = train_accelerate.main(flags(tiny_folder, tiny_dataset_folder, out, **options))
    used, whole = (load_file(folder / "model.safetensors") for folder in folders.values())
    assert used.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(used[name], tensor, rtol=0, atol=1e-6, msg=name)
    sizes = [sum(p.stat().st_size for p in f.rglob("checkpoints/step-*/*")) for f in folders.values()]
    assert sizes[0] < sizes[1]


def test_a_table_that_peft_trains_as_a_whole_is_left_alone(tiny_processor):
    peft = pytest.importorskip("peft")
    model = build(trained_images=False)
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["text_model.embeddings"])
    peft.get_peft_model(model, config)
    before = model.get_input_embeddings()
    assert before.weight.requires_grad
    with used_vocabulary(model, used_ids(tiny_processor, ["gato"])):
        assert model.get_input_embeddings() is before
