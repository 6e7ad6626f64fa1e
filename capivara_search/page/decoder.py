"""Decode uploaded pictures, and pictures of the index, in a separate process that is killed if decoding takes too long.

Example:
    decoder = DecoderProcess()
    image = decoder.decode(data, "praia.cr2")

A separate process is needed because a thread can't be ended from outside. Decoding a malicious JPEG file of 400 kB can
take minutes, and decoding a JPEG 2000 file of 2 kB can stop all threads of the process for ten seconds.
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

# Python code that the child process runs.
DECODER_PROGRAM = (
    "import sys; from capivara_search.page.decoder import main; main(int(sys.argv[1]), float(sys.argv[2]))"
)
CODE_ROOT = Path(__file__).resolve().parents[2]
DECODE_TIMEOUT_S = 10  # a photograph of 50 million pixels takes under 2 s
MAX_VIEW_SIDE = 1600  # longest side of a decoded image, in pixels; the model uses only a few hundred pixels


class DecoderProcess:
    """A child process that decodes pictures, one after another. Several threads can call the methods at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start()

    def decode(self, data: bytes, name: str = "") -> PIL.Image.Image:
        """Decode a picture to an upright RGB image on a white background.

        Args:
            data: Content of the file.
            name: File name of a picture of the index. Its extension decides whether the file is decoded as a RAW photo.
                "" for an uploaded picture, for which the limit of pixels is lower.

        Returns:
            The image, reduced so that its longer side has at most `MAX_VIEW_SIDE` pixels.

        Raises:
            BadImage: If the picture can't be decoded, has too many pixels, or takes longer than `DECODE_TIMEOUT_S`.
        """
        with self._lock:
            try:
                self._connection.send_bytes(name.encode())
                self._connection.send_bytes(data)
                header, pixels = json.loads(self._connection.recv_bytes()), self._connection.recv_bytes()
            except (EOFError, OSError):  # the process has ended
                self.close()
                self._start()
                message = f"it could not be decoded in {DECODE_TIMEOUT_S} s, or the decoder crashed"
                header = {"bad": ["unreadable image", message]}
        if "bad" in header:
            raise BadImage(*header["bad"])
        return PIL.Image.frombytes("RGB", header["size"], pixels)

    def close(self) -> None:
        """Kill the child process."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        self._connection, child_connection = Pipe()
        command = [sys.executable, "-c", DECODER_PROGRAM, str(child_connection.fileno()), str(DECODE_TIMEOUT_S)]
        path = os.pathsep.join([str(CODE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with child_connection:
            # The child gets a new session, because Ctrl-C in the terminal must end the page and not the decoder.
            options = {"env": {**os.environ, "PYTHONPATH": path}, "start_new_session": True}
            self._process = subprocess.Popen(command, pass_fds=[child_connection.fileno()], **options)


def main(descriptor: int, seconds: float) -> None:
    """Decode pictures until the parent process closes the pipe. The child process runs this function.

    Args:
        descriptor: File descriptor of the pipe to the parent process, which serves the page.
        seconds: Time limit for each picture, in seconds. A signal kills this process after this time.
    """
    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # `decode_picture` refuses such pictures
    with Connection(descriptor) as page:
        while True:
            try:
                name, data = page.recv_bytes().decode(), page.recv_bytes()
            except (EOFError, OSError):
                return
            signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM kills the process, even inside a C library
            try:
                limit = MAX_PICTURE_PIXELS if name else MAX_IMAGE_PIXELS
                image = limit_long_side(decode_picture(data, name, limit, MAX_VIEW_SIDE), MAX_VIEW_SIDE)
                header, pixels = {"size": image.size}, image.tobytes()
            except BadImage as bad:
                header, pixels = {"bad": bad.args}, b""
            signal.setitimer(signal.ITIMER_REAL, 0)
            # JSON is used instead of pickle, because a malicious picture may take control of this process. Unpickling
            # data from this process could then run code in the parent process.
            page.send_bytes(json.dumps(header).encode())
            page.send_bytes(pixels)
