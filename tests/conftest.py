"""Fixtures shared by many tests. Heavy packages are imported inside the fixtures, so that collection is fast."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # without a network, a request to the Hub would wait for a time-out
HERE = Path(__file__).resolve().parent
# Processes that tests start can import this project from these folders, and run tests/sitecustomize.py first.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")]))

gc.disable()  # it would take a fifth of the import time, although imported objects stay in memory anyway


LONGEST = (
    "test_executors.py",
    "test_kinds.py",
    "test_static_page.py",
    "test_watch.py",
)  # each takes minutes, so they start first


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    gc.freeze()  # garbage collections during the tests skip the imported objects; a process ends a second earlier
    gc.enable()
    gc.set_threshold(700)  # Python's default threshold, which tests/sitecustomize.py has changed


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
    """Tuple of a CAPIVARA processor with the real XLM-R vocabulary and open_clip's tokenizer for this vocabulary."""
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
    """Path of `saved_tiny_folder` as a string, for command lines. All tests share the folder: none may change it."""
    return str(saved_tiny_folder)


@pytest.fixture
def tiny_folder(saved_tiny_folder, tmp_path):
    """Folder with a tiny model and its processor, a copy that the test may change. The weights equal `tiny_model`'s."""
    return shutil.copytree(saved_tiny_folder, tmp_path / "model")


@pytest.fixture(scope="session")
def tiny_dataset_folder(tmp_path_factory):
    """Folder with a saved DatasetDict: 12 train, 6 validation and 8 test images, all colored squares.

    Each image has one or two Portuguese captions and one English caption.
    """
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
    """Folder with a mounted file system of 1 MB, for tests of full disks. The test is skipped if mounting fails."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, timeout=20).returncode:
        pytest.skip("a small file system can't be mounted on this machine")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Use temporary folders for caches and state, so that tests do not touch the user's."""
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
