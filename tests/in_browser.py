"""Run transformers.js, installed from npm, on an exported model in Node and in Chromium, and compare it with PyTorch.

Repositories are served over HTTP like those of the Hub. Node, npm and Chromium are required; transformers.js is
installed once, in ~/.cache/capivara-node.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from browser import open_browser, require_chromium, served_folders
from PIL import Image

from capivara_common.files import atomic_folder
from hub_upload.space.static_page import LIBRARY_PACKAGE
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import random_images, random_texts

if TYPE_CHECKING:
    from playwright.sync_api import Page

PACKAGES = {LIBRARY_PACKAGE: ">=4.3 <5"}  # npm package -> accepted versions; tested with 4.3.2
AXE = {"axe-core": ">=4.10 <5"}  # npm package that checks accessibility -> accepted versions
AXE_SCRIPT = """axe.run().then(({ violations }) => violations.filter(({ impact }) => /serious|critical/.test(impact))
  .map(({ id, nodes }) => [id, ...nodes.map((node) => node.html)]))"""
MIN_NODE = 20  # major version of Node that sharp, a dependency of transformers.js, requires
SCRIPT = Path(__file__).parent / "in_browser.mjs"
NAME = "my-name/my-model"  # of the served repository
LABELS, TEMPLATE = ["um gato", "um cachorro", "um céu azul"], "uma foto de {}"
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "retina")
ASK = """async request => {
  const { answer } = await import("/code/in_browser.mjs");
  return answer(await import(request.library), request);
}"""


def inputs_and_outputs(repository: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return inputs of the model as JSON, and the outputs of PyTorch for them."""
    model, processor = load_model(repository).eval(), load_processor(repository)
    batch = processor(images=random_images(), text=random_texts(), return_tensors="pt")
    with torch.inference_mode():
        output = model(**batch)
    expected = {name: output[name].numpy() for name in ("image_embeds", "text_embeds", "logits_per_image")}
    pixels = batch["pixel_values"].numpy()
    data = base64.b64encode(np.ascontiguousarray(pixels, np.float32).tobytes()).decode()
    inputs = {name: batch[name].tolist() for name in ("input_ids", "attention_mask")}
    return inputs | {"pixel_values": {"data": data, "dims": list(pixels.shape)}}, expected


