"""ONNX graphs: those of the model in evaluation mode, for any batch and length, int8 near to them."""

import json

import onnx
import pytest
import torch
from tiny import TINY_VISION, randomise, tiny_config

from hub_upload.export import export
from hub_upload.formats.onnx import ENDINGS, open_graph
from modeling_capivara import CapivaraModel
from modeling_capivara.loading import load_processor
from modeling_capivara.two_towers import random_images, random_texts

pytestmark = pytest.mark.slow
BLOCKS_WIDE = {**TINY_VISION, "hidden_size": 128, "intermediate_size": 256}  # narrower ones would fill no block


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_processor):
    """Saved in training mode, with dropout that would show."""
    folder = tmp_path_factory.mktemp("source") / "model"
    config = tiny_config(vision_config=BLOCKS_WIDE)
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.5
    randomise(CapivaraModel(config)).train().save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def repository(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "repository"
    export(source, folder, ["transformers", "onnx"])
    return folder


def embeds(repository, precision: str, images=(), texts=()) -> list[torch.Tensor]:
    """Embeddings by the graphs: of images, then of texts."""
    processor, found = load_processor(repository), []
    for kind, given in (("vision", {"images": images}), ("text", {"text": texts})):
        if len(*given.values()):
            graph = open_graph(repository / "onnx" / f"{kind}_model{ENDINGS[precision]}.onnx")
            found.append(torch.from_numpy(graph.run(None, dict(processor(**given, return_tensors="np")))[0]))
    return found


@torch.no_grad()
@pytest.mark.parametrize(("images", "texts"), [(1, 1), (2, 5), (6, 6)])
def test_float32_is_the_model_for_any_batch_and_length(source, repository, images, texts):
    model, processor = CapivaraModel.from_pretrained(source).eval(), load_processor(source)
    pictures, captions = random_images()[:images], ["", *random_texts()][:texts]
    expected = model(**processor(images=pictures, text=captions, return_tensors="pt"))
    found = embeds(repository, "float32", pictures, captions)
    torch.testing.assert_close(found, [expected.image_embeds, expected.text_embeds], rtol=0, atol=1e-5)


def test_int8_is_smaller_and_near(source, repository):
    exact, rounded = (embeds(repository, kind, random_images(), random_texts()) for kind in ("float32", "int8"))
    for ours, theirs in zip(exact, rounded, strict=True):
        cosines = (ours * theirs).sum(dim=-1)
        assert 0.995 < cosines.min() < 0.99999999, "equal to the last bit would mean that nothing was rounded"
    paths = (repository / "onnx").glob("*_quantized.onnx")
    kinds = {tensor.data_type for path in paths for tensor in onnx.load(path).graph.initializer}
    assert onnx.TensorProto.UINT8 in kinds
    facts = json.loads((repository / "onnx" / "quantisation.json").read_text())
    assert set(facts["graphs"]) == {
        f"{kind}_model{end}.onnx" for kind in ("vision", "text") for end in ("", "_quantized")
    }
    assert facts["graphs"]["text_model.onnx"]["largest_difference"] < 1e-5
    assert {"onnx", "onnxruntime", "onnxscript", "torch"} <= facts["versions"].keys()


def test_graphs_say_nothing_of_this_machine(repository):
    for path in (repository / "onnx").glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert not [node.name for node in model.graph.node if node.metadata_props or node.doc_string]
        assert b"stack_trace" not in path.read_bytes() and b".py" not in path.read_bytes()
        names = [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim]
        assert names[0] == ("texts" if "text" in path.name else "images") and names[1] in ("tokens", "")
        onnx.checker.check_model(str(path))
        assert {file.name for file in path.parent.glob(f"{path.name}*")} == {path.name, f"{path.name}_data"}
