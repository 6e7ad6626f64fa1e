r"""Tasks of the image-embedding leader board, measured by its own evaluator, `mteb` (extra: mieb).

    python -m hub_upload.export --model MODEL --output repository --formats transformers,sentence_transformers
    python -m eval.mieb --model repository --output results/mieb
    python -m eval.mieb --model repository --tasks XM3600T2IRetrieval --languages por spa \
        --repo_id my-name/my-model --revision COMMIT

mteb gets the folder as anybody would, by sentence-transformers. Its result files are laid out as its results repository
wants them: `results/OWNER__NAME/REVISION/TASK.json`, with `model_meta.json` beside. docs/evaluation.md says how its
figures are related to those of `eval.retrieval`.

The same command measures only what is missing. Data come from the Hub or its cache; with HF_HUB_OFFLINE=1 a task whose
data are not in the cache is named, and the others are measured.
"""

from capivara_common.start import start_command

if __name__ == "__main__":  # Ctrl-C, --help and a wrong flag are answered before torch is imported
    start_command("eval.eval_arguments:MiebArguments", __doc__)

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import datasets
from datasets.exceptions import DatasetsError
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import parse_local_safetensors_file_metadata

import modeling_capivara  # noqa: F401  registers CAPIVARA with the Auto classes: no code of the folder is run
from capivara_common.cli import parse, run_command, user_errors
from capivara_common.environment import require
from eval.eval_arguments import MiebArguments
from modeling_capivara.loading import card_metadata, load_processor, read_config, weights_digest

if TYPE_CHECKING:
    from mteb import TaskResult
    from mteb.abstasks import AbsTask
    from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper

SHOWN = ("ndcg_at_10", "hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10")  # of a task of retrieval


def open_model(args: MiebArguments) -> "SentenceTransformerEncoderWrapper":
    """The folder as mteb's encoder of texts and images, with what is known of it as `mteb_model_meta`.

    Raises:
        ImportError: mteb or sentence-transformers is not installed.
        ValueError: the folder is no CAPIVARA model, or was exported without sentence_transformers.
    """
    require("eval.mieb", "mieb", "mteb", "sentence_transformers")
    from mteb.models import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    read_config(args.model)
    if not (args.model / "modules.json").is_file():
        raise ValueError(
            f"The folder {args.model} has no modules.json, by which sentence-transformers reads it. Make one that has: "
            f"python -m hub_upload.export --model {args.model} --output repository --formats "
            "transformers,sentence_transformers"
        )
    encoder = SentenceTransformer(str(args.model), device=args.device).eval()
    revision = args.revision or f"weights-{weights_digest(encoder[0].auto_model)}"
    model = SentenceTransformerEncoderWrapper(encoder)
    model.mteb_model_meta = model_meta(args.model, args.repo_id, revision)
    return model


