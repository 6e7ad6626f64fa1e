"""Pictures are decoded in a process of its own, which ends where one takes too long.

    decoder = Decoder()
    image = decoder.image(upload)  # PIL
    large = decoder.view(data, "praia.cr2")  # JPEG

A JPEG of 400 kB can take minutes, a JPEG 2000 of 2 kB stops all threads of its process for ten seconds, and no thread
can be ended.
"""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import PIL.Image

from capivara_common.image_files import BadImage, decode_image
from capivara_search.picture_files import FileState, at_most, decode_picture, on_white

PROGRAM = "import sys; from capivara_search.page.decoder import main; main(int(sys.argv[1]), float(sys.argv[2]))"
ROOT = Path(__file__).resolve().parents[2]
PICTURE_S = 10  # a photograph of 50 million pixels takes under 2 s
VIEW_SIDE = 1600  # pixels of the longer side; the model sees a few hundred
VIEW_QUALITY = 88  # of its JPEG


class Decoder:
    """A process that decodes pictures, one after another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start()

    def image(self, upload: bytes) -> PIL.Image.Image:
        """The image of an upload, upright, RGB, transparent parts white, its longer side at most `VIEW_SIDE` pixels.

        Raises BadImage where it can't be read, has too many pixels, or takes longer than `PICTURE_S`.
        """
        about, pixels = self._answer({}, upload)
        return PIL.Image.frombytes("RGB", about["size"], pixels)

    def view(self, data: bytes, name: str) -> bytes:
        """A file of the index, whose name's end says whether it is RAW, as JPEG; size and errors are those of `image`.

        This process has opened it: the other one opens none.
        """
        return self._answer({"name": name}, data)[1]

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _answer(self, question: dict[str, str], upload: bytes) -> tuple[dict[str, Any], bytes]:
        with self._lock:
            try:
                self._connection.send_bytes(json.dumps(question).encode())
                self._connection.send_bytes(upload)
                about, answer = json.loads(self._connection.recv_bytes()), self._connection.recv_bytes()
            except (EOFError, OSError):
                self.close()
                self._start()
                about = {"reason": "unreadable image", "detail": f"not read in {PICTURE_S} s, or it broke its reader"}
        if "reason" in about:
            raise BadImage(about["reason"], about["detail"])
        return about, answer

    def _start(self) -> None:
        self._connection, far = Pipe()
        command = [sys.executable, "-c", PROGRAM, str(far.fileno()), str(PICTURE_S)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with far:  # a session of its own: Ctrl-C is the page's
            self._process = subprocess.Popen(
                command, pass_fds=[far.fileno()], env={**os.environ, "PYTHONPATH": path}, start_new_session=True
            )


def main(descriptor: int, seconds: float) -> None:
    """Decode what comes, until the page has closed its end."""
    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # such pictures are refused next
    with Connection(descriptor) as page:
        while True:
            try:
                question, upload = json.loads(page.recv_bytes()), page.recv_bytes()
            except (EOFError, OSError):
                return
            signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process, whatever that is doing
            try:
                about, answer = _view(upload, question["name"]) if "name" in question else _image(upload)
            except BadImage as bad:
                about, answer = {"reason": bad.reason, "detail": bad.detail}, b""
            signal.setitimer(signal.ITIMER_REAL, 0)
            page.send_bytes(json.dumps(about).encode())  # what was fed strangers' files gets no say in objects
            page.send_bytes(answer)


def _image(upload: bytes) -> tuple[dict[str, Any], bytes]:
    image = at_most(on_white(decode_image({"bytes": upload, "path": None})), VIEW_SIDE)
    return {"size": image.size}, image.tobytes()


def _view(data: bytes, name: str) -> tuple[dict[str, Any], bytes]:
    image = at_most(decode_picture(data, FileState(name, 0, 0), VIEW_SIDE).image, VIEW_SIDE)
    image.save(file := io.BytesIO(), "JPEG", quality=VIEW_QUALITY)
    return {}, file.getvalue()
