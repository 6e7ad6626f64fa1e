"""Pictures that are steered by a sentence: gradients are true, views are views, and the files say what they show."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples import diffusion_guidance, guide_generation
from examples.diffusion_guidance import SentenceGuidance, clean_latents, signal_shares
from examples.guide_generation import as_image, to_pixel_values
from modeling_capivara import CapivaraModel
from modeling_capivara.two_towers import embed_images, embed_texts

SENTENCE = "um gato azul"
# --- Gradients through `pixel_values` --------------------------------------------------------------------------------


def test_pixels_are_prepared_as_the_processor_does(tiny_processor):
    """To eight bits' roundings, enlarged, made smaller, and as they are."""
    for side in (32, 20, 80):
        smooth = torch.nn.functional.interpolate(
            torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)), size=(side, side), mode="bicubic"
        ).clamp(0, 1)
        theirs = tiny_processor(images=as_image(smooth), return_tensors="pt")["pixel_values"]
        ours = to_pixel_values(smooth, tiny_processor.image_processor)
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 0.03, side
    with pytest.raises(ValueError, match="must be square, got 40 x 30"):
        to_pixel_values(torch.rand(1, 3, 30, 40), tiny_processor.image_processor)


# --- A picture that is optimised -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("cells", "views"), [("10", "2"), ("40", "0")])
def test_a_picture_comes_nearer_to_its_sentence(cells, views, tiny_folder, tmp_path, capsys, tiny_processor):
    words = ["--model", str(tiny_folder), "--size", "40", "--steps", "15", "--views", views]
    words += ["--others", "o pão", "a casa", "--cells", cells]
    guide_generation.main([*words, "--sentence", SENTENCE, "--output_dir", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["picture.png", "results.json", "steps.png"]
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    found = results["cosines"]
    assert list(found) == [SENTENCE, "o pão", "a casa"]
    assert found[SENTENCE]["after"] > found[SENTENCE]["before"] + 0.05
    picture = Image.open(tmp_path / "out" / "picture.png")
    model = CapivaraModel.from_pretrained(tiny_folder).eval()
    cosine = embed_images(model, tiny_processor, [picture]) @ embed_texts(model, tiny_processor, [SENTENCE]).T
    assert found[SENTENCE]["after"] == pytest.approx(cosine.item(), abs=1e-6), "what is said is what the file shows"
    assert Image.open(tmp_path / "out" / "steps.png").size == (8 * 128, 128) and picture.size == (40, 40)
    assert f"{found[SENTENCE]['after']:6.3f}   {SENTENCE}" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (guide_generation, ["--sentence", " "], "The sentence is empty"),
        (guide_generation, ["--sentence", "a", "--steps", "0"], "steps must be at least 1, got 0"),
        (diffusion_guidance, ["--sentence", "a", "--pipeline", "p", "--steps", "1"], "steps must be at least 2, got 1"),
        (diffusion_guidance, ["--sentence", "a", "--pipeline", "p", "--scale", "2"], "scale must be from 0 to 1, got"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(module, words, message, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        module.main(["--model", str(tiny_folder), "--output_dir", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


# --- A pipeline of diffusers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    """Stable Diffusion at toy width with random weights: its own UNet, decoder, text encoder and scheduler."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tiny import tiny_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    blocks = {"block_out_channels": (16, 32), "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        sample_size=16, layers_per_block=1, cross_attention_dim=32, attention_head_dim=4, **blocks,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        **blocks,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), eos_token_id=2, bos_token_id=0, **sizes))
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    made = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    made.vae.requires_grad_(False)
    return made


def run_pipeline(pipe, prompt, steps, size, seed, guidance):
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": steps, "height": size, "width": size, "generator": generator}
    return pipe(prompt, callback_on_step_end=guidance, **options).images[0]


def test_two_latents_in_a_row_tell_the_picture_that_ddim_foresees(pipe, monkeypatch):
    told, seen = [], []
    step = pipe.scheduler.step

    def watched(noise, timestep, sample, **options):
        result = step(noise, timestep, sample, **options | {"return_dict": True})
        shares = signal_shares(pipe.scheduler, int(timestep))
        told.append(result.pred_original_sample)
        seen.append(clean_latents(sample, result.prev_sample, *shares))
        return (result.prev_sample,)

    monkeypatch.setattr(pipe.scheduler, "step", watched)
    run_pipeline(pipe, "a cat", 6, 32, 0, None)
    assert len(told) == 6
    for ours, theirs in zip(seen, told, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.slow
def test_a_pipeline_is_steered(pipe, tiny_model, tiny_processor):
    def cosine(image):
        texts = embed_texts(tiny_model, tiny_processor, [SENTENCE])
        return (embed_images(tiny_model, tiny_processor, [image]) @ texts.T).item()

    guidance = SentenceGuidance(tiny_model, tiny_processor, SENTENCE, scale=0.3)
    still = SentenceGuidance(tiny_model, tiny_processor, SENTENCE, scale=0.0)
    plain, moved, same = (run_pipeline(pipe, "a cat", 8, 32, 0, one) for one in (None, guidance, still))
    assert np.array_equal(plain, same), "a scale of 0 changes nothing"
    assert len(guidance.cosines) == 7 and guidance.cosines[-1] > still.cosines[-1]
    assert cosine(moved) > cosine(plain) + 0.05
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    assert np.array_equal(moved, run_pipeline(pipe, "a cat", 8, 32, 0, guidance)), "nothing is left of the last run"


def test_schedulers_that_can_not_be_looked_ahead_of_are_refused(pipe, tiny_model, tiny_processor, monkeypatch):
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    guidance = SentenceGuidance(tiny_model, tiny_processor, SENTENCE)
    clipping = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    for scheduler in (EulerDiscreteScheduler.from_config(pipe.scheduler.config), clipping):
        monkeypatch.setattr(pipe, "scheduler", scheduler)
        with pytest.raises(ValueError, match="needs a DDIMScheduler that does not clip"):
            run_pipeline(pipe, "a cat", 3, 32, 0, guidance)


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(pipe, tiny_folder, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    page = Path(__file__).resolve().parent.parent / "docs" / "uses.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {"folder": str(tiny_folder), "pipeline": str(tmp_path / "pipeline")}
    exec(compile(code, "uses.md", "exec"), names)
    assert names["image"].size == (32, 32) and len(names["guidance"].cosines) == 49
