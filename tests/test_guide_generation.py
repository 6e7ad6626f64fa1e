"""Pictures that are steered by a sentence: gradients are true, views are views, and the files say what they show."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config

from examples import diffusion_guidance, guide_generation
from examples.diffusion_guidance import SentenceGuidance, clean_latents, signal_shares
from examples.guide_generation import as_image, random_views, to_pixel_values
from modeling_capivara import CapivaraModel
from modeling_capivara.embedder import embed_images, embed_texts

SENTENCE = "um gato azul"
# An image tower of each kind: a transformer, and the convolutional one of the demo.
TOWERS = {
    "clip": {},
    "timm": {"vision_config": {"model_type": "timm_wrapper", "architecture": "tf_efficientnet_lite0"}},
}


# --- Gradients through `pixel_values` --------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["clip", pytest.param("timm", marks=pytest.mark.slow)])
def test_the_gradient_of_the_pixels_is_that_of_finite_differences(tower, tiny_model, tiny_processor):
    torch.manual_seed(0)
    model = tiny_model if tower == "clip" else CapivaraModel(tiny_config(**TOWERS[tower])).eval()
    model.double()  # so that differences are not rounding
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    texts = model.get_text_features(**tiny_processor(text=[SENTENCE], return_tensors="pt")).pooler_output

    def agreement(values):
        return torch.nn.functional.cosine_similarity(model.get_image_features(values).pooler_output, texts).sum()

    (gradient,) = torch.autograd.grad(agreement(pixels), pixels)
    assert gradient.abs().sum() > 0
    for seed in range(3):
        way = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step = 1e-5 * way
        with torch.no_grad():
            slope = (agreement(pixels + step) - agreement(pixels - step)) / 2e-5
        torch.testing.assert_close(slope, (gradient * way).sum(), rtol=1e-4, atol=1e-8)


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


def test_views_are_crops_of_the_picture(monkeypatch):
    """Of a picture whose colour says where it is: a view's colours rise evenly, and it shows a part of the whole."""
    side = 48
    ramp = torch.linspace(0, 1, side)
    where = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)])[None]
    monkeypatch.setattr(guide_generation, "NOISE", 0)
    views = random_views(where, 20, torch.Generator().manual_seed(0))
    assert views.shape == (20, 3, side, side) and views.min() >= 0 and views.max() <= 1 and views[:, 2].abs().max() == 0
    middle = views[:, :2, 12:36, 12:36]
    across = (middle[:, 0, :, -1] - middle[:, 0, :, 0]).mean(dim=1) * (side - 1) / 23  # share of the side that is seen
    assert across.min() > 0.3 and across.max() < 1.2 and across.std() > 0.05
    again = random_views(where, 20, torch.Generator().manual_seed(0))
    assert torch.equal(views, again) and not torch.equal(views[0], views[1])


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
        (guide_generation, ["--sentence", "a", "--model", "missing"], "missing"),
        (guide_generation, ["--sentence", "a", "--output_dir", "."], "is not empty"),
        (diffusion_guidance, ["--sentence", "a", "--pipeline", "p", "--steps", "1"], "steps must be at least 2, got 1"),
        (
            diffusion_guidance,
            ["--sentence", "a", "--pipeline", "p", "--scale", "2"],
            "scale must be from 0 to 1, got 2",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(module, words, message, tiny_folder, tmp_path):
    with pytest.raises(SystemExit, match=message) as ended:
        module.main(["--model", str(tiny_folder), "--output_dir", str(tmp_path / "out"), *words])
    assert str(ended.value).startswith("error: ") and not (tmp_path / "out").exists()


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
        images, texts = (
            embed_images(tiny_model, tiny_processor, [image]),
            embed_texts(tiny_model, tiny_processor, [SENTENCE]),
        )
        return (images @ texts.T).item()

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
def test_the_command_runs_a_saved_pipeline(pipe, tiny_folder, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "pipeline")
    words = ["--pipeline", str(tmp_path / "pipeline"), "--model", str(tiny_folder), "--sentence", SENTENCE]
    words += ["--steps", "6", "--size", "32", "--scale", "0.3", "--output_dir", str(tmp_path / "out")]
    diffusion_guidance.main(words)
    plain, guided = map(float, re.findall(r": cosine (-?\d\.\d+)", capsys.readouterr().out))
    assert guided > plain
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plain.png", "guided.png"}


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(pipe, tiny_folder, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    page = Path(__file__).resolve().parent.parent / "docs" / "uses.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {"folder": str(tiny_folder), "pipeline": str(tmp_path / "pipeline")}
    exec(compile(code, "uses.md", "exec"), names)
    assert names["image"].size == (32, 32) and len(names["guidance"].cosines) == 49
