"""Captions by a bank and by a language model: right by hand, honest about what they are, refused before long work."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from examples import caption, prefix_captioner
from examples.prefix_captioner import (
    CaptionArguments,
    CaptionedEmbeds,
    PrefixCaptioner,
    PrefixMapper,
    load_language_model,
    train_captioner,
)
from modeling_capivara.two_towers import embed_images

WORDS = ["azul", "verde", "vermelho", "branco", "foto"]


def sentence_tokenizer(sentences: list[str], pieces: int = 300) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on the sentences, for any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=pieces, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>")


def small_language_model(sentences: list[str], folder: Path, passes: int) -> None:
    """Train a small GPT-2 on sentences, and save it."""
    tokenizer = sentence_tokenizer(sentences)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 96, "bos_token_id": end, "eos_token_id": end}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    ids = [torch.tensor([end, *found, end]) for found in tokenizer(sentences)["input_ids"]]
    for _ in range(passes):
        for rows in torch.randperm(len(ids)).split(32):
            chosen = [ids[row] for row in rows.tolist()]
            labels = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-100)
            optimiser.zero_grad()
            model(input_ids=labels.clamp_min(0), attention_mask=(labels != -100).long(), labels=labels).loss.backward()
            optimiser.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def language_folder(tmp_path_factory):
    """A GPT-2 of toy width with random weights, strong enough that another prefix gives other words."""
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = sentence_tokenizer([" ".join(WORDS), "foto 1 azul verde", "branco 3"], 300)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def captioner(language_folder):
    model, tokenizer = load_language_model(str(language_folder), torch.device("cpu"))
    torch.manual_seed(1)
    return PrefixCaptioner(PrefixMapper(24, 32, 4, 2).eval(), model, tokenizer)


def flags(tiny_folder, tiny_dataset_folder, *more: str) -> list[str]:
    return ["--model", str(tiny_folder), "--dataset", str(tiny_dataset_folder), *more]


# --- A bank ----------------------------------------------------------------------------------------------------------


def test_the_best_sentences_come_first():
    images = torch.eye(3)[[0, 2]]
    texts = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, -1]]), dim=1)
    found = caption.bank_captions(images, texts, ["a", "b", "c", "d"], 2)
    assert [[one.text for one in row] for row in found] == [["a", "c"], ["c", "b"]]
    assert found[0][1].score == pytest.approx(0.5**0.5) and found[1][1].score == 0
    assert [len(row) for row in caption.bank_captions(images, texts, ["a", "b", "c", "d"], 9)] == [4, 4]


def test_scores_by_hand():
    """Two pictures; what is unlike nothing that is said scores nothing."""
    references = [["um gato azul sentado"], ["uma casa verde", "casa de cor verde"]]
    perfect = caption.word_scores(["Um gato azul, sentado!", "uma casa verde"], references)
    assert perfect["BLEU-1"] == pytest.approx(1) and perfect["BLEU-3"] == pytest.approx(1)
    wrong = caption.word_scores(["três", "quatro"], references)
    assert wrong["CIDEr"] == 0 and wrong["BLEU-1"] < 1e-3
    half = caption.word_scores(["um gato verde deitado", "uma casa verde"], references)
    assert half["BLEU-1"] == pytest.approx(5 / 7) and 0 < half["CIDEr"] < perfect["CIDEr"] <= 10
    assert list(half) == list(caption.FIGURES)


def test_a_split_with_the_captions_of_another(tiny_folder, tiny_dataset_folder, tmp_path, capsys):
    out = tmp_path / "captions.json"
    caption.main(flags(tiny_folder, tiny_dataset_folder, "--top_k", "2", "--output", str(out)))
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [one["picture"] for one in found["captions"]] == [f"test/{row}" for row in range(8)]
    texts = {text["text"] for one in found["captions"] for text in one["captions"]}
    assert all(re.fullmatch(r"foto \d+ azul \w+|\w+ \d+", text) for text in texts)
    scores = [text["score"] for text in found["captions"][0]["captions"]]
    assert len(scores) == 2 and 1 >= scores[0] >= scores[1] >= -1
    assert found["made"] == {"bank": 18} and {"torch", "pycocoevalcap"} <= found["versions"].keys()
    assert set(found["measured"]) == set(caption.FIGURES)
    printed = capsys.readouterr().out
    assert f"CIDEr {found['measured']['CIDEr']:.3f}" in printed and printed.count("test/") == 8
    assert str(tmp_path) not in out.read_text(encoding="utf-8").replace(out.name, ""), "a place of this machine"


def test_a_folder_with_a_bank_as_csv(tiny_folder, tmp_path):
    (tmp_path / "fotos" / "praia").mkdir(parents=True)
    for number, name in enumerate(["a.png", "praia/b, c.png"]):
        Image.new("RGB", (40, 30), (90 * number, 0, 200)).save(tmp_path / "fotos" / name)
    (tmp_path / "fotos" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "frases.txt").write_text("um céu azul\n\num gato\num gato\n  a casa  \n", encoding="utf-8")
    words = ["--model", str(tiny_folder), "--pictures", str(tmp_path / "fotos"), "--bank", str(tmp_path / "frases.txt")]
    caption.main([*words, "--output", str(tmp_path / "out.csv")])
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == ["a.png"] * 3 + ["praia/b, c.png"] * 3
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 2
    assert {row["caption"] for row in rows} == {"um céu azul", "um gato", "a casa"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "captions.txt"], r"must end in .json or .csv, got captions.txt"),
        (["--top_k", "0"], "top_k must be at least 1, got 0"),
        (["--language_model", "lm"], "--language_model and --mapper.*give both"),
        (["--language_model", "lm", "--mapper", "m", "--bank", "b"], "Leave one of them out"),
        (["--language_model", "lm", "--mapper", "m", "--top_k", "9"], "5 beams has no 9 captions"),
        (["--bank", "missing.txt"], "missing.txt"),
        (["--split", "nothing"], "nothing"),
        (["--train_split", "none"], "none"),
        (["--language_model", "no/such", "--mapper", "m"], "no/such"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(words, message, tiny_folder, tiny_dataset_folder):
    with pytest.raises(SystemExit, match=message) as ended:
        caption.main(flags(tiny_folder, tiny_dataset_folder, *words))
    assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)


def test_a_bank_out_of_windows(tmp_path):
    (tmp_path / "bank.txt").write_bytes("\ufeffum gato\r\numa casa\r\num gato".encode())
    assert caption.read_bank(tmp_path / "bank.txt") == ["um gato", "uma casa"]


def test_the_device_that_is_named_is_the_one_that_worked(tiny_folder, tiny_dataset_folder, tmp_path, monkeypatch):
    """Without --device that is the GPU, where there is one."""
    asked = []
    monkeypatch.setattr(caption, "torch_device", lambda name: asked.append(name) or torch.device("meta"))
    caption.main(flags(tiny_folder, tiny_dataset_folder, "--output", str(tmp_path / "out.json")))
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert asked == [None] and found["device"].endswith("(meta)")


def test_references_without_a_word():
    with pytest.raises(ValueError, match="No caption of the data set has a word"):
        caption.word_scores(["um gato"], [["🐈!", "..."]])


def test_what_is_printed_does_not_steer_the_terminal(tiny_folder, tmp_path, capsys):
    (tmp_path / "fotos").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "fotos" / "a\x1b[31m.png")
    (tmp_path / "bank.txt").write_text("um \x1b]0;gato\x07", encoding="utf-8")
    words = ["--pictures", str(tmp_path / "fotos"), "--bank", str(tmp_path / "bank.txt")]
    caption.main(["--model", str(tiny_folder), *words])
    printed = capsys.readouterr().out
    assert "gato" in printed and "\x1b" not in printed and "\x07" not in printed


def test_an_empty_bank(tmp_path):
    (tmp_path / "bank.txt").write_text("\n  \n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no sentence"):
        caption.read_bank(tmp_path / "bank.txt")
    (tmp_path / "bank.txt").write_bytes("gato é".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        caption.read_bank(tmp_path / "bank.txt")
    with pytest.raises(ValueError, match=r"There is no bank .*none.txt. It must be a text file"):
        caption.read_bank(tmp_path / "none.txt")


# --- A language model ------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_captions_alone(captioner):
    """Against the language model's own probabilities, one token after another, without padding."""
    embeds, texts = torch.nn.functional.normalize(torch.randn(2, 24), dim=1), ["foto azul", "branco verde vermelho 3"]
    model, tokenizer = captioner.language_model, captioner.tokenizer
    logs, tokens = [], 0
    for embed, text in zip(embeds, texts, strict=True):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        inputs = torch.cat([captioner.mapper(embed[None])[0], model.get_input_embeddings()(torch.tensor(ids))])
        shares = model(inputs_embeds=inputs[None]).logits[0].log_softmax(-1)
        logs += [shares[4 - 1 + place, token] for place, token in enumerate(ids)]
        tokens += len(ids)
    assert tokens > 6
    torch.testing.assert_close(captioner.loss(embeds, texts), -torch.stack(logs).mean(), atol=1e-5, rtol=0)


