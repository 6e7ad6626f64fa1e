r"""How good captions are that CAPIVARA finds in a bank, or that a language model writes of its embeddings.

    python -m benchmarks.captioning --model runs/openmoji-pt-001 --output benchmarks/results/captioning.json

On the demo's test pictures, whose concepts no training caption names: BLEU and CIDEr as `examples.caption` computes
them, and the mean cosine of picture and caption. Beside each stand the same captions given to the next picture each:
what a method scores that does not look. A small GPT-2 is trained on the training captions first; `--language_model` has
another one beside it.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import trange
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.timing import conditions, finish, software, table
from capivara_common.cli import flag, parse, run_command
from examples.caption import make_captions, word_scores
from examples.openmoji.dataset import load_embedded
from examples.prefix_captioner import CaptionArguments

END = "</s>"
PIECES = 1500  # of the small language model's vocabulary
SIZES = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 96}
BATCH, RATE, PASSES = 32, 1e-3, 8  # of its training; the loss on names of unseen concepts rises after four
MAPPER_LAYERS = 2  # for a thousand captions; the paper's eight are for half a million
DRAWS = 5  # of chance


@dataclass
class CaptioningBenchmarkArguments:
    """Arguments of `benchmarks.captioning`."""

    model: str = flag(..., "Folder of the trained model, as a run of configs/openmoji.yaml leaves it.")
    base: str = flag("data/openmoji/base", "Model that it is compared with.")
    dataset: str = flag("data/openmoji/dataset", "OpenMoji data set, as prepared.")
    language_model: str | None = flag(None, "Folder of a causal language model, measured beside the small one.")
    language_model_passes: int = flag(5, "Passes over the captions for its mapping network, at most.")
    output: Path | None = flag(None, "JSON file for the figures.")


def main(argv: list[str] | None = None) -> None:
    """Measure all ways to a caption and print the results."""
    args = parse(CaptioningBenchmarkArguments, __doc__, argv)
    captions = {
        split: [text for texts in rows["captions-pt"] for text in texts]
        for split, rows in load_embedded(Path(args.dataset)).items()
    }
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        plain = CaptionArguments(model=args.model, dataset=args.dataset, mapper_layers=MAPPER_LAYERS)
        losses = small_language_model(captions["train"], captions["validation"], folder / "lm")
        ways = {
            "base model, bank": replace(plain, model=args.base),
            "CAPIVARA, bank": plain,
            "CAPIVARA, small language model": replace(
                plain, language_model=str(folder / "lm"), mapper=folder / "mapper"
            ),
        }
        if args.language_model:
            ways["CAPIVARA, named language model"] = replace(
                plain, language_model=args.language_model, mapper=folder / "named", epochs=args.language_model_passes
            )
        for name in [name for name, way in ways.items() if way.language_model]:
            ways[f"{name}, reranked"] = replace(ways[name], rerank=True)
        measured = {name: of_way(way) for name, way in ways.items()}
    bank = sorted(set(captions["train"]))
    measured = {"a sentence of the bank, drawn": chance(bank, args.dataset)} | measured
    results = conditions() | {"measured": measured, "bank": len(bank), "small_language_model_losses": losses}
    finish(results, args.output)


def of_way(args: CaptionArguments) -> dict[str, Any]:
    """Scores of a way to a caption, the same of captions of other pictures, and three captions to look at."""
    pictures, captions, made = make_captions(args)
    first = [of_picture[0].text for of_picture in captions]
    return {
        "pictures": len(first),
        "scores": word_scores(first, pictures.captions),
        "shifted_scores": word_scores(first[1:] + first[:1], pictures.captions),
        "cosine": sum(of_picture[0].score for of_picture in captions) / len(first),
        "different": len(set(first)),
        "first_three": [[text, right[0]] for text, right in zip(first[:3], pictures.captions[:3], strict=True)],
        "training": {name: made[name] for name in ("seconds", "validation_losses", "captions") if name in made},
    }


def chance(bank: Sequence[str], dataset: str) -> dict[str, Any]:
    """Mean scores of sentences that are drawn from the bank."""
    references = load_embedded(Path(dataset))["test"]["captions-pt"][:]
    scores = []
    for seed in range(DRAWS):
        drawn = torch.randint(len(bank), (len(references),), generator=torch.Generator().manual_seed(seed))
        scores.append(word_scores([bank[place] for place in drawn.tolist()], references))
    return {"pictures": len(references), "scores": {name: sum(s[name] for s in scores) / DRAWS for name in scores[0]}}


def sentence_tokenizer(sentences: Sequence[str], pieces: int = PIECES) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on the sentences, for any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=pieces, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def small_language_model(
    train: Sequence[str], validation: Sequence[str], folder: Path, passes: int = PASSES
) -> list[float]:
    """Train a GPT-2 of a million parameters on sentences and save the best pass.

    Returns:
        The validation loss of each pass, nats a token.
    """
    tokenizer = sentence_tokenizer(train)
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **SIZES, **ids))
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1), []
    for _ in trange(passes, desc="Small language model", unit="pass"):
        model.train()
        for rows in torch.randperm(len(train)).split(BATCH):
            optimiser.zero_grad()
            _loss(model, tokenizer, [train[row] for row in rows.tolist()]).backward()
            optimiser.step()
        model.eval()
        with torch.inference_mode():
            losses.append(_loss(model, tokenizer, validation).item())
        if losses[-1] == min(losses):
            model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def _loss(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str]) -> torch.Tensor:
    end = [tokenizer.eos_token_id]
    ids = [torch.tensor([*end, *found, *end]) for found in tokenizer(list(sentences))["input_ids"]]
    labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    return model(input_ids=labels.clamp_min(0), attention_mask=(labels != -100).long(), labels=labels).loss


def captioning_table(found: dict[str, Any]) -> str:
    """A row a way: its scores, those of captions of other pictures, and the cosine."""
    rows = []
    for name, measured in found["measured"].items():
        scores, shifted = measured["scores"], measured.get("shifted_scores")
        cells = [f"{scores['CIDEr']:.3f}", f"{shifted['CIDEr']:.3f}" if shifted else "-", f"{scores['BLEU-1']:.3f}"]
        cells += [f"{scores['BLEU-4']:.3f}", f"{measured['cosine']:.3f}" if shifted else "-"]
        rows.append((name, *cells))
    facts = (
        f"{next(iter(found['measured'].values()))['pictures']} test pictures, one reference each, a bank of "
        f"{found['bank']:,} training captions; CIDEr goes from 0 to 10, BLEU to 1; on {found['device']}; "
        f"{software(found, 'torch', 'transformers')}."
    )
    return table(("captions", "CIDEr", "of the next picture", "BLEU-1", "BLEU-4", "cosine"), rows, facts)


def guiding_table(found: dict[str, dict[str, Any]]) -> str:
    """A row a sentence: its cosine with the picture of each run of `examples.guide_generation`, before and after."""
    kinds = list(found)
    rows = [
        (text, *(f"{found[kind]['cosines'][text][when]:.3f}" for kind in kinds for when in ("before", "after")))
        for text in found[kinds[0]]["cosines"]
    ]
    of = found[kinds[0]]
    facts = (
        f"{of['config']['steps']} steps towards “{of['config']['sentence']}”; "
        + ", ".join(f"{kind}: {found[kind]['seconds']:.0f} s" for kind in kinds)
        + f" beside other work, on {of['device']}; {software(of, 'torch', 'transformers')}."
    )
    return table(("sentence", *(f"{kind}, {when}" for kind in kinds for when in ("before", "after"))), rows, facts)


if __name__ == "__main__":
    run_command(main)
