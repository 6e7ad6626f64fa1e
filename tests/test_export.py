"""An export loads in every library, in a process without this project, and gives the embeddings of the model."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from hub_server import HubServer
from safetensors.torch import load_file
from tiny import TINY_TEXT, TINY_VISION, randomize, save_model, tiny_config, tiny_tokenizer
from tokenizers import Tokenizer
from towers import without_cleaning
from transformers import TimmWrapperConfig

from hub_upload import export
from hub_upload.export import DEFAULT_FORMATS, export_model
from hub_upload.formats import open_clip as open_clip_format
from hub_upload.formats.onnx import PRECISION_SUFFIXES, open_session
from hub_upload.formats.open_clip import choose_and_check_text_config_id
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor, loading
from modeling_capivara.convert_open_clip import to_capivara_state_dict, to_open_clip_state_dict
from modeling_capivara.loading import load_processor
from modeling_capivara.two_towers import random_images, random_texts

ROOT = Path(__file__).resolve().parent.parent
LOADER = ROOT / "tests" / "loader_process.py"
PLAIN_PUSH = """
import sys
from transformers import AutoModel, AutoProcessor

folder, repo_id = sys.argv[1:]
code = {"trust_remote_code": "modeling_capivara" not in sys.modules}
AutoModel.from_pretrained(folder, **code).push_to_hub(repo_id)
AutoProcessor.from_pretrained(folder, **code).push_to_hub(repo_id)
"""
TEXTS = ["um gato", "uma capivara na água, ao pôr do sol", "SÃ£o JoÃ£o &amp;amp; cia", "", "foto " * 90, "ﬁm ½ ☕"]
TOLERANCE = {"onnx": 1e-4}  # 1e-5 for other loaders


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with images and captions as files."""
    folder = tmp_path_factory.mktemp("inputs")
    for number, image in enumerate(random_images()):
        image.save(folder / f"{number}.png")
    (folder / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def text_tower_on_the_hub():
    """Let `us/text` be a Hub id with the configuration of the tiny models' text tower."""
    with pytest.MonkeyPatch.context() as patch:
        original = open_clip_format.AutoConfig.from_pretrained
        configs = {"us/text": tiny_config().text_config, "us/whole": tiny_config()}

        def from_pretrained(name, **options):
            return configs.get(str(name)) or original(name, **options)

        patch.setattr(open_clip_format.AutoConfig, "from_pretrained", from_pretrained)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_processor):
    """A tiny model, wide enough for int8 (which rounds blocks of 128 numbers), with dropout that must be off."""
    wide = {**TINY_VISION, "hidden_size": 128, "intermediate_size": 256}
    text = {**TINY_TEXT, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    return save_model(tmp_path_factory.mktemp("source") / "model", tiny_processor, vision_config=wide, text_config=text)


@pytest.fixture(scope="module")
def repository(source, tmp_path_factory):
    """An export of `source` in all default formats."""
    folder = tmp_path_factory.mktemp("repository") / "all"
    export_model(source, folder, DEFAULT_FORMATS, text_config="us/text")
    return folder


@torch.no_grad()
def embeddings_of(source: Path) -> dict[str, np.ndarray]:
    """Return the model's embeddings of the example images and texts."""
    model, processor = CapivaraModel.from_pretrained(source).eval(), CapivaraProcessor.from_pretrained(source)
    output = model(**processor(text=TEXTS, images=random_images(), return_tensors="pt"))
    return {"images": output.image_embeds.numpy(), "texts": output.text_embeds.numpy()}


def export_without_onnx(source: Path, output: Path, **arguments) -> list[tuple[str, int]]:
    """Export without ONNX, which is slow."""
    return export_model(source, output, DEFAULT_FORMATS[:3], **{"text_config": "us/text", **arguments})


def nothing_left(output: Path) -> bool:
    """Return whether a failed export has left neither the folder nor temporary files."""
    return not output.exists() and not [path for path in output.parent.iterdir() if ".tmp-" in path.name]


def check_loaders(loaders: str, name: str, source: Path, inputs: Path, folder: Path, **more: str):
    """Assert that loaders (separated by commas) give the embeddings of `source` in a process without this project."""
    (folder / "elsewhere").mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules"), **more}
    done = subprocess.run(
        [sys.executable, "-I", str(LOADER), loaders, name, str(inputs), str(folder / "found.npz")],
        cwd=folder / "elsewhere", env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    arrays = np.load(folder / "found.npz")
    for loader in loaders.split(","):
        for part, embeds in embeddings_of(source).items():
            assert np.abs(embeds).max() > 0.01 and np.ptp(embeds, axis=0).max() > 0.01, "equal rows prove nothing"
            tolerance = TOLERANCE.get(loader, 1e-5)
            np.testing.assert_allclose(arrays[f"{loader}/{part}"], embeds, rtol=0, atol=tolerance, err_msg=loader)


@pytest.mark.slow
def test_each_loader_gives_the_embeddings_of_the_model(source, repository, inputs, tmp_path):
    check_loaders("transformers,sentence_transformers,onnx", str(repository), source, inputs, tmp_path)
    cached = tmp_path / "cache/models--us--text"
    tiny_config().text_config.save_pretrained(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0" * 40)
    cache = {"HF_HUB_CACHE": str(tmp_path / "cache")}
    check_loaders("open_clip", f"local-dir:{repository}", source, inputs, tmp_path, **cache)


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        yield hub


def hub_environment(hub: HubServer, home: Path) -> dict[str, str]:
    """Return the environment of a process with the simulated Hub, an empty cache and without this project."""
    return {name: value for name, value in hub.environment(home).items() if name != "PYTHONPATH"}


@pytest.mark.slow
@pytest.mark.parametrize("package", [True, False])
def test_push_to_hub_of_model_and_processor_includes_code_and_loads_again(
    source, repository, inputs, hub, tmp_path, package
):
    environment = {**os.environ, **hub_environment(hub, tmp_path / "home")}
    environment["PYTHONPATH"] = str(ROOT) if package else ""
    code = "import modeling_capivara\n" + PLAIN_PUSH if package else PLAIN_PUSH
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(repository), "us/plain"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"modeling_capivara.py", "processing_capivara.py", "tokenizer.json"} <= hub.files("us/plain").keys()
    check_loaders("transformers", "us/plain", source, inputs, tmp_path, **hub_environment(hub, tmp_path / "home-2"))


# --- ONNX: float32 graphs equal the model for any batch size and length, int8 graphs are close to it -----------------


def embeds(repository, precision: str, images=(), texts=()) -> list[torch.Tensor]:
    """Return embeddings computed by the ONNX graphs: of images, then of texts."""
    processor, embeddings = load_processor(repository), []
    for tower, inputs in (("vision", {"images": images}), ("text", {"text": texts})):
        if len(*inputs.values()):
            graph = open_session(repository / "onnx" / f"{tower}_model{PRECISION_SUFFIXES[precision]}.onnx")
            embeddings.append(torch.from_numpy(graph.run(None, dict(processor(**inputs, return_tensors="np")))[0]))
    return embeddings


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("images", "texts"), [(1, 1), (2, 5), (6, 6)])
def test_float32_graphs_equal_the_model_for_any_batch_size_and_length(source, repository, images, texts):
    model, processor = CapivaraModel.from_pretrained(source).eval(), load_processor(source)
    pictures, captions = random_images()[:images], ["", *random_texts()][:texts]
    expected = model(**processor(images=pictures, text=captions, return_tensors="pt"))
    actual = embeds(repository, "float32", pictures, captions)
    torch.testing.assert_close(actual, [expected.image_embeds, expected.text_embeds], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_int8_graphs_are_rounded_and_close_to_float32(source, repository):
    exact, rounded = (embeds(repository, kind, random_images(), random_texts()) for kind in ("float32", "int8"))
    for ours, theirs in zip(exact, rounded, strict=True):
        cosines = (ours * theirs).sum(dim=-1)
        assert 0.995 < cosines.min() < 0.99999999, "bit-identical embeddings mean that nothing was rounded"
    paths = (repository / "onnx").glob("*_quantized.onnx")
    kinds = {tensor.data_type for path in paths for tensor in onnx.load(path).graph.initializer}
    assert onnx.TensorProto.UINT8 in kinds
    report = json.loads((repository / "onnx" / "quantisation.json").read_text())
    assert set(report["graphs"]) == {
        f"{kind}_model{end}.onnx" for kind in ("vision", "text") for end in ("", "_quantized")
    }
    assert report["graphs"]["text_model.onnx"]["largest_difference"] < 1e-5
    assert {"onnx", "onnxruntime", "onnxscript", "torch"} <= report["versions"].keys()


@pytest.mark.slow
def test_graphs_contain_no_metadata_of_this_machine(repository):
    for path in (repository / "onnx").glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert not [node.name for node in model.graph.node if node.metadata_props or node.doc_string]
        assert b"stack_trace" not in path.read_bytes() and b".py" not in path.read_bytes()
        names = [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim]
        assert names[0] == ("texts" if "text" in path.name else "images") and names[1] in ("tokens", "")
        onnx.checker.check_model(str(path))
        assert {file.name for file in path.parent.glob(f"{path.name}*")} == {path.name, f"{path.name}_data"}


def test_tokenizer_json_reads_curly_quotes_like_the_code_of_the_model(source, tmp_path):
    """Programs that don't run the code need this. The export of an export must not add the steps again."""
    export_model(source, tmp_path / "repository", ["transformers"])
    ours = load_processor(source).tokenizer
    from_file = Tokenizer.from_file(str(tmp_path / "repository" / "tokenizer.json"))
    for text in ("“um gato”", "‘uma’ casa d’água", "„casa‟"):
        assert from_file.encode(text).ids == ours(text)["input_ids"] != without_cleaning(ours)(text)["input_ids"]
    export_model(tmp_path / "repository", tmp_path / "again", ["transformers"])
    files = [(tmp_path / name / "tokenizer.json").read_text(encoding="utf-8") for name in ("repository", "again")]
    assert files[0] == files[1]


# --- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "shard"), [("float32", "5GB"), ("float32", "40KB"), ("bfloat16", "5GB")])
def test_every_tensor_is_equal_in_both_weight_files(tmp_path, tiny_processor, dtype, shard, caplog, monkeypatch):
    monkeypatch.setattr(CapivaraModel, "from_pretrained", None)  # weights must be memory-mapped, not loaded
    model = randomize(CapivaraModel(tiny_config())).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "model", max_shard_size=shard)
    tiny_processor.save_pretrained(tmp_path / "model")
    caplog.set_level("INFO")
    references = []

    def load_model(folder, config, original=loading.load_memory_mapped_model):
        mapped_model = original(folder, config)
        references.append(weakref.ref(mapped_model))
        return mapped_model

    def load_tensors(files, original=loading.load_memory_mapped_tensors):
        assert not any(reference() for reference in references), "memory holds two copies of the weights"
        return original(files)

    monkeypatch.setattr(loading, "load_memory_mapped_model", load_model)
    monkeypatch.setattr(loading, "load_memory_mapped_tensors", load_tensors)
    export_without_onnx(tmp_path / "model", tmp_path / "repository")
    ours = load_file(tmp_path / "repository" / "model.safetensors")
    theirs = load_file(tmp_path / "repository" / "open_clip_model.safetensors")
    for written in (ours, to_capivara_state_dict(theirs)):
        assert written.keys() == model.state_dict().keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())
    assert f"{len(ours)} tensors" in caplog.text
    assert json.loads((tmp_path / "repository" / "config.json").read_text())["dtype"] == dtype