def test_the_language_model_stays_as_it_is(captioner):
    captioner.loss(torch.randn(2, 24), ["foto", "azul"]).backward()
    assert all(parameter.grad is None for parameter in captioner.language_model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in captioner.mapper.named_parameters()
               if "in_proj_bias" not in name)  # fmt: skip


def test_greedy_words_are_the_likeliest(captioner):
    embeds = torch.nn.functional.normalize(torch.randn(3, 24), dim=1)
    found = captioner.captions(embeds, number=1, num_beams=1, max_new_tokens=5, batch_size=2)
    for embed, (text,) in zip(embeds, found, strict=True):
        inputs, ids = captioner.mapper(embed[None]), []
        while len(ids) < 5 and captioner.tokenizer.eos_token_id not in ids:
            ids.append(captioner.language_model(inputs_embeds=inputs).logits[0, -1].argmax().item())
            word = captioner.language_model.get_input_embeddings()(torch.tensor([ids[-1:]]))
            inputs = torch.cat([inputs, word], dim=1)
        assert text == captioner.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert len({text for (text,) in found}) > 1, "another picture has other words"
    assert [len(texts) for texts in captioner.captions(embeds, number=3, num_beams=4, max_new_tokens=5)] == [3] * 3


def trained(tiny_folder, tiny_dataset_folder, language_folder, folder: Path, *more: str) -> list[str]:
    words = ["--language_model", str(language_folder), "--mapper", str(folder), "--prefix_length", "3"]
    words += ["--mapper_layers", "1", "--batch_size", "6", "--learning_rate", "3e-3", "--max_new_tokens", "8"]
    return flags(tiny_folder, tiny_dataset_folder, *words, *more)


