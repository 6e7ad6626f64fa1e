"""`from_open_clip`: a published open_clip model is downloaded, converted and verified once, without open_clip."""

import json
import os
import shutil
import subprocess
import sys
from ast import literal_eval
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from PIL import Image
from safetensors.torch import load_file
from test_readme import code_with
from tiny import randomize, tiny_config, tiny_tokenizer
from towers import MAKERS, as_open_clip
from transformers.initialization import no_init_weights

from capivara_common.hub_cache import resolve_model_folder
from capivara_search.models import convert_with_torch, find_model
from modeling_capivara import CapivaraConfig, CapivaraModel, convert_open_clip
from modeling_capivara.convert_open_clip import new_open_clip_model, to_open_clip_model_cfg

NAME = "hiaac-nlp/CAPIVARA"
WEIGHTS = "open_clip_pytorch_model.bin"
POSITION_IDS = "text.transformer.embeddings.position_ids"
TEXTS = ["um gato dormindo", "SÃ£o JoÃ£o &amp;amp; cia", "", "uma praia ao pôr do sol, com coqueiros " * 9]
# A user's program, in which open_clip can't be imported, as if it were not installed.
PROGRAM = """
import json, sys
sys.modules["open_clip"] = None
import torch
from PIL import Image
from transformers import AutoProcessor
from benchmarks.timing import peak_resident_bytes
from modeling_capivara import CapivaraModel
for line in sys.stdin:
    name, revision, texts = json.loads(line)
    model = CapivaraModel.from_open_clip(name, revision).eval()
    processor = AutoProcessor.from_pretrained(model.name_or_path)
    image = Image.effect_mandelbrot((310, 227), (-2, -1.5, 1, 1.5), 100)
    with torch.no_grad():
        outputs = model(**processor(text=texts, images=[image], return_tensors="pt"))
    results = [model.name_or_path, outputs.text_embeds.tolist(), outputs.image_embeds.tolist()]
    print(json.dumps([results, peak_resident_bytes()]), flush=True)
"""


