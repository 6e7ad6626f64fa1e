"""Every kind of model goes through training, evaluation, the search and the exports.

Each test records its outcome. docs/reference/bases.md shows the recorded outcomes, and the last test compares them:

    WRITE_MATRIX=1 pytest tests/test_kinds.py    # update the page
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property, partial, wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from made_index import make_pictures
from PIL import Image
from test_resume import kill_run, process_options, read_run, read_weights
from test_train_accelerate import flags
from tiny import TINY_TEXT, draw_nothing, save_model, tiny_tokenizer
from towers import (
    LETTERS,
    NO_DROPOUT,
    altclip,
    chinese_clip,
    clip,
    dual_encoder,
    gemma_like,
    metaclip_2,
    siglip,
    siglip2,
)
from transformers import AutoModel, AutoProcessor
from whole_batch_process import CAPTIONS, gradients_of

import train_accelerate
from capivara_common.image_encoder_digest import image_encoder_digest
from capivara_common.model_kinds import KINDS
from capivara_search.index import PictureIndex
from eval.retrieval import main as evaluate
from hub_upload.export import export_model
from hub_upload.formats import onnx
from hub_upload.formats.onnx import write_onnx
from modeling_capivara import CapivaraImageProcessor, CapivaraProcessor
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.trim_vocabulary import trim
from modeling_capivara.two_towers import (
    IMAGE_ENCODER_PREFIXES,
    compute_image_embeds,
    freeze_image_encoder,
    load_embedder,
    random_images,
    random_texts,
    tokenize,
    uses_sigmoid_loss,
)
from training.batches import make_micro_batches
from training.interpolate import main as interpolate
from training.loop import TrainingLoop

pytestmark = pytest.mark.usefixtures("no_pictures")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "bases.md"
TWELVE = [f"{caption} {ending}" for caption in CAPTIONS[:6] for ending in ("azul", "e uma casa verde")]
# A word of n letters has n tokens or a few more in all tokenizers here. Texts that are too long are truncated.
TEXTS = [*((LETTERS * 5)[n : 2 * n] for n in range(1, 65)), "Uma FOTO de um Gato", "gato " * 600]
RUN = {"max_steps": 2, "warmup_steps": 1, "caption_strategy": "all", "mixed_precision": "no", "interpolate": 0.5}
LORA = {"lora_rank": 2, "lora_targets": r"text_model\..*\.(q_proj|v_proj|query|value)", "augmented_views": 2}
FORMATS = ["transformers", "sentence_transformers", "transformers_js"]


def capivara(folder: Path) -> None:
    """Save a CAPIVARA model that is trained with the sigmoid loss. Other tests train it with the contrastive loss."""
    image_processor = CapivaraImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    options = {"text_config": TINY_TEXT | NO_DROPOUT, "logit_bias_init_value": -10.0}
    save_model(folder, CapivaraProcessor(image_processor, tiny_tokenizer()), **options)


MAKERS = {  # kind, as the page names it -> function that saves a toy model
    "CAPIVARA": capivara,
    "CLIP": clip,
    "SigLIP": siglip,
    "SigLIP 2": lambda folder: siglip2(folder, gemma_like(TWELVE, 400)),
    "Chinese-CLIP": chinese_clip,
    "AltCLIP": altclip,
    "MetaCLIP 2": metaclip_2,
    "VisionTextDualEncoder (ViT, BERT)": dual_encoder,
    "VisionTextDualEncoder (CLIP, XLM-R)": partial(dual_encoder, vision="clip_vision_model", text="xlm-roberta"),
}

KEY_BIASES = ("key.bias", "k_proj.bias")
NOT_TRIMMED = ("CLIP", "Chinese-CLIP", "VisionTextDualEncoder (ViT, BERT)")
NOT_EXCHANGED = tuple(title for title in MAKERS if title != "CAPIVARA" and "SigLIP" not in title)


class Toy:
    """A toy model of one kind, with a short run and its export. Each is made when it is first used."""

    def __init__(self, title: str, folder: Path, dataset: Path):
        self.title, self.folder, self.dataset = title, folder, dataset

    @cached_property
    def base(self) -> Path:
        MAKERS[self.title](self.folder / "base")
        return self.folder / "base"

    def flags(self, name: str, **options) -> list[str]:
        return flags(self.base, self.dataset, self.folder / name, **RUN | options)

    @cached_property
    def run(self) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            draw_nothing(patch)
            return train_accelerate.main(self.flags("run"))

    @cached_property
    def exported(self) -> Path:
        # Other precisions take as long again, so they are written for one kind only. CAPIVARA has its own tests.
        options = {} if self.title == "SigLIP 2" else {"precisions": ("float32",)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx, "write_onnx", lambda *args, **defaults: write_onnx(*args, **defaults | options))
            export_model(self.run, self.folder / "exported", FORMATS)
        return self.folder / "exported"

    @cached_property
    def embeds(self) -> dict[str, torch.Tensor]:
        """Embeddings of texts and images by the trained model."""
        embedder = load_embedder(str(self.run), "cpu")
        return {"texts": embedder.embed_texts(TEXTS), "images": embedder.embed_images(pictures())}


def pictures() -> list:
    return [image.convert("RGB") for image in random_images()]


# --- Recording -------------------------------------------------------------------------------------------------------

OUTCOMES: dict[tuple[str, str], str] = {}  # (kind, capability) -> reason why it is missing; empty if the test passed
CAPABILITIES: dict[str, str] = {}  # title -> what its test checks


def capability(title: str, check: str) -> Callable:
    """Record the outcome of a test: the reason that it returns, which is None if the kind has the capability."""
    CAPABILITIES[title] = check

    def decorate(test: Callable[..., str | None]) -> Callable:
        @wraps(test)
        def run(toy: Toy, **fixtures) -> None:
            reason = test(toy, **fixtures) or ""
            OUTCOMES[toy.title, title] = reason.replace(f"{toy.folder}/", "")

        return run

    return decorate


def refusal_of(call: Callable[[], object]) -> str:
    """Check that a call is refused with a message of one line, and return the message."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        call()
    return str(caught.value)


