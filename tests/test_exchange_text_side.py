"""The example with two vector stores: vectors of the base model, searched with two text encoders."""

import json
import re

import numpy as np
import pytest
import torch
from towers import other_texts

from eval.capivara_metrics.metrics import RECALL_CUTOFFS, recall_at_k
from eval.retrieval import RetrievalArguments, RetrievalEmbeddings, check_and_flatten_captions, load_retrieval_data
from hub_upload import export
from hub_upload.formats import onnx as onnx_files
from modeling_capivara.two_towers import load_embedder

STORES = ["QdrantPictures", pytest.param("LancePictures", marks=pytest.mark.slow)]


@pytest.fixture
def example():
    """The module of the example. It is imported here, because it takes a tenth of the time of all imports."""
    from examples import exchange_text_side

    return exchange_text_side


@pytest.fixture
def trained(tiny_folder, tmp_path):
    return other_texts(tiny_folder, tmp_path / "trained")


@pytest.mark.parametrize("store", STORES)
def test_a_store_returns_its_vectors_and_the_nearest_images(store, example, tmp_path):
    vectors = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    pictures = getattr(example, store)(tmp_path / "store", vectors.numpy())
    np.testing.assert_allclose(pictures.vectors(), vectors, rtol=0, atol=1e-6)
    query = vectors[3] + 0.1 * vectors[4]
    assert pictures.nearest(query.numpy()) == (vectors @ query).topk(10).indices.tolist()
    recalls = example.search_vector_store_and_compute_recall(
        pictures, vectors.numpy(), torch.arange(20).roll(1).tolist()
    )
    assert recalls["recall@1"] == 0 < recalls["recall@10"] < 1
    pictures.close()


@pytest.mark.slow
def test_recall_equals_that_of_eval(example, tiny_folder, trained, tiny_dataset_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_files, "write_onnx", without_graphs)
    flags = ["--model", trained, "--base", tiny_folder, "--output", tmp_path / "side", "--formats", "drop_in"]
    export.main([str(flag) for flag in flags])
    flags = ["--text_side", tmp_path / "side", "--base", tiny_folder, "--dataset", tiny_dataset_folder]
    example.main([str(flag) for flag in [*flags, "--split", "train", "--output", tmp_path / "out"]])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["pictures"], results["captions"], results["embedded_again"]) == (12, 18, 0)
    data = load_retrieval_data(
        RetrievalArguments(str(tiny_folder), str(tiny_dataset_folder), tmp_path / "x", split="train")
    )
    texts, image_of_text = check_and_flatten_captions(data.captions)
    images = load_embedder(str(tiny_folder)).embed_images([*data.images.decode_images(range(12))])
    for side, folder in (("base", tiny_folder), ("exchanged", trained)):
        text_embeds = load_embedder(str(folder)).embed_texts(texts)
        ranks = RetrievalEmbeddings(text_embeds, images, image_of_text).ranks["text_to_image"]
        expected = {f"recall@{k}": recall_at_k(ranks, k) for k in RECALL_CUTOFFS}
        for store in results["recall"].values():
            assert {name: store[side][name] for name in expected} == pytest.approx(expected)
    assert results["recall"]["Qdrant"]["base"] != results["recall"]["Qdrant"]["exchanged"]
    assert re.search(r"\b18 captions.*\b12 images.* 0$", capsys.readouterr().out, re.MULTILINE)
    assert str(tmp_path) not in json.dumps(results)

    def nearest(self, query):
        self.vectors = lambda: torch.eye(12, 24).numpy()
        return list(range(10))

    monkeypatch.setattr(example.QdrantPictures, "nearest", nearest)
    example.main(
        [str(flag) for flag in [*flags, "--split", "train", "--output", tmp_path / "out", "--overwrite_output_dir"]]
    )
    assert re.search(r"again: 12$", capsys.readouterr().out, re.MULTILINE), "changed vectors must be counted"


def without_graphs(folder, source, towers):
    (folder / "onnx").mkdir()
    (folder / "onnx/quantisation.json").write_text('{"graphs": {}}')


def test_a_text_encoder_for_another_image_encoder_is_refused(example, tiny_folder, tmp_path):
    flags = ["--text_side", str(tmp_path), "--base", str(tiny_folder), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"drop_in\.json"):
        example.main(flags)
    (tmp_path / "drop_in.json").write_text('{"image_digest": "0123"}')
    with pytest.raises(ValueError, match=r"\b0123, not "):
        example.main(flags)
    assert not (tmp_path / "out").exists()
