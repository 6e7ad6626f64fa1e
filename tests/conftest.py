"""Fixtures shared by many tests. Heavy packages are imported where they are used."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a request to the Hub would wait for a time-out
HERE = Path(__file__).resolve().parent
# Processes that tests start import this project, and run sitecustomize.py first.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")]))

gc.disable()  # garbage collection would take a fifth of the time of imports, whose objects stay in memory anyway


LONGEST = ("test_executors.py", "test_static_page.py", "test_watch.py")  # these take minutes each, so they start first


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    gc.freeze()  # later collections skip the imported objects, too; a process ends a second earlier
    gc.enable()
    gc.set_threshold(700)  # Python's default, which sitecustomize.py changes


@pytest.fixture
def tiny_model():
    from tiny import randomize, tiny_config

    from modeling_capivara import CapivaraModel

    return randomize(CapivaraModel(tiny_config())).eval()


@pytest.fixture(scope="session")
def tiny_processor():
    from tiny import tiny_tokenizer

    from modeling_capivara import CapivaraImageProcessor, CapivaraProcessor

    image_processor = CapivaraImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CapivaraProcessor(image_processor, tiny_tokenizer())


@pytest.fixture(scope="session")
def xlmr(tmp_path_factory):
    """A processor with the real XLM-R vocabulary, and open_clip's tokenizer with the same vocabulary."""
    from open_clip.tokenizer import HFTokenizer

    from capivara_search.miniature_encoders import load_tokenizer
    from modeling_capivara import CapivaraImageProcessor, CapivaraProcessor

    folder = tmp_path_factory.mktemp("xlmr")
    tokenizer = load_tokenizer()
    tokenizer.save_pretrained(folder)
    return CapivaraProcessor(CapivaraImageProcessor(), tokenizer), HFTokenizer(str(folder))


@pytest.fixture(scope="session")
def saved_tiny_folder(tmp_path_factory, tiny_processor):
    from tiny import save_model

    return save_model(tmp_path_factory.mktemp("tiny") / "model", tiny_processor)


@pytest.fixture(scope="session")
def model(saved_tiny_folder):
    """Path of `saved_tiny_folder` as text, for command lines; tests must not change the folder."""
    return str(saved_tiny_folder)


@pytest.fixture
def tiny_folder(saved_tiny_folder, tmp_path):
    """Folder with a saved tiny model and its processor; the weights equal those of `tiny_model`."""
    return shutil.copytree(saved_tiny_folder, tmp_path / "model")


@pytest.fixture(scope="session")
def tiny_dataset_folder(tmp_path_factory):
    """Saved DatasetDict of colored squares: 12, 6 and 8 images with one or two captions in two languages."""
    import numpy as np
    import PIL.Image
    from datasets import Dataset, DatasetDict, Features, Image, List, Value

    colors = {"azul": (0, 0, 255), "verde": (0, 255, 0), "vermelho": (255, 0, 0), "branco": (255, 255, 255)}
    features = Features({"image": Image(), "captions-pt": List(Value("string")), "captions-en": List(Value("string"))})

    def split(number: int, seed: int) -> Dataset:
        generator = np.random.default_rng(seed)
        names = [list(colors)[i % len(colors)] for i in range(number)]
        pixels = [generator.random((40, 36, 3)) * 60 + 0.7 * np.array(colors[name]) for name in names]
        portuguese = [[f"foto {i} azul {name}", f"{name} {i}"][: 1 + i % 2] for i, name in enumerate(names)]
        english = [[f"the {name} {i}"] for i, name in enumerate(names)]
        images = [PIL.Image.fromarray(array.astype(np.uint8)) for array in pixels]
        rows = {"image": images, "captions-pt": portuguese, "captions-en": english}
        return Dataset.from_dict(rows, features=features)

    folder = tmp_path_factory.mktemp("data") / "squares"
    DatasetDict(train=split(12, 0), validation=split(6, 1), test=split(8, 2)).save_to_disk(folder)
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    from tiny import draw_nothing

    draw_nothing(monkeypatch)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, for tests of full disks."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, timeout=20).returncode:
        pytest.skip("a small file system can't be mounted on this machine")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Keep caches and state of tests apart from those of the user."""
    os.environ["CAPIVARA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Reset Accelerate's global state and the number of threads after each test, so that tests don't affect others."""
    yield
    if state := sys.modules.get("accelerate.state"):
        for state_class in (state.AcceleratorState, state.GradientState, state.PartialState):
            state_class._reset_state()
        sys.modules["torch"].set_num_threads(1)