@pytest.mark.slow
def test_it_is_trained_kept_and_used_again(tiny_folder, tiny_dataset_folder, language_folder, tmp_path, capsys):
    outs = [tmp_path / "one.json", tmp_path / "two.json"]
    for out in outs:
        words = trained(tiny_folder, tiny_dataset_folder, language_folder, tmp_path / "mapper", "--epochs", "6")
        caption.main([*words, "--output", str(out)])
        shared = re.sub(r"\d+ pictures could.*", "", capsys.readouterr().out)
        assert "CIDEr" in shared
    one, two = (json.loads(out.read_text(encoding="utf-8")) for out in outs)
    assert one["captions"] == two["captions"] and one["made"] == two["made"], "read, not trained again"
    losses = one["made"]["validation_losses"]
    assert min(losses[1:]) < 0.9 * losses[0], losses
    assert str(tmp_path) not in (tmp_path / "mapper" / "config.json").read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "mapper").iterdir()) == ["config.json", "mapper.safetensors"]


@pytest.mark.slow
def test_reranked_captions_are_in_the_order_of_their_cosine(
    tiny_folder, tiny_dataset_folder, language_folder, tmp_path
):
    found = {}
    for name, more in {"plain": [], "rerank": ["--rerank"]}.items():
        words = trained(tiny_folder, tiny_dataset_folder, language_folder, tmp_path / "mapper", "--epochs", "1", *more)
        caption.main([*words, "--top_k", "5", "--output", str(tmp_path / f"{name}.json")])
        found[name] = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["captions"]
    for plain, ordered in zip(found["plain"], found["rerank"], strict=True):
        scores = [one["score"] for one in ordered["captions"]]
        assert scores == sorted(scores, reverse=True)
        assert sorted(one["text"] for one in plain["captions"]) == sorted(one["text"] for one in ordered["captions"])
    assert found["plain"] != found["rerank"]


