"""A language model that is told a picture by a few embeddings before the text (ClipCap, arXiv 2111.09734).

    language = load_language_model("LANGUAGE_MODEL", embedder.device)
    captioner = load_captioner(Path("runs/mapper"), language, embedder.image_fingerprint)
    captioner.captions(embedder.images([picture]), number=1)

The language model stays as it is (the paper's section 3.2 with a transformer between the two); the mapping network
alone is trained, on embeddings that are computed once. Its folder holds `mapper.safetensors` and `config.json`.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import get_linear_schedule_with_warmup as warm_and_linear

from capivara_common.cli import at_least, flag
from capivara_common.environment import device_description, package_versions
from capivara_common.files import check_output_file, read_json, whole_folder, write_json
from capivara_common.hub_cache import check_reachable
from capivara_common.privacy import short_name
from modeling_capivara.loading import weights_digest

WEIGHTS, CONFIG = "mapper.safetensors", "config.json"
HEADS = 8  # of the mapping network, or as many as the language model's width allows
MAX_TOKENS = 64  # of a caption that is learnt from
WARM_UP = 0.05  # share of all steps
PATIENCE = 4  # passes without a better validation loss before the training ends
LOADING = {"use_safetensors": True, "trust_remote_code": False}
IGNORED = -100  # label of what the loss leaves out, as transformers has it

LanguageModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass
class CaptionArguments:
    """Arguments of `examples.caption`. Raises ValueError where a value breaks its rule."""

    model: str = flag("data/openmoji/base", "Folder or Hub id of a CAPIVARA model.")
    output: Path | None = flag(None, "File for the captions, .json or .csv; a few are printed where none.")
    pictures: Path | None = flag(None, "Folder of pictures; those of --split, which are measured, where none.")
    dataset: str = flag("data/openmoji/dataset", "Pictures with captions, in the forms that eval.retrieval reads.")
    split: str = flag("test", "Split whose pictures get captions.")
    train_split: str = flag("train", "Split that captions come from: the bank, or what the mapping network learns.")
    validation_split: str = flag("validation", "Split that says when the mapping network has learnt enough.")
    language: str = flag("pt", "Language of the captions.")
    caption_column: str = flag("captions-{language}", "Column of a caption or a list of captions a picture.")
    bank: Path | None = flag(None, "Text file of sentences, a line each, in place of the captions of --train_split.")
    top_k: int = flag(3, "Captions a picture.")
    language_model: str | None = flag(
        None,
        "Folder or Hub id of a causal language model of transformers, which writes the captions in place of a bank.",
    )
    mapper: Path | None = flag(None, "Folder of the mapping network of --language_model; trained where it is missing.")
    rerank: bool = flag(False, "Let CAPIVARA order what the language model proposes, the one that fits best first.")
    num_beams: int = flag(5, "Beams of the language model's search; 1 is greedy.")
    max_new_tokens: int = flag(30, "Tokens of a caption, at most.")
    prefix_length: int = flag(10, "Embeddings before the caption that stand for the picture.")
    mapper_layers: int = flag(8, "Transformer layers of the mapping network.")
    epochs: int = flag(30, "Passes over the training captions, at most; the best by --validation_split is kept.")
    learning_rate: float = flag(3e-4, "Of the mapping network, at its height.")
    batch_size: int = flag(32, "Pictures or captions at once.")
    seed: int = flag(0, "Seed of the mapping network's start and of the order of captions.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        names = ("top_k", "num_beams", "max_new_tokens", "prefix_length", "mapper_layers", "epochs", "batch_size")
        at_least(self, 1, *names)
        if bool(self.language_model) != bool(self.mapper):
            raise ValueError(
                "--language_model and --mapper, the folder of its mapping network, go together: give both."
            )
        if self.language_model and self.bank:
            raise ValueError("--bank is for captions without --language_model. Leave one of them out.")
        if self.language_model and self.top_k > self.num_beams:
            raise ValueError(f"A search of {self.num_beams} beams has no {self.top_k} captions: raise --num_beams.")
        if self.output:
            if self.output.suffix.lower() not in (".json", ".csv"):
                raise ValueError(f"The output file must end in .json or .csv, got {self.output.name}.")
            check_output_file(self.output)


class PrefixMapper(nn.Module):
    """Embeddings of pictures -> the embeddings that a language model reads before a caption.

    A linear layer makes `length` vectors of the embedding; a transformer looks from as many learnt ones at them.
    """

    def __init__(self, embed_dim: int, width: int, length: int, layers: int):
        super().__init__()
        self.length, self.width = length, width
        self.scale = nn.Parameter(torch.ones(()))  # of what it makes, at first that of word embeddings
        self.expand = nn.Linear(embed_dim, length * width)
        self.queries = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, math.gcd(HEADS, width), 2 * width, dropout=0, batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """(pictures, embed_dim), unit length -> (pictures, length, width)."""
        seen = self.expand(image_embeds * image_embeds.shape[1] ** 0.5)  # numbers near 1: the bias would drown others
        seen = seen.view(-1, self.length, self.width)
        both = torch.cat([seen, self.queries.expand_as(seen)], dim=1)
        return self.scale * self.transformer(both)[:, self.length :]


@dataclass(frozen=True)
class CaptionedEmbeds:
    """Captions, each with the embedding of its picture."""

    image_embeds: Tensor  # (captions, width), unit length
    texts: list[str]  # (captions,)


@dataclass
class PrefixCaptioner:
    """A language model with the mapping network that shows it pictures."""

    mapper: PrefixMapper
    language_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any] = field(default_factory=dict)  # as its config.json has them

    def loss(self, image_embeds: Tensor, texts: list[str]) -> Tensor:
        """Mean negative log-likelihood of the captions' tokens and their end, in nats, given the pictures.

        Args:
            image_embeds: (captions, width), unit length.
            texts: (captions,).
        """
        device = self.language_model.device
        tokens = self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        ids = [torch.tensor([*found, self.tokenizer.eos_token_id]) for found in tokens]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORED).to(device)  # (captions, tokens)
        prefix = self.mapper(image_embeds.to(device))  # (captions, length, width)
        words = self.language_model.get_input_embeddings()(ids.clamp_min(0))
        unseen = ids.new_full(prefix.shape[:2], IGNORED)
        return self.language_model(
            inputs_embeds=torch.cat([prefix, words], dim=1),
            attention_mask=torch.cat([torch.ones_like(unseen), (ids != IGNORED).long()], dim=1),
            labels=torch.cat([unseen, ids], dim=1),
        ).loss

    @torch.inference_mode()
    def captions(
        self,
        image_embeds: Tensor,
        number: int = 1,
        num_beams: int = 5,
        max_new_tokens: int = 30,
        batch_size: int = 32,
    ) -> list[list[str]]:
        """Captions of each picture, the likeliest first.

        Args:
            image_embeds: (pictures, width), unit length.
            number: captions a picture, at most `num_beams`.
            num_beams: of the search; 1 is greedy.
            max_new_tokens: of a caption.
            batch_size: pictures at once.
        """
        end, found = self.tokenizer.eos_token_id, []
        with tqdm(total=len(image_embeds), desc="Writing captions", unit="picture") as bar:
            for part in image_embeds.split(batch_size):
                prefix = self.mapper(part.to(self.language_model.device))
                ids = self.language_model.generate(
                    inputs_embeds=prefix,
                    attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device),
                    max_new_tokens=max_new_tokens,
                    num_beams=num_beams,
                    num_return_sequences=number,
                    do_sample=False,
                    eos_token_id=end,
                    pad_token_id=end,
                )
                texts = [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
                found += [texts[start : start + number] for start in range(0, len(texts), number)]
                bar.update(len(part))
        return found


def load_language_model(source: str, device: torch.device) -> LanguageModel:
    """A causal language model of transformers, frozen, in float32, with its tokenizer.

    Raises:
        ValueError: there is none, it is of another kind, its weights are no safetensors, or its tokenizer has no token
            for the end of a text.
    """
    check_reachable(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="float32", **LOADING)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source} can't be loaded as a causal language model of transformers: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {source} has no token for the end of a text (eos_token). Set one in it.")
    return model.eval().requires_grad_(False).to(device), tokenizer


def load_captioner(folder: Path, language: LanguageModel, image_fingerprint: str) -> PrefixCaptioner:
    """A mapping network as `train_captioner` has kept it, with the language model that it was trained for.

    Raises:
        ValueError: the folder holds none, or it was trained for another language model or image tower.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no mapping network ({CONFIG} and {WEIGHTS}). Name a new folder to train one.")
    facts = read_json(folder / CONFIG, shape=dict, image_fingerprint=str, language_model_digest=str)
    if facts["image_fingerprint"] != image_fingerprint:
        raise ValueError(f"{folder} was trained for another image tower. Name a new folder with --mapper to train one.")
    model, tokenizer = language
    if facts["language_model_digest"] != weights_digest(model):
        raise ValueError(f"{folder} was trained for another language model. Name a new folder with --mapper.")
    try:
        mapper = PrefixMapper(**facts["shape"])
        mapper.load_state_dict(load_file(folder / WEIGHTS))
    except Exception as error:  # safetensors has an error of its own
        raise ValueError(f"The mapping network of {folder} can't be read: {' '.join(str(error).split())}") from error
    return PrefixCaptioner(mapper.eval().to(model.device), model, tokenizer, facts)