@pytest.fixture(scope="module")
def toys(tmp_path_factory, tiny_dataset_folder):
    return {title: Toy(title, tmp_path_factory.mktemp("kind"), tiny_dataset_folder) for title in MAKERS}


@pytest.fixture(params=MAKERS)
def toy(request, toys):
    return toys[request.param]


@pytest.fixture(scope="module")
def selected(request, toys):
    """The toy models of the tests that were selected. Some fixtures start a single process for all of them."""
    titles = {item.callspec.params.get("toy") for item in request.session.items if hasattr(item, "callspec")}
    return [toy for title, toy in toys.items() if title in titles]


# --- Training --------------------------------------------------------------------------------------------------------


@capability(
    "exact step", "Loss and gradients of a batch in micro-batches equal those of the model's own `return_loss`."
)
def test_a_step_equals_the_models_own_loss(toy):
    """Compare loss and gradients of 12 pairs in micro-batches of 5 with `return_loss=True` of all pairs at once."""
    pixels = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model, processor = AutoModel.from_pretrained(toy.base).train(), AutoProcessor.from_pretrained(toy.base)
    freeze_image_encoder(model)
    padding = {"padding": "max_length", "max_length": 64} if "SigLIP" in toy.title else {"padding": True}
    texts = processor(text=TWELVE, return_tensors="pt", **padding)
    loss = model(**texts, pixel_values=pixels, return_loss=True).loss
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for budget in (0.0, float("inf")):  # with and without gradient caching
        model = load_model(toy.base).train()
        freeze_image_encoder(model)
        batches, order = make_micro_batches(load_processor(toy.base), TWELVE, 5)
        with torch.no_grad():
            images = compute_image_embeds(model, pixels[order])
        report, actual = gradients_of(model, Accelerator(cpu=True), batches, images, budget)
        assert report.loss == pytest.approx(loss.item(), rel=1e-6)
        assert actual.keys() == expected.keys() and "logit_scale" in actual
        assert ("logit_bias" in actual) == uses_sigmoid_loss(model)
        for name, gradient in expected.items():
            distance = (actual[name] - gradient).norm()
            assert distance <= 1e-5 * gradient.norm() + 1e-6, name  # gradients of key biases are 0


