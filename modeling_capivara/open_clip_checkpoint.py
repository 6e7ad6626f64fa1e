"""Checkpoint files of open_clip's model, read without executing anything that they hold."""

import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from capivara_common.hub_cache import first_line

OPEN_CLIP_CONFIG = "open_clip_config.json"
# In order of preference: a pickle is opened only where there is nothing safer.
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


class InertObject:
    """Stands in for the classes of a training program's settings: takes any arguments and any state, keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Takes and drops all arguments."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class InertDict:
    """Stands in for kinds of dictionaries. torch fills items into nothing but `dict` and `OrderedDict` themselves."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict:
        """Takes and drops all arguments."""
        return OrderedDict()


# Of Python's own modules, the data types that settings are made of. All else there is refused: it does things.
HARMLESS_STDLIB = {
    "argparse": {"Namespace"},
    "builtins": {"bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "set", "str"}
    | {"tuple", "slice", "range"},
    "collections": {"OrderedDict", "defaultdict"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "typing": {"Any", "Dict", "List", "Optional", "Tuple", "Union"},
    "types": {"SimpleNamespace"},
}
NUMPY_DATA = re.compile(r"numpy\.((_?core\.multiarray\.(scalar|_reconstruct))|dtype|ndarray|[a-z]+\d*_?)")
NUMPY_TYPES = {"dtype", "ndarray", "bool", "bool_", "str_", "bytes_"}
CLASS_NAME = re.compile(r"_?[A-Z]\w*")


def load_checkpoint(path: Path) -> dict:
    """What a checkpoint file holds, with every object that is neither tensor nor plain data replaced by an inert one.

    Nothing of the file is ever executed, and nothing it names is ever imported: torch's restricted unpickler looks
    names up in a table, and the table here has only `InertObject` and `InertDict` in it. Their methods are the whole
    of what a file can call. A name that is not that of a class of settings (`os.system`, `builtins.getattr`,
    `functools.partial`, any function) would be as inert, but a file that asks for it is not a checkpoint to trust, and
    is refused.

    Raises:
        ValueError: the file is damaged, no checkpoint, or refused.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The older format, without a zip file around it, has no list of names: torch's own table has to do.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        if refused := sorted(name for name in names if not is_settings_class(name)):
            raise ValueError(
                f"it asks for {', '.join(refused)}, which is code, not data. If you made the file yourself, save its "
                "state_dict alone: torch.save(checkpoint['state_dict'], ...)"
            )
        stand_ins = [(InertDict if name.lower().endswith("dict") else InertObject, name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile file makes the readers raise anything at all
        raise ValueError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint's dictionary.")
    return checkpoint


def is_settings_class(name: str) -> bool:
    """Whether a full name, as a pickle asks for it, is that of a data type that settings are made of."""
    module, _, last = name.rpartition(".")
    # As pickle reads Python 2's names: `commands.Popen` is `subprocess.Popen`. torch maps some of them alone.
    module, last = NAME_MAPPING.get((module, last), (IMPORT_MAPPING.get(module, module), last))
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names:
        return last in HARMLESS_STDLIB.get(module, ())
    if root == "numpy" and NUMPY_DATA.fullmatch(f"{module}.{last}"):
        return module != "numpy" or last in NUMPY_TYPES or last[-1:].isdigit()  # numpy.int64, not numpy.load
    return CLASS_NAME.fullmatch(last) is not None and not module.startswith("torch.hub")


def check_state(state: Mapping[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    """Raise ValueError, with all names, where tensors are missing, surplus, or of other shapes than `shapes`."""
    problems = []
    if missing := sorted(shapes.keys() - state.keys()):
        problems.append(f"missing: {', '.join(missing)}")
    if surplus := sorted(state.keys() - shapes.keys()):
        problems.append(f"surplus: {', '.join(surplus)}")
    for name in sorted(shapes.keys() & state.keys()):
        if not isinstance(state[name], Tensor):
            problems.append(f"{name} is a {type(state[name]).__name__}, not a tensor")
        elif state[name].shape != shapes[name]:
            problems.append(f"{name} has shape {tuple(state[name].shape)}, not {tuple(shapes[name])}")
    if problems:
        raise ValueError(
            "The checkpoint does not hold the model that its configuration describes (a bare file is taken to have the "
            "published architecture): " + "; ".join(problems)
        )
