"""Tiny translation models with random weights, and real tokenizers that are trained on a few sentences."""

import json
from pathlib import Path

import sentencepiece
import torch
from tiny import randomize
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    NllbTokenizer,
)

SENTENCES = """a cat on a mat. a dog in the park. two men ride horses on the beach. the red car is parked near a tree.
um gato no tapete. uma pessoa andando na praia. dois homens montam cavalos. o cachorro corre no parque, feliz!
it has &quot;quotes&quot;, commas; and more? yes: 0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ wxyz jkq >>por<< </s> <pad>
"""
WIDTHS = {"d_model": 32, "max_position_embeddings": 64}
WIDTHS |= {f"{part}_{of}": n for part in ("encoder", "decoder") for of, n in (("layers", 1), ("attention_heads", 2))}
WIDTHS |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}


def pieces_of(folder: Path) -> tuple[Path, list[str]]:
    """Train a SentencePiece model. Returns its path and its pieces without the special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentences.txt").write_text(SENTENCES * 5, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "sentences.txt"), model_prefix=str(folder / "trained"), vocab_size=150,
        character_coverage=1.0, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    path = folder / "trained.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    return path, [piece for piece in pieces if piece not in ("<s>", "</s>", "<unk>")]


def marian_folder(folder: Path, codes: tuple[str, ...] = ("por", "spa", "xho"), target: str = "por") -> Path:
    """Save a tiny MarianMTModel whose vocabulary has the language tokens `>>code<<` of `codes`."""
    path, pieces = pieces_of(folder.parent / "pieces")
    tokens = ["</s>", "<unk>", *(f">>{code}<<" for code in codes), *pieces, "<pad>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder.parent / "vocabulary.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    tokenizer = MarianTokenizer(
        source_spm=str(path), target_spm=str(path), vocab=str(folder.parent / "vocabulary.json"), source_lang="en",
        target_lang=target,
    )  # fmt: skip
    config = MarianConfig(
        vocab_size=len(tokens), pad_token_id=len(tokens) - 1, decoder_start_token_id=len(tokens) - 1, eos_token_id=0,
        forced_eos_token_id=0, **WIDTHS,
    )  # fmt: skip
    with_strong_attention(MarianMTModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def m2m100_folder(folder: Path, tokenizer_kind: type = M2M100Tokenizer) -> Path:
    """Save a tiny M2M100ForConditionalGeneration with its own tokenizer, or with the tokenizer of NLLB."""
    path, pieces = pieces_of(folder.parent / "pieces")
    vocabulary = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces])}
    if tokenizer_kind is NllbTokenizer:
        letters = sorted({letter for piece in pieces for letter in piece} - vocabulary.keys())
        vocabulary |= {letter: len(vocabulary) + number for number, letter in enumerate(letters)}
        tokenizer = NllbTokenizer(vocab=vocabulary, merges=[])
        size = len(tokenizer)
    else:
        (folder.parent / "m2m.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        tokenizer = M2M100Tokenizer(vocab_file=str(folder.parent / "m2m.json"), spm_file=str(path))
        size = max(tokenizer.lang_code_to_id.values()) + 1 + tokenizer.num_madeup_words  # not len(tokenizer)
    config = M2M100Config(
        vocab_size=size, pad_token_id=1, eos_token_id=2, bos_token_id=0, decoder_start_token_id=2,
        **WIDTHS,
    )  # fmt: skip
    with_strong_attention(M2M100ForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_strong_attention(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """Set random weights with strong attention, so that different sentences get different translations."""
    for name, tensor in randomize(model, seed).named_parameters():
        if "attn" in name and tensor.ndim == 2:
            tensor.data *= 8
    return model