def check_run(toy: Toy, run: Path, trains_scale: bool) -> None:
    """Check that a run has changed only weights of the text encoder, and saved a model of the base's class."""
    base, trained = AutoModel.from_pretrained(toy.base), AutoModel.from_pretrained(run)
    before, after = base.state_dict(), trained.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith(IMAGE_ENCODER_PREFIXES) for name in changed)
    assert ("logit_scale" in changed) == trains_scale and "logit_bias" not in changed
    assert AutoProcessor.from_pretrained(run)(text="um gato").input_ids
    loss = "sigmoid" if uses_sigmoid_loss(base) else "contrastive"
    record = {"model_class": type(base).__name__, "loss": loss}
    assert type(trained) is type(base) and read_run(run) | record == read_run(run)


@pytest.mark.slow
@capability("training run", "A run changes only the text encoder and saves a model of the same class.")
def test_a_run_saves_a_model_of_the_bases_class(toy):
    check_run(toy, toy.run, trains_scale=not uses_sigmoid_loss(load_model(toy.base)))


@pytest.mark.slow
@capability("LoRA", "The same with low-rank adapters, which are merged at the end, and with augmented images.")
def test_a_run_with_lora_saves_a_model_of_the_bases_class(toy):
    check_run(toy, train_accelerate.main(toy.flags("lora", **LORA)), trains_scale=False)


@pytest.fixture(scope="module")
def two_processes(selected, tmp_path_factory):
    """Train all kinds in two processes. The folders of the runs are called `double`."""
    path = tmp_path_factory.mktemp("two") / "flags.json"
    path.write_text(json.dumps([toy.flags("double") for toy in selected]), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(Path(__file__).with_name("training_process.py")), str(path)]
    subprocess.run(command, **process_options(), check=True, capture_output=True, timeout=500)