def test_a_wrong_tensor_is_named_and_the_export_is_removed(source, tmp_path, monkeypatch):
    def swap_layer_norms(model):
        state = to_open_clip_state_dict(model)
        pre, post = "visual.ln_pre.weight", "visual.ln_post.weight"
        return {**state, pre: state[post], post: state[pre]}

    monkeypatch.setattr(export, "to_open_clip_state_dict", swap_layer_norms)
    message = r"open_clip_model\.safetensors .*vision_model\.post_layernorm\.weight, vision_model\.pre_lay"
    with pytest.raises(ValueError, match=message):
        export_without_onnx(source, tmp_path / "repository")
    assert nothing_left(tmp_path / "repository")


@pytest.mark.slow
def test_a_timm_tower_gives_the_same_embeddings_in_open_clip(inputs, tmp_path):
    config = tiny_config(vision_config=TimmWrapperConfig(architecture="tf_efficientnet_lite0"))
    randomize(CapivaraModel(config)).save_pretrained(tmp_path / "model")
    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    processor = CapivaraImageProcessor(size=size[0], crop_size=size[1], image_mean=[0.5] * 3)
    CapivaraProcessor(processor, tiny_tokenizer()).save_pretrained(tmp_path / "model")
    export_without_onnx(tmp_path / "model", tmp_path / "repository")
    expected = embeddings_of(tmp_path / "model")
    actual = open_clip_embeddings(tmp_path / "repository")
    for part, embeds in expected.items():
        np.testing.assert_allclose(actual[part], embeds, rtol=0, atol=1e-5)


