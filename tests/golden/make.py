"""Make what lies beside this file: all that people have on their disks, as the tree of commit a876dd5 writes it.

    git worktree add ../before a876dd5 && cd ../before      # with a virtual environment of its own: make .venv/test
    git checkout main -- tests/golden/make.py tests/test_golden.py
    .venv/bin/python -m examples.openmoji.prepare           # data/openmoji/base, minutes
    .venv/bin/python tests/golden/make.py

It refuses to run on any other tree: later ones are held to these files by `tests/test_golden.py`. What is made holds
absolute paths, so it is made in /home/ana, which must not be there before and is gone after. Two runs give the same
figures; times, durations and the names of files within the index differ. Of saved models the copies of the model's
code are left out, and of finished runs the checkpoints.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parent
ROOT = GOLDEN.parent.parent
COMMIT = "a876dd5"
ROOMS = ("capivara_search", "caption_data", "captions", "eval", "examples", "hub_upload", "modeling_capivara")
ROOMS += ("records", "training", "train_accelerate.py")
HOME = Path("/home/ana")
CACHE = HOME / ".cache"
# Before any import: neither this machine's caches nor its clock.
os.environ |= {"HOME": str(HOME), "HF_HOME": str(CACHE / "huggingface"), "CAPIVARA_CACHE": str(CACHE / "capivara")}
os.environ |= {"HF_HUB_OFFLINE": "1", "TZ": "UTC", "LANG": "pt_BR.UTF-8", "COLUMNS": "100"}
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import PIL.Image
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from safetensors.torch import load_file, save_file
from test_golden import TEXTS, VECTOR_PICTURES, demo_image_side, digest_of, embedded, full_size_image_side
from tiny import randomise, tiny_tokenizer

COLOURS = {"azul": (20, 40, 230), "verde": (20, 200, 40), "vermelho": (230, 20, 30), "branco": (250, 250, 250)}
COLOURS |= {"preto": (10, 10, 10)}  # of the folder that is forgotten
PLACES = {"inteiro": (0, 0, 64, 48), "em cima": (0, 0, 64, 24), "na esquerda": (0, 0, 32, 48)}  # on grey
PICTURES = {f"{colour} {place}": (COLOURS[colour], PLACES[place]) for colour in COLOURS for place in PLACES}
ENGLISH = {"azul": "blue", "verde": "green", "vermelho": "red", "branco": "white", "preto": "black"}
ENGLISH |= {"inteiro": "all over", "em cima": "on top", "na esquerda": "to the left"}
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
VISION = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
TEXT = {"model_type": "xlm-roberta", "vocab_size": 300, "hidden_size": 20, "intermediate_size": 40}
TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 82}
RUN = """# The embedded default at toy size.
model: modelos/a
dataset: data/squares
language: pt
eval_languages: [pt, en]
effective_batch_size: 10
micro_batch_size: 4
max_steps: 6
learning_rate: 1e-2
min_learning_rate: 0
warmup_steps: 1
weight_decay: 0
eval_steps: 2
seed: 0
num_threads: 1
mixed_precision: "no"  # which every machine has
"""


def main() -> None:
    """Make everything anew."""
    changed = subprocess.run(["git", "diff", "--name-only", COMMIT, "--", *ROOMS], cwd=ROOT, capture_output=True)
    if changed.returncode or changed.stdout:
        sys.exit(f"error: this tree is not that of {COMMIT}. The docstring says how to get there.")
    if not (base := ROOT / "data" / "openmoji" / "base").is_dir():
        sys.exit(f"error: {base} is missing. Make it: python -m examples.openmoji.prepare")
    if HOME.exists():
        sys.exit(f"error: {HOME} is there, and would be removed. Make the files on a machine without it.")
    torch.set_num_threads(1)
    HOME.mkdir(parents=True)
    try:
        with contextlib.chdir(HOME):
            make_models()
            make_pictures()
            make_search()
            make_data()
            make_runs()
            make_records()
            make_captions()
            make_parity()
            make_vectors()
            make_digests(base)
            tidy()
        for path in GOLDEN.iterdir():
            if path.name not in ("make.py", "__pycache__"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(HOME, GOLDEN, ignore=shutil.ignore_patterns(".cache"), dirs_exist_ok=True)
    finally:
        shutil.rmtree(HOME)
    print(f"{sum(path.stat().st_size for path in GOLDEN.rglob('*') if path.is_file()):,} bytes in {GOLDEN}")


def config() -> Any:
    """Of a model that is smaller than those of the other tests."""
    from modeling_capivara import CapivaraConfig

    return CapivaraConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)


def processor() -> Any:
    """Of such a model."""
    from modeling_capivara import CapivaraImageProcessor, CapivaraProcessor

    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return CapivaraProcessor(CapivaraImageProcessor(**sizes), tiny_tokenizer())


def picture(caption: str) -> PIL.Image.Image:
    """A coloured area on grey, 64 x 48."""
    colour, place = PICTURES[caption]
    image = PIL.Image.new("RGB", (64, 48), (128, 128, 128))
    image.paste(colour, place)
    return image


def make_models() -> None:
    """Model a, which has learnt the pictures, and b, of the same image side and another text side."""
    from modeling_capivara import CapivaraModel

    torch.manual_seed(0)
    model, with_processor = randomise(CapivaraModel(config())).train(), processor()
    inputs = with_processor(text=list(PICTURES), images=list(map(picture, PICTURES)), return_tensors="pt")
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(400):
        optimiser.zero_grad()
        model(**inputs, return_loss=True).loss.backward()
        optimiser.step()
    generator = torch.Generator().manual_seed(1)
    for name in ("a", "b"):
        folder = Path("modelos", name)
        model.eval().save_pretrained(folder)
        with_processor.save_pretrained(folder)
        (folder / "README.md").write_text(f"---\nlicense: mit\n---\n\n# Model {name}\n", encoding="utf-8")
        for tensor in [*model.text_model.parameters(), *model.text_projection.parameters()]:
            tensor.data += 0.05 * tensor.data.std() * torch.randn(tensor.shape, generator=generator)


def make_pictures() -> None:
    """Fotos, with camera's dates and places, a copy of a picture and a file that is none; Viagem; Outras."""
    for number, caption in enumerate(PICTURES):
        image = picture(caption)
        exif, where = image.getexif(), Path("Viagem" if caption.startswith("preto") else "Fotos")
        if number % 2:  # no camera has said anything of the others
            taken = f"2024:0{1 + number % 9}:15 10:00:00"
            exif.get_ifd(PIL.ExifTags.IFD.Exif)[PIL.ExifTags.Base.DateTimeOriginal] = taken
        if number % 3 == 1:  # Tokyo
            place = {1: "N", 2: (35.0, 40.0, 48.0), 3: "E", 4: (139.0, 42.0, 0.0)}
            exif.get_ifd(PIL.ExifTags.IFD.GPSInfo).update(place)
        save_picture(image, where / caption.split()[0] / f"{caption.replace(' ', '-')}.jpg", exif=exif)
    save_picture(picture("azul em cima").resize((32, 24)), Path("Fotos", "pequena.jpg"))
    Path("Fotos", "quebrada.jpg").write_bytes(b"no picture")
    set_time(Path("Fotos", "quebrada.jpg"))
    save_picture(picture("verde inteiro").resize((48, 48)), Path("Outras", "x.png"))
    both = picture("azul em cima")
    both.paste(COLOURS["verde"], (0, 24, 64, 48))  # which no label fits for sure
    save_picture(both, Path("Outras", "y.png"))