@contextmanager
def user(hub: HubServer, cache: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[list, int]]]:
    """Start a process that loads the model on each call; yield a function that makes it do so.

    The function returns the model's folder with the embeddings of texts and image, and the peak memory in bytes.
    """
    environment = {**os.environ, **hub.environment(tmp_path / "home", token=None), "CAPIVARA_CACHE": str(cache)}
    with (tmp_path / "stderr").open("w+") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, **pipes)

        def load(revision: str | None = None) -> tuple[list, int]:
            process.stdin.write(json.dumps([NAME, revision, TEXTS]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, (tmp_path / "stderr").read_text()[-3000:]
            return json.loads(line)

        try:
            yield load
        finally:
            process.kill()
            process.communicate(timeout=60)


def published(folder: Path, config: CapivaraConfig, tokenizer, text_model: str) -> Path:
    """Write a repository as users of open_clip publish it: configuration, pickled weights, tokenizer, card."""
    folder.mkdir()
    with no_init_weights():
        state = randomize(new_open_clip_model(config), seed=1).state_dict()
    # Older versions of transformers, with which such models were trained, saved this constant.
    state[POSITION_IDS] = torch.arange(config.text_config.max_position_embeddings)[None]
    torch.save(state, folder / WEIGHTS)
    model_cfg = to_open_clip_model_cfg(config, text_model)
    model_cfg["text_cfg"]["hf_tokenizer_name"] = "xlm-roberta-base"
    settings = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: pt\n---\n# CAPIVARA\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_published(tmp_path):
    """A tiny open_clip folder whose text tower is configured by a local folder."""
    tiny_config().text_config.save_pretrained(tmp_path / "text")
    return published(tmp_path / "open", tiny_config(), tiny_tokenizer(), str(tmp_path / "text"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def open_clip_embeddings(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return open_clip's embeddings of the same texts and image."""
    import open_clip

    name = f"local-dir:{folder}"
    with no_init_weights():
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained_text=False)
    image = Image.effect_mandelbrot((310, 227), (-2, -1.5, 1, 1.5), 100)
    with torch.no_grad():
        texts = model.eval().encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)
        return texts, model.encode_image(preprocess(image)[None], normalize=True)


# --- Once -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fetched_converted_and_kept(tiny_published, cache, tmp_path):
    (tiny_published / "photo.png").write_bytes(b"not to be fetched")
    with HubServer(tmp_path / "hub") as hub, user(hub, cache, tmp_path) as load:
        commit = hub.store(NAME, tiny_published).at("main").oid
        (folder, *ours), _ = load()
        assert folder == str(cache / "open_clip" / "hiaac-nlp--CAPIVARA" / commit)
        assert f"{NAME}/{WEIGHTS}" in hub.fetched and not [name for name in hub.fetched if "photo" in name]
        for actual, expected in zip(ours, open_clip_embeddings(tiny_published), strict=True):
            torch.testing.assert_close(torch.tensor(actual), expected, rtol=0, atol=1e-5)
        card, origin = ((Path(folder) / name).read_text() for name in ("README.md", "conversion.json"))
        assert "license: mit" in card and f"base_model: {NAME}" in card
        origin = json.loads(origin)
        assert origin["source"] == f"hf-hub:{NAME}" and origin["revision"] == commit
        assert len(origin["weights_digest"]) == 32
        # The second call needs neither the Hub's cache nor another request.
        (tmp_path / "home").rename(tmp_path / "away")
        requests, files = len(hub.requests), {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
        assert load()[0] == [folder, *ours] and len(hub.requests) == requests
        assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == files
        # If a conversion was killed after the download, it can be repeated without network.
        hub.__exit__()
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        (tmp_path / "away").rename(tmp_path / "home")
        shutil.rmtree(cache)
        assert load()[0] == [folder, *ours]


@pytest.mark.slow
def test_the_published_model_example_of_the_readme_runs(tiny_published, cache, tmp_path):
    Image.effect_mandelbrot((310, 227), (-2, -1.5, 1, 1.5), 100).convert("RGB").save(tmp_path / "foto.jpg")
    with HubServer(tmp_path / "hub") as hub:
        hub.store(NAME, tiny_published)
        environment = {**os.environ, **hub.environment(tmp_path / "home", token=None)}
        command = [sys.executable, "-c", code_with("README.md", "from_open_clip")]
        output = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
    assert {answer["label"] for answer in literal_eval(output)} == {"gato", "moto"}


@pytest.mark.slow
def test_a_revision_asks_the_hub_and_a_commit_does_not(tiny_published, cache, tmp_path):
    with HubServer(tmp_path / "hub") as hub, user(hub, cache, tmp_path) as load:
        repo = hub.store(NAME, tiny_published)
        first = repo.at("main").oid

        def folders(*revisions: str | None) -> list[Path]:
            return [Path(load(revision)[0][0]) for revision in revisions]

        assert [folder.name for folder in folders(None)] == [first]
        state = torch.load(tiny_published / WEIGHTS, weights_only=True)
        torch.save({**state, "logit_scale": state["logit_scale"] + 1}, tiny_published / WEIGHTS)
        added = hub.storage.add((tiny_published / WEIGHTS).read_bytes(), True)
        second = repo.commit("main", "trained on", {WEIGHTS: added}).oid
        # Without a revision the cached commit is used. Naming the branch fetches the new commit, the default from then
        # on.
        loaded = folders(None, "main", None, first)
        assert [folder.name for folder in loaded] == [first, second, second, first]
        scales = [load_file(folder / "model.safetensors")["logit_scale"] for folder in loaded[:2]]
        assert scales[1] - scales[0] == pytest.approx(1)
        hub.__exit__()  # without the Hub, the cache is used
        assert [folder.name for folder in folders("main", second)] == [second, second]


@pytest.mark.slow
def test_two_at_once_convert_once(tiny_published, cache):
    program = (
        "import logging, sys; logging.basicConfig(level=logging.INFO)\n"
        "from capivara_common.hub_cache import resolve_model_folder\n"
        "from capivara_search.models import convert_with_torch\n"
        "print(resolve_model_folder(sys.argv[1], convert_with_torch))"
    )
    line = [sys.executable, "-c", program, str(tiny_published)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(line, **pipes) for _ in range(2)]
    ended = [process.communicate(timeout=200) for process in processes]
    assert ended[0][0] == ended[1][0] and Path(ended[0][0].strip(), "model.safetensors").is_file()
    assert sum("Converting" in errors for _, errors in ended) == 1


# --- Checked --------------------------------------------------------------------------------------------------------


def test_a_folder_of_open_clip_is_converted_and_again_when_it_changes(tiny_published, cache):
    model = find_model(str(tiny_published))
    expected, _ = open_clip_embeddings(tiny_published)
    torch.testing.assert_close(torch.from_numpy(model.embed_texts(TEXTS)), expected, rtol=0, atol=1e-5)
    assert model.folder.parent.parent == cache / "open_clip" and model.name == "open" and model.image_size == 32
    assert len(model.image_digest) == 32
    written_at = (model.folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model_folder(f"local-dir:{tiny_published}", convert_with_torch) == model.folder
    assert (model.folder / "model.safetensors").stat().st_mtime_ns == written_at
    state = torch.load(tiny_published / WEIGHTS, weights_only=True)
    state["visual.proj"] = state["visual.proj"] * -1
    torch.save(state, tiny_published / WEIGHTS)
    second = find_model(str(tiny_published))
    assert second.image_digest != model.image_digest
    remaining = [path.name for path in model.folder.parent.iterdir()]
    assert remaining == [second.folder.name], "only the latest conversion is kept"


def cache_is_empty(cache: Path) -> bool:
    """Return whether the cache has no files except locks."""
    return not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_tensor_that_comes_back_changed_is_noticed(tiny_published, cache, monkeypatch):
    convert = convert_open_clip.to_capivara_state_dict

    def swapped(state):
        result = convert(state)
        first, second = "vision_model.pre_layrnorm.weight", "vision_model.post_layernorm.weight"
        return {**result, first: result[second], second: result[first]}

    monkeypatch.setattr(convert_open_clip, "to_capivara_state_dict", swapped)
    with pytest.raises(ValueError, match=r"visual\.ln_post\.weight, visual\.ln_pre\.weight\."):
        resolve_model_folder(str(tiny_published), convert_with_torch)
    assert cache_is_empty(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("text.proj.0.weight"), r"missing keys: text_projection\.0\.weight"),
        (lambda state: state["visual.ln_post.bias"].fill_(torch.nan), "not finite"),
        (lambda state: state["text.proj.2.weight"].zero_(), "do not differ"),
    ],
)
def test_damaged_weights_are_refused(tiny_published, cache, change, message):
    state = torch.load(tiny_published / WEIGHTS, weights_only=True)
    change(state)
    torch.save(state, tiny_published / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        resolve_model_folder(str(tiny_published), convert_with_torch)
    assert cache_is_empty(cache)


def test_a_clip_model_of_transformers_is_refused(tmp_path):
    MAKERS["clip"](tmp_path / "clip")
    assert resolve_model_folder(str(tmp_path / "clip"), convert_with_torch) == tmp_path / "clip"
    with pytest.raises(ValueError, match=r"^[^\n]*model_type[^\n]*'clip'[^\n]*$"):
        CapivaraModel.from_open_clip(str(tmp_path / "clip"))


def test_from_open_clip_needs_the_installed_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "capivara_common.hub_cache", None)
    with pytest.raises(ImportError, match="modeling-capivara"):
        CapivaraModel.from_open_clip(NAME)


# --- At full size ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_at_full_size_in_the_published_layout(cache, tmp_path):
    """Convert 366 million parameters with XLM-R's vocabulary and a text tower given only by name, and back."""
    from capivara_search.miniature_encoders import load_tokenizer

    folder = published(tmp_path / "open", CapivaraConfig(), load_tokenizer(), "xlm-roberta-base")
    with HubServer(tmp_path / "hub") as hub, user(hub, cache, tmp_path) as load:
        hub.store(NAME, folder)
        (converted, *ours), peak = load()
        # The file that is read and the file that is written are both mapped; there is less than one further copy.
        assert peak < 2.9 * 4 * 366_121_473
        assert hub.fetched.count(f"{NAME}/{WEIGHTS}") == 1
    assert (Path(converted) / "model.safetensors").stat().st_size > 4 * 366_121_473
    as_open_clip(Path(converted), tmp_path / "back")
    before = torch.load(folder / WEIGHTS, weights_only=True, mmap=True)
    returned = load_file(tmp_path / "back/open_clip_model.safetensors")
    assert before.keys() - returned.keys() == {POSITION_IDS} and returned.keys() < before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in returned.items())
    for actual, expected in zip(ours, open_clip_embeddings(tmp_path / "back"), strict=True):
        torch.testing.assert_close(torch.tensor(actual), expected, rtol=0, atol=1e-5)