@torch.no_grad()
def open_clip_embeddings(repository: Path) -> dict[str, np.ndarray]:
    """Return open_clip's embeddings of the example images and texts."""
    import open_clip

    settings = json.loads((repository / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    tiny_config().text_config.save_pretrained(repository / "text")
    settings |= {"hf_model_name": str(repository / "text"), "hf_model_pretrained": False}
    name = f"local-dir:{repository}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, text_cfg=settings)
    pixels = torch.stack([preprocess(image) for image in random_images()])
    model.eval()
    texts = model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)
    return {"images": model.encode_image(pixels, normalize=True).numpy(), "texts": texts.numpy()}


# --- Requirements of open_clip ---------------------------------------------------------------------------------------


def test_the_default_text_config_is_xlm_roberta_base():
    assert choose_and_check_text_config_id(CapivaraConfig(), None) == "FacebookAI/xlm-roberta-base"
    assert (
        choose_and_check_text_config_id(CapivaraConfig(), "FacebookAI/xlm-roberta-base")
        == "FacebookAI/xlm-roberta-base"
    )
    changed = CapivaraConfig(text_config={"layer_norm_eps": 1e-6})
    assert choose_and_check_text_config_id(changed, None) is None
    with pytest.raises(ValueError, match=r"layer_norm_eps.*1e-05.*1e-06"):
        choose_and_check_text_config_id(changed, "FacebookAI/xlm-roberta-base")


@pytest.mark.parametrize(
    ("text_config", "message"),
    [
        ("FacebookAI/xlm-roberta-base", "vocab_size.*250002.*300"),
        ("nobody/nothing", "nobody/nothing"),
        ("us/whole", "model_type.*'capivara'.*'xlm-roberta'"),
        ("tests", "tests.*folder"),
    ],
)
def test_a_text_config_that_does_not_fit_the_model_is_refused(source, tmp_path, text_config, message):
    with pytest.raises(ValueError, match=message):
        export_without_onnx(source, tmp_path / "repository", text_config=text_config)
    assert nothing_left(tmp_path / "repository")


def test_open_clip_reads_the_same_token_ids_as_the_model(source, tmp_path):
    export_without_onnx(source, tmp_path / "repository")
    settings = json.loads((tmp_path / "repository" / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    plain = without_cleaning(CapivaraProcessor.from_pretrained(source).tokenizer)
    for options, is_same in ((settings["tokenizer_kwargs"], True), ({"tokenizer_type": "xlm-roberta"}, False)):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "repository", **options)
        assert all((plain(text).input_ids == theirs(text).input_ids) for text in ("um gato", "ﬁm")) == is_same


@pytest.mark.slow
def test_a_model_that_open_clip_cannot_build_is_refused(tmp_path, tiny_processor):
    config = tiny_config(vision_config=TimmWrapperConfig(architecture="mobilenetv3_small_050"))
    CapivaraModel(config).save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="open_clip"):
        export_without_onnx(tmp_path / "model", tmp_path / "repository")
    assert nothing_left(tmp_path / "repository")


@pytest.mark.slow
def test_open_clip_loads_an_export_from_the_hub(source, inputs, hub, tmp_path):
    export_without_onnx(source, tmp_path / "repository", repo_id="us/model")
    tiny_config().text_config.save_pretrained(tmp_path / "text")
    for name, folder in (("us/text", "text"), ("us/model", "repository")):
        hub.store(name, tmp_path / folder)
    check_loaders("open_clip", "hf-hub:us/model", source, inputs, tmp_path, **hub_environment(hub, tmp_path / "home"))
