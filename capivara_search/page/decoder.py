"""Pictures are decoded in a process of its own, which ends where one takes too long.

    decoder = Decoder()
    image = decoder.image(upload)  # PIL
    large = decoder.view("/home/ana/Fotos/praia.jpg")  # JPEG

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
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import PIL.Image

from capivara_search.common.image_files import BadImage, decode_image
from capivara_search.picture_files import FileState, read_picture

PROGRAM = "import sys; from capivara_search.page.decoder import main; main(int(sys.argv[1]), float(sys.argv[2]), {})"
ROOT = Path(__file__).resolve().parents[2]
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")  # of pixels, and a palette; what others there are becomes RGB
PICTURE_S = 10  # a photograph of 50 million pixels takes under 2 s
VIEW_SIDE = 1600  # pixels of the longer side, of a picture that is shown large
VIEW_QUALITY = 88  # of its JPEG


class Decoder:
    """A process that decodes pictures, one after another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start()

    def image(self, upload: bytes) -> PIL.Image.Image:
        """The image of an upload, as `capivara_search.common.image_files.decode_image` gives it.

        Raises:
            BadImage: it can't be read, has too many pixels, or takes longer than `PICTURE_S`.
        """
        about, pixels = self._answer({}, upload)
        image = PIL.Image.frombytes(about["mode"], about["size"], pixels)
        if about["palette"]:
            image.putpalette(about["palette"])
        return image

    def view(self, path: str) -> bytes:
        """A file of the index as JPEG, upright, its longer side at most `VIEW_SIDE`. Raises BadImage as `image`."""
        return self._answer({"path": path}, b"")[1]

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
                self._start(prepared=True)
                about = {"reason": "unreadable image", "detail": f"not read in {PICTURE_S} s, or it broke its reader"}
        if "reason" in about:
            raise BadImage(about["reason"], about["detail"])
        return about, answer

    def _start(self, prepared: bool = False) -> None:
        self._connection, far = Pipe()
        command = [sys.executable, "-c", PROGRAM.format(prepared), str(far.fileno()), str(PICTURE_S)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with far:  # a session of its own: Ctrl-C is the page's
            self._process = subprocess.Popen(
                command, pass_fds=[far.fileno()], env={**os.environ, "PYTHONPATH": path}, start_new_session=True
            )


def main(descriptor: int, seconds: float, prepared: bool) -> None:
    """Decode what comes, until the page has closed its end."""
    if prepared:
        # A picture of 16 bits needs it, and it takes seconds to import: perhaps those that the last one did not have.
        import modeling_capivara.image_processing_capivara  # noqa: F401

    with Connection(descriptor) as page:
        while True:
            try:
                question, upload = json.loads(page.recv_bytes()), page.recv_bytes()
            except (EOFError, OSError):
                return
            signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process, whatever that is doing
            try:
                about, answer = _view(question["path"]) if "path" in question else _image(upload)
            except BadImage as bad:
                about, answer = {"reason": bad.reason, "detail": bad.detail}, b""
            except OSError as error:  # of a file that is gone
                about, answer = {"reason": "unreadable image", "detail": str(error)}, b""
            signal.setitimer(signal.ITIMER_REAL, 0)
            page.send_bytes(json.dumps(about).encode())  # what was fed strangers' files gets no say in objects
            page.send_bytes(answer)


def _image(upload: bytes) -> tuple[dict[str, Any], bytes]:
    image = decode_image({"bytes": upload, "path": None})
    image = image if image.mode in MODES else image.convert("RGB")
    return {"mode": image.mode, "size": image.size, "palette": image.getpalette()}, image.tobytes()


def _view(path: str) -> tuple[dict[str, Any], bytes]:
    image = read_picture(FileState(path, 0, 0), VIEW_SIDE).image
    image.thumbnail((VIEW_SIDE, VIEW_SIDE))
    image.save(file := io.BytesIO(), "JPEG", quality=VIEW_QUALITY)
    return {}, file.getvalue()