def compared(answer: dict[str, Any], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Compare an answer with PyTorch: lowest cosines of the embeddings, and largest difference of the scores."""
    actual = {name: np.array(answer[name]) for name in expected}
    return {
        "lowest_image_cosine": float((actual["image_embeds"] * expected["image_embeds"]).sum(axis=-1).min()),
        "lowest_text_cosine": float((actual["text_embeds"] * expected["text_embeds"]).sum(axis=-1).min()),
        "largest_score_difference": float(np.abs(actual["logits_per_image"] - expected["logits_per_image"]).max()),
    }


def save_photos(folder: Path) -> list[Path]:
    """Save photographs of scikit-image as PNG, which all programs decode to the same pixels."""
    from skimage import data

    folder.mkdir(exist_ok=True)
    for name in PHOTOS:
        Image.fromarray(getattr(data, name)()).convert("RGB").save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in PHOTOS]


def node_packages(wanted: dict[str, str] = PACKAGES) -> Path:
    """Return a folder `node_modules` with npm packages, and install them if they are missing.

    Install scripts of the packages do not run; the packages contain binaries for the CPU.

    Raises:
        RuntimeError: node or npm is missing or too old, or the registry can't be reached.
    """
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise RuntimeError(f"{program} is not installed: apt-get install nodejs npm")
    version = subprocess.check_output(["node", "--version"], text=True).strip()
    if int(version.removeprefix("v").split(".")[0]) < MIN_NODE:
        raise RuntimeError(f"Node {version} is too old (sharp of {LIBRARY_PACKAGE}); install {MIN_NODE} or later")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capivara-node"
    name = "-".join(f"{package.split('/')[-1]}{versions}" for package, versions in wanted.items())
    folder = cache / name.translate({ord(sign): "-" for sign in ">=< "})
    if not folder.is_dir():
        packages = [f"{package}@{versions}" for package, versions in wanted.items()]
        flags = ("--ignore-scripts", "--no-save", "--no-audit", "--no-fund")
        try:
            with atomic_folder(folder) as new:
                subprocess.run(["npm", "install", *flags, *packages], cwd=new, capture_output=True, check=True)
        except (subprocess.CalledProcessError, OSError) as error:
            if not folder.is_dir():  # otherwise another process has installed them
                raise RuntimeError(f"npm could not fetch {', '.join(wanted)}: {error}") from error
    return folder / "node_modules"


def required_packages(wanted: dict[str, str] = PACKAGES) -> Path:
    """Return `node_packages`; skip the test if npm packages or Chromium are missing, or fail with CI_REQUIRES_…=1."""
    require_chromium()
    try:
        return node_packages(wanted)
    except RuntimeError as error:
        required = "1" in (os.environ.get("CI_REQUIRES_NODE"), os.environ.get("CI_REQUIRES_CHROMIUM"))
        (pytest.fail if required else pytest.skip)(f"{error}, so {', '.join(wanted)} can't be fetched")


def serious_faults(page: "Page") -> list[list[str]]:
    """Return the serious and critical accessibility faults that axe-core finds: rule and elements of each fault."""
    page.evaluate((required_packages(AXE) / "axe-core" / "axe.min.js").read_text(encoding="utf-8"))
    return page.evaluate(AXE_SCRIPT)


def served(repositories: dict[str, Path], packages: Path, **folders: Path) -> AbstractContextManager[str]:
    """Serve repositories like the Hub does, npm packages and further folders; the context is the address."""
    mounts = {f"/{name}/resolve/main/": folder for name, folder in repositories.items()}
    mounts |= {"/npm/": packages, "/code/": SCRIPT.parent} | {f"/{name}/": folder for name, folder in folders.items()}
    return served_folders(mounts)


def request(address: str, **fields: Any) -> dict[str, Any]:
    """Return a request for `ask`; in_browser.mjs explains its fields."""
    return {"name": NAME, "env": {"remoteHost": address, "allowLocalModels": False}, **fields}


def ask(place: str, request: dict[str, Any], packages: Path) -> dict[str, Any]:
    """Return the answer of transformers.js in "node" or "chromium"."""
    return (ask_node if place == "node" else ask_chromium)(request, packages)


def ask_node(request: dict[str, Any], packages: Path) -> dict[str, Any]:
    """Return the answer of a new process of Node with an empty cache."""
    with tempfile.TemporaryDirectory(prefix="capivara-node-") as temporary:
        library = packages / LIBRARY_PACKAGE / "dist" / "transformers.node.mjs"
        env = request["env"] | {"cacheDir": temporary}
        # JSON in ASCII, because texts may hold half a surrogate pair, which UTF-8 can't encode.
        content = json.dumps(request | {"env": env, "library": library.as_uri()})
        (Path(temporary) / "request.json").write_text(content, encoding="ascii")
        done = subprocess.run(
            ["node", SCRIPT, f"{temporary}/request.json"], capture_output=True, text=True, check=False, timeout=900
        )
        if done.returncode:
            raise RuntimeError(f"Node ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1]) | {"stderr": done.stderr}


def ask_chromium(request: dict[str, Any], packages: Path) -> dict[str, Any]:
    """Return the answer of a new page of headless Chromium, on one thread: the server sends no isolation headers.

    The library and its WebAssembly come from the same server.
    """
    address = request["env"]["remoteHost"]
    env = request["env"] | {"wasmPaths": f"{address}npm/onnxruntime-web/dist/"}
    with open_browser() as opened:
        opened.page.set_default_timeout(900_000)
        opened.page.goto(address)
        return opened.page.evaluate(
            ASK, request | {"env": env, "library": f"/npm/{LIBRARY_PACKAGE}/dist/transformers.min.js"}
        )