def model_meta(folder: Path, repo_id: str | None, revision: str) -> "ModelMeta":
    """What mteb notes of a model: what its folder and its card say. What they do not say stays None.

    Args:
        folder: of an exported model; `hub_upload.card` has made its README.md, if there is one.
        repo_id: Hub id; mteb's own word for a model without a name where None.
        revision: commit of it, or what else tells these weights from others.
    """
    from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import Licenses

    config, card = read_config(folder), card_metadata(folder / "README.md")
    counts = [parse_local_safetensors_file_metadata(path).parameter_count for path in folder.glob("model*.safetensors")]
    bases = card.get("base_model")
    known = {
        "loader": SentenceTransformerEncoderWrapper,
        "loader_kwargs": {"trust_remote_code": True},  # the repository's own code, for whoever has not this package
        "name": repo_id,
        "revision": revision,
        "languages": _languages(card.get("language")),
        "n_parameters": sum(sum(count.values()) for count in counts),
        "n_embedding_parameters": config.text_config.vocab_size * config.text_config.hidden_size,
        "memory_usage_mb": sum(path.stat().st_size for path in folder.glob("model*.safetensors")) / 2**20,
        "max_tokens": load_processor(folder).tokenizer.model_max_length,
        "embed_dim": config.projection_dim,
        "license": card["license"] if card.get("license") in get_args(Licenses) else None,
        "framework": ["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": False,
        "adapted_from": bases if isinstance(bases, str) else None,
        "modalities": ["image", "text"],
    }
    return ModelMeta.create_empty(known)


def _languages(codes: str | list[str] | None) -> list[str] | None:
    """mteb's codes (por-Latn) for a card's (pt), as its XM3600 has them; None where one is not among these."""
    from mteb import get_task

    known = get_task("XM3600T2IRetrieval").metadata.eval_langs
    codes = [codes] if isinstance(codes, str) else codes or []
    return [known[code][0] for code in codes] if codes and all(code in known for code in codes) else None


def find_tasks(names: list[str], languages: list[str]) -> list["AbsTask"]:
    """mteb's tasks of these names, in these languages where they have several.

    Raises:
        ValueError: there is no such task or language, or a task has none of the languages.
    """
    from mteb import get_task

    tasks = []
    for name in names:
        try:
            tasks.append(get_task(name, languages=languages))
        except (KeyError, ValueError) as error:
            raise ValueError(f"mteb has no task {name!r} in {' '.join(languages)}: {_line(error)}") from error
        if not tasks[-1].hf_subsets:
            raise ValueError(f"{name} has none of the languages {' '.join(languages)}; leave it out or name others.")
    return tasks


def check_data(task: "AbsTask") -> None:
    """Raise ValueError where the Hub must not be asked and its cache has not the data that a task was published with.

    datasets would take any revision that it finds there, and mteb write down its own.
    """
    if not datasets.config.HF_HUB_OFFLINE:
        return
    path, revision = task.metadata.dataset["path"], task.metadata.dataset["revision"]
    owner, _, name = path.partition("/")
    kept = Path(datasets.config.HF_DATASETS_CACHE, f"{owner}___{camelcase_to_snakecase(name)}").glob("*/*/*/")
    found = {folder.name for folder in kept if "." not in folder.name}
    if not found:
        raise ValueError(
            f"its data, {path}, are not in the cache ({datasets.config.HF_DATASETS_CACHE}), and HF_HUB_OFFLINE is set. "
            "Run it once with network, or bring the cache along."
        )
    if found != {revision}:
        raise ValueError(f"the cache has {path} at {', '.join(sorted(found))}, and the task is about {revision} alone.")


def run(args: MiebArguments) -> dict[str, "TaskResult | str"]:
    """Measure; name of a task -> its result, or why there is none."""
    require("eval.mieb", "mieb", "mteb", "sentence_transformers")
    from mteb import ResultCache, evaluate

    tasks, outcomes = find_tasks(args.tasks, args.languages), {}
    model, cache = open_model(args), ResultCache(args.output)
    for number, task in enumerate(tasks, start=1):
        name = task.metadata.name
        try:
            kept = cache.load_task_result(name, model.mteb_model_meta)
            if kept is None or kept.get_missing_evaluations(task):
                check_data(task)
            encode = {"batch_size": args.batch_size}
            outcomes[name] = evaluate(model, task, co2_tracker=False, encode_kwargs=encode, cache=cache).task_results[0]
        except (ValueError, OSError, ImportError, DatasetsError) as error:
            outcomes[name] = f"not run: {_line(error)}"
        except Exception as error:  # want of memory, or a fault of mteb: the others are measured all the same
            traceback.print_exc()
            outcomes[name] = f"not run: {type(error).__name__}: {_line(error)}"
        for line in described(outcomes[name]):
            print(f"[{number}/{len(tasks)}] {name} {line}", flush=True)
    return outcomes


def described(outcome: "TaskResult | str") -> list[str]:
    """What is printed of a task: a line for each split and language, in per cent."""
    if isinstance(outcome, str):
        return [outcome]
    return [
        f"{split} {scores['hf_subset']}: main_score {100 * scores['main_score']:.2f} %"
        + "".join(f", {key} {100 * scores[key]:.2f} %" for key in SHOWN if key in scores)
        for split, of_split in outcome.scores.items()
        for scores in of_split
    ]


def _line(error: Exception) -> str:
    said = error.args[0] if isinstance(error, KeyError) and error.args else error  # which else has quotes around it
    return " ".join(str(said).split()) or type(error).__name__


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    outcomes = run(parse(MiebArguments, __doc__, argv))
    if missing := [name for name, outcome in outcomes.items() if isinstance(outcome, str)]:
        sys.exit(f"error: {', '.join(missing)} could not be measured; see above.")


if __name__ == "__main__":
    run_command(main, resumes=True)
