"""Pictures are decoded in a process of its own, which ends where one takes too long.

    decoder = Decoder()
    image = decoder.image(data, "praia.cr2")  # PIL

A JPEG of 400 kB can take minutes, a JPEG 2000 of 2 kB stops all threads of its process for ten seconds, and no thread
can be ended.
"""

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

import PIL.Image

from capivara_common.image_files import MAX_IMAGE_PIXELS, BadImage
from capivara_search.picture_reading import MAX_PICTURE_PIXELS, decode_picture, limit_long_side

DECODER_PROGRAM = (
    "import sys; from capivara_search.page.decoder import main; main(int(sys.argv[1]), float(sys.argv[2]))"
)
ROOT = Path(__file__).resolve().parents[2]
DECODE_TIMEOUT_S = 10  # a photograph of 50 million pixels takes under 2 s
MAX_VIEW_SIDE = 1600  # pixels of the longer side; the model sees a few hundred


class DecoderProcess:
    """A process that decodes pictures, one after another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start()

    def decode(self, data: bytes, name: str = "") -> PIL.Image.Image:
        """The image of a file, upright, RGB, transparent parts white, its longer side at most `VIEW_SIDE` pixels.

        `name`: of a picture of the index, whose end says whether it is RAW; "" of an upload, which may have fewer
        pixels. Raises BadImage where it can't be read, has too many pixels, or takes longer than `PICTURE_S`.
        """
        with self._lock:
            try:
                self._connection.send_bytes(name.encode())
                self._connection.send_bytes(data)
                about, pixels = json.loads(self._connection.recv_bytes()), self._connection.recv_bytes()
            except (EOFError, OSError):
                self.close()
                self._start()
                about = {"bad": ["unreadable image", f"not read in {DECODE_TIMEOUT_S} s, or it broke its reader"]}
        if "bad" in about:
            raise BadImage(*about["bad"])
        return PIL.Image.frombytes("RGB", about["size"], pixels)

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        self._connection, far = Pipe()
        command = [sys.executable, "-c", DECODER_PROGRAM, str(far.fileno()), str(DECODE_TIMEOUT_S)]
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
                name, data = page.recv_bytes().decode(), page.recv_bytes()
            except (EOFError, OSError):
                return
            signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process, whatever that is doing
            try:
                limit = MAX_PICTURE_PIXELS if name else MAX_IMAGE_PIXELS
                image = limit_long_side(decode_picture(data, name, limit, MAX_VIEW_SIDE), MAX_VIEW_SIDE)
                about, pixels = {"size": image.size}, image.tobytes()
            except BadImage as bad:
                about, pixels = {"bad": bad.args}, b""
            signal.setitimer(signal.ITIMER_REAL, 0)
            page.send_bytes(json.dumps(about).encode())  # what was fed strangers' files gets no say in objects
            page.send_bytes(pixels)