@pytest.mark.slow
def test_a_mapping_network_of_another_model_is_refused(tiny_folder, tiny_dataset_folder, language_folder, tmp_path):
    words = trained(tiny_folder, tiny_dataset_folder, language_folder, tmp_path / "mapper", "--epochs", "1")
    caption.main(words)
    config = json.loads((tmp_path / "mapper" / "config.json").read_text(encoding="utf-8"))
    for name, what in (("language_model_digest", "another language model"), ("image_fingerprint", "another image")):
        (tmp_path / "mapper" / "config.json").write_text(json.dumps(config | {name: "0"}), encoding="utf-8")
        with pytest.raises(SystemExit, match=what):
            caption.main(words)
    for shape in ({}, config["shape"] | {"layers": "1"}, config["shape"] | {"length": 4}):
        (tmp_path / "mapper" / "config.json").write_text(json.dumps(config | {"shape": shape}), encoding="utf-8")
        with pytest.raises(SystemExit, match="can't be read"):
            caption.main(words)
    (tmp_path / "mapper" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "mapper" / "mapper.safetensors").write_bytes(b"broken")
    with pytest.raises(SystemExit, match="can't be read"):
        caption.main(words)
    (tmp_path / "mapper" / "config.json").unlink()
    with pytest.raises(SystemExit, match="holds no mapping network"):
        caption.main(words)


def test_a_place_that_can_not_be_written_to_is_said_before_the_training(captioner, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(prefix_captioner, "_fit", lambda *_: pytest.fail("the work was done in vain"))
    args = CaptionArguments(language_model="lm", mapper=tmp_path / "file" / "mapper")
    data = CaptionedEmbeds(torch.eye(24)[:1], ["foto"])
    with pytest.raises(ValueError, match="file is no folder"):
        train_captioner(args, (captioner.language_model, captioner.tokenizer), data, data, "fingerprint")


@pytest.mark.slow
def test_the_language_model_sees_the_picture(tiny_model, tiny_processor, tmp_path):
    """Coloured squares that it has learnt, and others of the same colours: it has the words for both."""
    colours = {"azul": (0, 0, 255), "verde": (0, 255, 0), "vermelho": (255, 0, 0), "branco": (255, 255, 255)}
    small_language_model(8 * list(colours), tmp_path / "lm", passes=6)
    language = load_language_model(str(tmp_path / "lm"), torch.device("cpu"))

    def squares(seed: int) -> CaptionedEmbeds:
        texts = 6 * list(colours)
        noise = np.random.default_rng(seed).integers(0, 40, (len(texts), 32, 32, 3))
        images = [Image.fromarray((0.8 * np.array(colours[text]) + noise[row]).astype(np.uint8))
                  for row, text in enumerate(texts)]  # fmt: skip
        return CaptionedEmbeds(embed_images(tiny_model, tiny_processor, images), texts)

    sizes = {"prefix_length": 3, "mapper_layers": 1, "batch_size": 8, "epochs": 25, "learning_rate": 3e-3}
    args = CaptionArguments(language_model="lm", mapper=tmp_path / "mapper", **sizes)
    captioner = train_captioner(args, language, squares(0), squares(1), "fingerprint")
    test = squares(2)
    found = [text for (text,) in captioner.captions(test.image_embeds, number=1, num_beams=1, max_new_tokens=8)]
    assert sum(text == right for text, right in zip(found, test.texts, strict=True)) >= 16, found  # by chance 6