@pytest.mark.slow
@capability("two processes", "Two processes (torchrun) end with the losses and weights of one.")
def test_two_processes_train_like_one(toy, two_processes):
    double = toy.folder / "double"
    assert [read_run(folder)["processes"] for folder in (toy.run, double)] == [1, 2]
    losses = [[p["loss"] for p in read_run(folder)["curve"] if "loss" in p] for folder in (toy.run, double)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2
    before, single, double = (load_model(folder).state_dict() for folder in (toy.base, toy.run, double))
    # The gradient of a bias of keys is 0. Adam turns its rounding errors into steps.
    for name, weight in ((name, weight) for name, weight in single.items() if not name.endswith(KEY_BIASES)):
        # The rounding error of a gradient near zero can change the sign of Adam's step.
        moved = (weight - before[name]).float().norm()
        assert (weight - double[name]).float().norm() <= 1e-2 * moved + 1e-6, name


@pytest.mark.slow
@capability("resume", "A run that was killed resumes and ends with the same bits.")
def test_a_killed_run_resumes_and_ends_with_the_same_weights(toy):
    kill_run(toy.flags("resumed", save_steps=1), TrainingLoop, "_run_step", 2)
    resumed = train_accelerate.main(toy.flags("resumed", save_steps=1, resume="auto"))
    assert read_weights(resumed) == read_weights(toy.run)


@pytest.mark.slow
@capability("interpolation", "`training.interpolate` mixes the weights of base and run.")
def test_a_run_is_interpolated_with_its_base(toy):
    output = toy.folder / "quarter"
    interpolate([str(toy.base), str(toy.run), "--share", "0.25", "--output", str(output)])
    base, trained, between = (load_model(folder).state_dict() for folder in (toy.base, toy.run, output))
    for name in (name for name, weight in base.items() if weight.is_floating_point()):
        torch.testing.assert_close(between[name], 0.75 * base[name] + 0.25 * trained[name], rtol=1e-5, atol=1e-6)
    assert load_processor(output)


@pytest.mark.slow
@capability(
    "trimming", "`modeling_capivara.trim_vocabulary` removes tokens. Texts of kept tokens have the same embeddings."
)
def test_a_trimmed_model_embeds_texts_of_kept_tokens_as_before(toy):
    (toy.folder / "texts").write_text("\n".join(CAPTIONS[:4]), encoding="utf-8")
    run = partial(trim, toy.base, toy.folder / "small", ["pt"], words=[1], texts=[toy.folder / "texts"])
    if toy.title in NOT_TRIMMED:
        return refusal_of(run)
    run()
    sizes = [load_model(toy.folder / name).num_parameters() for name in ("base", "small")]
    before, after = (
        load_embedder(str(toy.folder / name), "cpu").embed_texts(CAPTIONS[:4]) for name in ("base", "small")
    )
    assert sizes[0] > sizes[1]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    return None


# --- Evaluation and search -------------------------------------------------------------------------------------------


def read_values(path: Path) -> dict[tuple[str, str], float]:
    """Return the values of the measured model in a result file, by direction and metric."""
    records = [record for record in json.loads(path.read_text())["records"] if record["model"] != "baseline"]
    names = ("recall@1", "recall@5", "median_rank")
    return {(r["direction"], r["metric"]): r["value"] for r in records if r["metric"] in names}


@pytest.mark.slow
@capability("evaluation", "`eval.retrieval` measures what the run has recorded.")
def test_evaluating_the_saved_model_gives_the_results_of_the_run(toy):
    output = toy.folder / "evaluated.json"
    evaluate(["--model", str(toy.run), "--dataset", str(toy.dataset), "--output", str(output)])
    (expected,) = (toy.run / "results").glob("*_pt.json")
    values = read_values(output)
    assert values == pytest.approx(read_values(expected)) and len(values) == 6


@pytest.mark.slow
@capability("search", "An index of the base is searched with the run and its export, without embedding an image again.")
def test_a_fine_tuned_model_searches_an_index_of_its_base(toy):
    """The vectors of the images are those of the model, and stay when the text encoder is replaced."""
    paths, index = make_pictures(toy.folder / "pictures", 5), toy.folder / "index.lance"
    report = PictureIndex.open(index, model=str(toy.base)).add(toy.folder / "pictures")
    assert report.embedded == 5
    opened = PictureIndex.open(index, model=str(toy.run))
    assert opened.add(toy.folder / "pictures").embedded == 0
    embedder = load_embedder(str(toy.run), "cpu")
    images = embedder.embed_images([Image.open(path).convert("RGB") for path in paths])
    np.testing.assert_allclose(opened.vectors([str(path) for path in paths]), images, rtol=0, atol=1e-3)
    texts = opened.model.embed_texts(TWELVE)
    np.testing.assert_allclose(texts, embedder.embed_texts(TWELVE), rtol=0, atol=1e-5)
    hits = opened.search(TWELVE[0], k=5)
    order = (images @ torch.from_numpy(texts[0])).argsort(descending=True).tolist()
    assert hits[0].path == str(paths[order[0]]) and len(hits) == 5
    assert PictureIndex.open(index, model=str(toy.exported)).search(TWELVE[0], k=5)[0].path == hits[0].path


# --- Export ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@capability("export", "`hub_upload.export` writes the weights of the run.")
def test_an_export_has_the_weights_of_the_run(toy):
    files = {path.relative_to(toy.exported).as_posix() for path in toy.exported.rglob("*")}
    assert {"model.safetensors", "modules.json", "onnx/text_model.onnx", "onnx/model.onnx"} <= files
    run, exported = (load_model(folder).state_dict() for folder in (toy.run, toy.exported))
    assert run.keys() == exported.keys() and all(torch.equal(run[name], exported[name]) for name in run)
    assert image_encoder_digest(toy.exported) == image_encoder_digest(toy.base)


@pytest.fixture(scope="module")
def plain(selected, tmp_path_factory):
    """Arrays that transformers computes for all exported models, in a process that can't import this project."""
    folder = tmp_path_factory.mktemp("plain")
    paths = [folder / f"{number}.png" for number in range(6)]
    for image, path in zip(pictures(), paths, strict=True):
        image.save(path)
    inputs = {"texts": random_texts()[:3], "images": list(map(str, paths))}
    (folder / "inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
    script, exports = Path(__file__).with_name("plain_process.py"), [str(toy.exported) for toy in selected]
    command = [sys.executable, "-I", str(script), str(folder / "inputs.json"), str(folder / "plain.npz"), *exports]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return inputs["texts"], np.load(folder / "plain.npz")


@pytest.mark.slow
@capability("transformers alone", "Without this package, transformers computes the same embeddings.")
def test_transformers_alone_gives_the_embeddings_of_the_run(toy, plain):
    texts, arrays = plain
    expected = load_embedder(str(toy.run), "cpu").embed_texts(texts)
    np.testing.assert_allclose(arrays[f"{toy.exported}/texts"], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(arrays[f"{toy.exported}/images"], toy.embeds["images"], rtol=0, atol=1e-5)


@pytest.mark.slow
@capability(
    "sentence-transformers", "The same for texts of 1 to 64 tokens, alone and next to longer ones, and for images."
)
def test_sentence_transformers_gives_the_embeddings_of_the_run(toy):
    """Texts of 1 to 64 tokens, alone and next to longer ones."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(toy.exported), device="cpu", trust_remote_code=True)
    assert np.ptp(toy.embeds["texts"], axis=0).max() > 0.01, "equal rows would prove nothing"
    for batch_size in (1, len(TEXTS)):
        embeds = encoder.encode(TEXTS, batch_size=batch_size)
        np.testing.assert_allclose(embeds, toy.embeds["texts"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(pictures()), toy.embeds["images"], rtol=0, atol=1e-5)


@pytest.mark.slow
@capability("ONNX", "The graphs compute the same embeddings, for the same texts and images.")
def test_onnx_graphs_give_the_embeddings_of_the_run(toy):
    """SigLIP takes 64 token ids without a mask. Other models take any number of tokens."""
    names = ("text_model", "vision_model", "model")
    text, vision, both = (onnx.open_session(toy.exported / f"onnx/{name}.onnx") for name in names)
    inputs, processor = {node.name: node.shape for node in text.get_inputs()}, load_processor(toy.run)
    assert ("attention_mask" in inputs) == ("SigLIP" not in toy.title) == (inputs["input_ids"][1] != 64)
    rows = tokenize(processor, TEXTS)
    embeds = [text.run(None, {name: [values] for name, values in row.items()})[0][0] for row in rows]
    np.testing.assert_allclose(embeds, toy.embeds["texts"], rtol=0, atol=1e-5)
    pixels = processor(images=pictures(), return_tensors="np")["pixel_values"]
    (embeds,) = vision.run(None, {"pixel_values": pixels})
    np.testing.assert_allclose(embeds, toy.embeds["images"], rtol=0, atol=1e-5)
    assert {node.name for node in both.get_inputs()} == {*inputs, "pixel_values"}


@pytest.mark.slow
@capability(
    "transformers.js",
    "In Node.js, the pipeline computes the scores of the pipeline in Python, from the same token ids.",
)
def test_transformers_js_classifies_like_the_pipeline(toy):
    in_browser = pytest.importorskip("in_browser")
    from skimage import data
    from transformers import pipeline

    try:
        packages = in_browser.node_packages()
    except RuntimeError as error:
        end_test = pytest.fail if os.environ.get("CI_REQUIRES_NODE") == "1" else pytest.skip
        end_test(f"transformers.js can't run: {error}")
    picture = toy.folder / "photos" / "a.png"
    picture.parent.mkdir()
    in_browser.Image.fromarray(data.astronaut()).resize((32, 32)).save(picture)
    options = {"labels": in_browser.LABELS, "template": in_browser.TEMPLATE, "texts": TWELVE, "dtype": "fp32"}
    with in_browser.served({in_browser.NAME: toy.exported}, packages, photos=picture.parent) as address:
        request = in_browser.request(address, pictures=[f"{address}photos/a.png"], **options)
        answer = in_browser.ask("node", request, packages)
    classify = pipeline("zero-shot-image-classification", str(toy.exported), trust_remote_code=True)
    ours = classify(str(picture), candidate_labels=in_browser.LABELS, hypothesis_template=in_browser.TEMPLATE)
    expected = {entry["label"]: entry["score"] for entry in ours}
    assert {entry["label"]: entry["score"] for entry in answer["classes"][0]} == pytest.approx(expected, abs=1e-4)
    assert answer["ids"] == [load_processor(toy.run).tokenizer(text)["input_ids"] for text in TWELVE]


@pytest.mark.slow
@capability("exchange of the text encoder", "`--formats drop_in` writes a text encoder that replaces that of the base.")
def test_the_text_encoder_replaces_that_of_the_base(toy):
    output = toy.folder / "text_encoder"
    export = partial(export_model, toy.run, output, ["drop_in"], base=str(toy.base))
    if toy.title in NOT_EXCHANGED:
        return refusal_of(export)
    export()
    assert json.loads((output / "drop_in.json").read_text())["image_digest"] == image_encoder_digest(toy.base)
    graph = onnx.open_session(output / "onnx/text_model.onnx")
    rows = tokenize(load_processor(toy.run), TEXTS)
    embeds = [graph.run(None, {name: [values] for name, values in row.items()})[0][0] for row in rows]
    np.testing.assert_allclose(embeds, toy.embeds["texts"], rtol=0, atol=1e-5)
    return None


# --- The page --------------------------------------------------------------------------------------------------------


def format_outcomes() -> str:
    """Return the recorded outcomes as a Markdown table with a row per capability, followed by the reasons."""
    outcomes = [OUTCOMES[kind, title] for title in CAPABILITIES for kind in MAKERS]
    reasons = list(dict.fromkeys(filter(None, outcomes)))
    lines = [f"| | {' | '.join(MAKERS)} |", "|---" * (len(MAKERS) + 1) + "|"]
    for title in CAPABILITIES:
        cells = [OUTCOMES[kind, title] for kind in MAKERS]
        marks = [f"no ({reasons.index(reason) + 1})" if reason else "yes" for reason in cells]
        lines.append(f"| {title} | {' | '.join(marks)} |")
    lines += ["", "What is checked:", ""]
    lines += [f"- {title}: {check}" for title, check in CAPABILITIES.items()]
    lines += ["", "Reasons, as the error messages state them:", ""]
    return "\n".join([*lines, *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""])


@pytest.mark.slow
def test_the_page_shows_the_recorded_outcomes(toys):
    missing = {(kind, title) for kind in MAKERS for title in CAPABILITIES} - OUTCOMES.keys()
    if missing:
        pytest.skip(f"{len(missing)} tests of this file failed or did not run")
    model_types = {json.loads((toy.base / "config.json").read_text())["model_type"] for toy in toys.values()}
    assert model_types == KINDS.keys(), "each kind of the table must be tested"
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition("<!-- recorded outcomes -->\n")
    if os.environ.get("WRITE_MATRIX"):
        PAGE.write_text(head + mark + format_outcomes(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == head + mark + format_outcomes()


def test_the_page_lists_all_kinds_and_capabilities():
    text = PAGE.read_text(encoding="utf-8")
    assert f"| | {' | '.join(MAKERS)} |" in text
    assert re.findall(r"^- ([^:`]+): (.*)$", text, re.MULTILINE) == list(CAPABILITIES.items())