def train_captioner(
    args: CaptionArguments,
    language: LanguageModel,
    train: CaptionedEmbeds,
    validation: CaptionedEmbeds,
    image_fingerprint: str,
) -> PrefixCaptioner:
    """Train a mapping network, the best pass by the validation loss, and keep it in `args.mapper`."""
    model, tokenizer = language
    torch.manual_seed(args.seed)
    shape = {
        "embed_dim": train.image_embeds.shape[1],
        "width": model.get_input_embeddings().embedding_dim,
        "length": args.prefix_length,
        "layers": args.mapper_layers,
    }
    captioner = PrefixCaptioner(PrefixMapper(**shape).to(model.device), model, tokenizer)
    captioner.mapper.scale.data.fill_(model.get_input_embeddings().weight.std())
    with whole_folder(args.mapper) as folder:  # before the work: a place that can't be written to is said at once
        started = time.perf_counter()
        losses, weights = _fit(captioner, train, validation, args)
        captioner.mapper.load_state_dict(weights)
        captioner.facts = {
            "shape": shape,
            "image_fingerprint": image_fingerprint,
            "language_model": short_name(args.language_model),
            "language_model_digest": weights_digest(model),
            "captions": len(train.texts),
            "validation_losses": losses,  # nats a token, of each pass
            "seconds": time.perf_counter() - started,
            "settings": {name: getattr(args, name) for name in ("epochs", "batch_size", "learning_rate", "seed")},
            "device": device_description(model.device),
            "versions": package_versions(),
        }
        save_file(weights, folder / WEIGHTS)
        write_json(folder / CONFIG, captioner.facts)
    return captioner