def save_picture(image: PIL.Image.Image, path: Path, **options: Any) -> None:
    """Save a picture, as changed on a day in 2024."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options, **({"quality": 95} if path.suffix == ".jpg" else {}))
    set_time(path)


def set_time(path: Path) -> None:
    """Say that a file was changed on a day in 2024."""
    os.utime(path, (datetime(2024, 11, 3, 12).timestamp(),) * 2)


def capivara(*words: str, output: str | None = None) -> None:
    """The command, in Portuguese; what it prints goes to `output` in the folder of outputs."""
    from capivara_search.command import main as command

    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        command([*words, "--lang", "pt", "--index", str(HOME / "fotos.lance")])
    if output:
        Path("outputs").mkdir(exist_ok=True)
        Path("outputs", output).write_text(printed.getvalue(), encoding="utf-8")


def make_search() -> None:
    """The index, made with model a, a folder forgotten, then taken over by model b; and what the commands print."""
    labels = ("--labels", "azul", "verde", "vermelho", "branco", "--template", "{} inteiro")
    for form in ("json", "csv"):
        capivara("classificar", "Outras", *labels, "--model", "modelos/a", f"--{form}", output=f"classify.{form}")
    capivara("indexar", "Fotos", "Viagem", "--model", "modelos/a")
    capivara("esquecer", "Viagem")
    capivara("indexar", "Fotos", "--model", "modelos/b")
    for form in ("json", "csv"):
        for model in ("a", "b"):
            words = ("buscar", "azul em cima", "-k", "3", "--model", f"modelos/{model}")
            capivara(*words, f"--{form}", output=f"search_{model}.{form}")
        like = ("--like", "Fotos/verde/verde-inteiro.jpg", "-k", "2", "--since", "2024-02", "--until", "2024-12")
        capivara("buscar", *like, f"--{form}", output=f"like.{form}")
        capivara("duplicatas", "--threshold", "0.95", f"--{form}", output=f"duplicates.{form}")
    capivara("status", "--json", output="status.json")
    for form in ("csv", "parquet"):
        capivara("exportar", f"outputs/export.{form}")


def make_data() -> None:
    """Captions with pictures for the runs, pictures with labels, and two benchmarks for the suite."""
    captions = list(PICTURES)

    def squares(rows: range) -> Dataset:
        names = [captions[row % len(captions)] for row in rows]
        columns = {
            "image": [noisy(picture(name), row) for name, row in zip(names, rows, strict=True)],
            "captions-pt": [[name, f"foto de {name}"][: 1 + row % 2] for name, row in zip(names, rows, strict=True)],
            "captions-en": [[" ".join(ENGLISH[part] for part in name.split(" ", 1))] for name in names],
        }
        texts = List(Value("string"))
        return Dataset.from_dict(columns, Features({"image": Image(), "captions-pt": texts, "captions-en": texts}))

    splits = {"train": range(12), "validation": range(12, 20), "test": range(20, 34)}
    DatasetDict({name: squares(rows) for name, rows in splits.items()}).save_to_disk("data/squares")
    card = "---\nlicense: cc-by-sa-4.0\npretty_name: Quadrados coloridos\nattribution: Squares by nobody.\n---\n"
    Path("data/squares/README.md").write_text(card, encoding="utf-8")

    def colours(number: int, seed: int) -> Dataset:
        labels = [label for label in range(3) for _ in range(number)]
        names = ["azul inteiro", "verde inteiro", "vermelho inteiro"]
        images = [noisy(picture(names[label]), seed + row) for row, label in enumerate(labels)]
        features = Features({"image": Image(), "label": ClassLabel(names=CIFAR)})
        return Dataset.from_dict({"image": images, "label": labels}, features)

    DatasetDict(train=colours(4, 100), test=colours(2, 200)).save_to_disk("data/colours")
    rows = {"image": [noisy(picture(name), row) for row, name in enumerate(captions)]}
    rows["caption"] = [[f"{name} {number}" for number in range(5)] for name in captions]
    features = Features({"image": Image(), "caption": List(Value("string"))})
    DatasetDict(test=Dataset.from_dict(rows, features)).save_to_disk("data/benchmarks/flickr30k-pt")
    for number, name in enumerate(captions[:4]):
        save_picture(
            noisy(picture(name), 300 + number), Path("data/benchmarks/mnist", str(number % 2), f"{number}.png")
        )


def noisy(image: PIL.Image.Image, seed: int) -> PIL.Image.Image:
    """A picture that is like no other one, 24 x 24."""
    pixels = np.asarray(image.resize((24, 24)), np.float64)
    noise = np.random.default_rng(seed).normal(0, 40, (6, 6, 3)).repeat(4, 0).repeat(4, 1)
    return PIL.Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def make_runs() -> None:
    """Runs of the demo's kind, with LoRA, of three seeds, one that turns the space, and one that was stopped."""
    import train_accelerate
    from hub_upload.card import main as card

    Path("demo.yaml").write_text(RUN, encoding="utf-8")

    def train(name: str, *flags: str) -> None:
        train_accelerate.main(["--config", "demo.yaml", "--output_dir", f"runs/{name}", *flags])

    train("demo")
    train("lora", "--lora_rank", "2")
    train("seeds", "--runs", "3")
    train("rotated", "--matryoshka_dims", "12", "8")
    for path in Path("runs").rglob("*.png"):  # a fourth of the bytes
        PIL.Image.open(path).convert("RGB").quantize(16).save(path, optimize=True)
    for name in ("demo", "lora", "seeds", "rotated"):
        card(["--model", f"runs/{name}"])
        card(["--model", f"runs/{name}", "--language", "pt", "--output", f"runs/{name}/README.pt.md"])
        for folder in [*Path("runs", name).rglob("checkpoints")]:
            shutil.rmtree(folder)
    validate, calls = train_accelerate.validate, []

    def stopped(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:  # after step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)

    train_accelerate.validate = stopped
    try:
        train("stopped")
    except SystemExit as end:
        assert end.code == 128 + signal.SIGTERM and Path("runs/stopped.partial/checkpoints/step-00000002").is_dir()
    finally:
        train_accelerate.validate = validate


def make_records() -> None:
    """Result files of every measurement."""
    from eval.classification import main as classification
    from eval.linear_probe import main as linear_probe
    from eval.retrieval import main as retrieval
    from eval.suite import main as suite

    def measure(command: Callable[[list[str]], None], output: str, words: str) -> None:
        command([*words.split(), "--output", f"records/{output}"])

    squares, colours = "--dataset data/squares --gallery 0", "--benchmark cifar-10 --images data/colours"
    for language in ("pt", "en"):
        measure(retrieval, f"retrieval_{language}.json", f"--model modelos/a {squares} --language {language}")
    measure(retrieval, "retrieval_dim_12.json", f"--model runs/rotated {squares} --dim 12")
    measure(classification, "classification.json", f"--model modelos/a {colours}")
    measure(linear_probe, "linear_probe.json", f"--model modelos/a {colours} --shots 1 2 --draws 2")
    benchmarks = "paper --only flickr30k-pt mnist --data_dir data/benchmarks --offline"
    measure(suite, "suite", f"{benchmarks} --model modelos/a --baseline modelos/b")


def make_captions() -> None:
    """Builds of a caption data set in Portuguese: a finished one, and one that was stopped within its second stage."""
    import captions.build
    import captions.stages

    Path("captions").mkdir()
    names, texts = list(PICTURES), List(Value("string"))
    features = Features({"image": Image(), "captions-en": texts, "url": Value("string")})

    def english(names: list[str], broken: int | None) -> Dataset:
        rows = {"image": [], "captions-en": [], "url": [f"https://example.org/{i}" for i in range(len(names))]}
        for number, name in enumerate(names):
            noisy(picture(name), 400 + number).save(file := io.BytesIO(), "PNG")
            rows["image"].append({"bytes": b"no image" if number == broken else file.getvalue(), "path": None})
            rows["captions-en"].append([f"blue {number}", " ".join(ENGLISH[part] for part in name.split(" ", 1))])
        return Dataset.from_dict(rows, features)

    DatasetDict(train=english(names, 3), test=english(names[:6], None)).save_to_disk("captions/english")
    content = {
        "dataset": "captions/english", "output": "captions/built", "language": "pt", "evaluation_splits": ["test"],
        "translate": {"backend": "file", "import": "captions/tables/{split}.tsv", "rows_per_part": 6},
        "score": {"model": "modelos/a", "device": "cpu", "rows_per_part": 4},
        "select": {"caption_strategy": "rank", "caption_count": 1, "rows_per_part": 8},
        "card": {"pretty_name": "Quadrados", "license": "cc-by-4.0", "sources": [{"name": "Noise", "license": "CC0"}]},
    }  # fmt: skip
    Path("captions/config.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    with contextlib.suppress(SystemExit):  # it waits for the tables
        captions.build.main(["--config", "captions/config.yaml"])
    for path in Path("captions/tables").glob("*.tsv"):
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t")[:2] for line in lines]
        lines = [f"{name}\t{text}\t{portuguese(text)}" for name, text in rows]
        path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    captions.build.main(["--config", "captions/config.yaml"])
    stop_in_second_stage(["--config", "captions/config.yaml", "--output", "captions/half"])


def stop_in_second_stage(words: list[str]) -> None:
    """A build that a process does until it is killed, one part of its score written."""
    import captions.build

    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        found = rename(path, target)
        if "2-score" in Path(target).parts and Path(target).suffix == ".parquet":
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    sys.stdout.flush()
    if not (child := os.fork()):
        Path.rename = renamed
        captions.build.main(words)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def portuguese(text: str) -> str:
    """A caption of the table, translated."""
    for word, english in ENGLISH.items():
        text = text.replace(english, word)
    return text


def make_parity() -> None:
    """A model as open_clip's users publish theirs, and what open_clip makes of texts and pictures with it."""
    import open_clip

    from modeling_capivara.open_clip_mapping import build_open_clip, open_clip_model_cfg

    model, folder = randomise(build_open_clip(config()), seed=1), Path("open_clip")
    config().text_config.save_pretrained(folder / "text")
    settings = {"model_cfg": open_clip_model_cfg(config(), "open_clip/text", 32)}
    settings["preprocess_cfg"] = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    tiny_tokenizer().save_pretrained(folder)
    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:open_clip", pretrained_text=False)
    images = torch.stack([preprocess(PIL.Image.open(path).convert("RGB")) for path in VECTOR_PICTURES])
    with torch.no_grad():
        texts = model.eval().encode_text(open_clip.get_tokenizer("local-dir:open_clip")(TEXTS), normalize=True)
        images = model.encode_image(images, normalize=True)
    save_file({"texts": texts, "images": images}, "open_clip_vectors.safetensors")


def make_vectors() -> None:
    """What transformers' Auto classes give of every kind of saved model."""
    found = {}
    for name in ("modelos/a", "modelos/b", "runs/demo", "runs/lora", "runs/seeds/seed-1", "runs/rotated"):
        texts, images = embedded(Path(name))
        found |= {f"{name}/texts": texts, f"{name}/images": images}
    save_file(found, "vectors.safetensors")


def make_digests(base: Path) -> None:
    """The digests of image sides; of the demo's, what it takes to put it together: all but the tower of a package."""
    Path("demo_image_side").mkdir()
    for name in ("config.json", "processor_config.json"):
        content = json.loads((base / name).read_text(encoding="utf-8"))
        kept = ("model_type", "vision_config", "projection_dim", "image_processor")
        content = {key: value for key, value in content.items() if key in kept}
        Path("demo_image_side", name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    name = "visual_projection.weight"
    save_file({name: load_file(base / "model.safetensors")[name]}, "demo_image_side/visual_projection.safetensors")
    digests = {name: digest_of(name) for name in ("modelos/a", "modelos/b", "runs/demo", "runs/rotated", "miniature")}
    digests["demo"] = digest_of(base)
    assert digests["demo"] == digest_of(demo_image_side(CACHE / "demo", HOME))
    digests["full_size"] = digest_of(full_size_image_side(CACHE / "full_size"))
    Path("digests.json").write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def tidy() -> None:
    """Remove copies of the code, logs and what git does not keep."""
    for path in [*HOME.rglob("*.py"), *HOME.rglob("*.lock"), HOME / "Viagem"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in sorted(HOME.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


if __name__ == "__main__":
    main()
