"""Run the project without what only POSIX systems have. Run by tests/test_platforms.py.

    python tests/windows_like_process.py imports
    python tests/windows_like_process.py search MODEL FOLDER

Modules, and attributes of `os` and `signal`, that Windows lacks are hidden from this project only. Libraries such as
psutil decide by `sys.platform`, which stays, whether they need them.
"""

import builtins
import importlib
import json
import os
import pkgutil
import signal
import sys
from pathlib import Path
from types import ModuleType

HIDDEN_MODULES = {
    *("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog", "curses", "posix")
}
HIDDEN_NAMES = {
    "os": {
        *("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_PATH", "fchmod", "fchown", "fork", "nice"),
        *("geteuid", "getuid", "getgid", "getpgid", "setsid", "killpg", "uname", "pread", "pwrite", "openpty"),
        *("sched_getaffinity", "statvfs", "major", "minor", "mkfifo", "sysconf", "getloadavg", "register_at_fork"),
        *("WNOHANG", "WIFSTOPPED", "posix_spawn"),
    },
    "signal": {
        *("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGCHLD", "SIGPIPE", "setitimer", "ITIMER_REAL", "alarm"),
        *("pthread_kill", "pthread_sigmask", "sigwait", "siginterrupt"),
    },
}
PACKAGES = (
    *("modeling_capivara", "capivara_common", "capivara_search"),
    *("caption_data", "captions", "eval", "hub_upload", "training", "train_accelerate"),
)


def hide() -> None:
    """Replace the function behind `import` by one that treats this project's modules as on Windows."""
    like_windows, import_module = {}, builtins.__import__
    for module in (os, signal):
        hidden = HIDDEN_NAMES[module.__name__]
        like_windows[module.__name__] = ModuleType(module.__name__)
        vars(like_windows[module.__name__]).update({n: value for n, value in vars(module).items() if n not in hidden})
    like_windows["os"].supports_dir_fd = set()

    def import_like_windows(name, globals=None, *args, **options):
        if (globals or {}).get("__name__", "").partition(".")[0] in PACKAGES:
            if name in HIDDEN_MODULES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in like_windows:
                return like_windows[name]
        return import_module(name, globals, *args, **options)

    builtins.__import__ = import_like_windows


def import_all() -> list[str]:
    names = []
    for package in map(importlib.import_module, PACKAGES):
        names.append(package.__name__)
        for module in pkgutil.walk_packages(getattr(package, "__path__", ()), f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
                names.append(module.name)
    return names


def index_and_search(model: str, folder: Path) -> dict:
    """Index pictures, search them, decode one in the page's process, and replace a folder and a file."""
    import io

    import PIL.Image

    from capivara_common.files import atomic_folder, read_json, write_json
    from capivara_search.index import PictureIndex
    from capivara_search.page import guard
    from capivara_search.page.decoder import DecoderProcess

    pictures = folder / "fotos"
    pictures.mkdir()
    for color in ("red", "blue"):
        PIL.Image.new("RGB", (40, 40), color).save(pictures / f"{color}.png")
    index = PictureIndex.open(folder / "i.lance", model=model)
    report = index.add(pictures)
    hits = index.search("um gato", k=2)
    os.remove(pictures / "red.png")
    index.add()
    PIL.Image.new("RGB", (8, 9)).save(data := io.BytesIO(), "PNG")
    process = DecoderProcess()
    size = process.decode(data.getvalue()).size
    process.close()
    for value in (1, 2):
        with atomic_folder(folder / "out", overwrite=True) as new:
            write_json(new / "value.json", value)
    return {
        "new": report.embedded,
        "hits": sorted(Path(hit.path).name for hit in hits),
        "left": len(index),
        "size": size,
        "folder": read_json(folder / "out" / "value.json"),
        "connections": guard.compute_connection_limit(),
        "progress": index.progress(),
    }


if __name__ == "__main__":
    hide()
    print(json.dumps(import_all() if sys.argv[1] == "imports" else index_and_search(sys.argv[2], Path(sys.argv[3]))))