def _fit(
    captioner: PrefixCaptioner, train: CaptionedEmbeds, validation: CaptionedEmbeds, args: CaptionArguments
) -> tuple[list[float], dict[str, Tensor]]:
    """The validation loss of each pass, and the weights after the best one."""
    mapper, order = captioner.mapper, torch.Generator().manual_seed(args.seed)
    batches = math.ceil(len(train.texts) / args.batch_size)
    steps = args.epochs * batches
    optimiser = torch.optim.AdamW(mapper.parameters(), lr=args.learning_rate)
    schedule = warm_and_linear(optimiser, int(WARM_UP * steps), steps)
    losses: list[float] = []
    best: dict[str, Tensor] = {}
    with tqdm(total=steps, desc="Mapping network", unit="step") as bar:
        for _ in range(args.epochs):
            mapper.train()
            for rows in torch.randperm(len(train.texts), generator=order).split(args.batch_size):
                loss = captioner.loss(train.image_embeds[rows], [train.texts[row] for row in rows.tolist()])
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(mapper.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                bar.update()
            losses.append(_mean_loss(captioner, validation, args.batch_size))
            bar.set_postfix(validation_loss=f"{losses[-1]:.3f}")
            if losses[-1] == min(losses):
                best = {name: tensor.detach().cpu().clone() for name, tensor in mapper.state_dict().items()}
            if len(losses) - losses.index(min(losses)) > PATIENCE:
                break
    if not best:
        raise ValueError("The loss of the mapping network is not a number. Lower --learning_rate.")
    return losses, best


@torch.inference_mode()
def _mean_loss(captioner: PrefixCaptioner, data: CaptionedEmbeds, batch_size: int) -> float:
    """Of all captions, a batch weighing as much as it has captions."""
    captioner.mapper.eval()
    total = 0.0
    for start in range(0, len(data.texts), batch_size):
        texts = data.texts[start : start + batch_size]
        total += len(texts) * captioner.loss(data.image_embeds[start : start + batch_size], texts).item()
    return total / len(data.texts)
