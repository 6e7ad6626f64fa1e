"""Decode pictures for the search page in a separate process that is killed if decoding takes too long.

Example:
    decoder = DecoderProcess()
    image = decoder.decode(data, "praia.cr2")

A malicious picture can take minutes to decode, and a thread can't be ended from outside.
"""

import faulthandler
import json
import os
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from typing import BinaryIO

import PIL.Image

from capivara_common.environment import CODE_ROOT
from capivara_common.image_files import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, BadImage
from capivara_search.picture_reading import MAX_PICTURE_PIXELS, decode_picture, limit_long_side

# Code that the child process runs with `python -c`. Its argument is the time limit for each picture, in seconds.
DECODER_PROGRAM = "import sys; from capivara_search.page.decoder import main; main(float(sys.argv[1]))"
# Seconds per picture. A photograph of 50 million pixels takes under 2 s. A malicious JPEG file of 400 kB can take
# minutes, and a JPEG 2000 file of 2 kB can stop all threads of the process for ten seconds.
DECODE_TIMEOUT_S = 10
LENGTH_BYTES = 8  # number of bytes in which the length of a message is sent
MAX_VIEW_SIDE = 1600  # longest side of a decoded image, in pixels; the model uses only a few hundred pixels


class DecoderProcess:
    """A child process that decodes pictures one after another, and is replaced if it crashes or takes too long.

    Several threads can call the methods at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start()

    def decode(self, data: bytes, name: str = "") -> PIL.Image.Image:
        """Decode a picture to an upright RGB image on a white background.

        Args:
            data: Content of the file.
            name: File name, whose extension tells whether the file is a RAW photo. "" for an uploaded picture, for
                which the maximum number of pixels is lower.

        Returns:
            The image, reduced so that its longer side has at most `MAX_VIEW_SIDE` pixels.

        Raises:
            BadImage: If the picture can't be decoded, has too many pixels, or takes longer than `DECODE_TIMEOUT_S`.
        """
        with self._lock:
            try:
                _send_messages(self._process.stdin, name.encode(), data)
                header = json.loads(_receive_message(self._process.stdout))
                pixels = _receive_message(self._process.stdout)
            except (EOFError, OSError):  # the pipe is closed, because the child has crashed or ended at the time limit
                self.close()
                self._start()
                message = f"it could not be decoded in {DECODE_TIMEOUT_S} s, or the decoder crashed"
                header = {"bad": ["unreadable image", message]}
        if "bad" in header:
            raise BadImage(*header["bad"])
        return PIL.Image.frombytes("RGB", header["size"], pixels)

    def close(self) -> None:
        """Kill the child process that decodes pictures."""
        self._process.kill()
        self._process.stdout.close()
        # Closing the pipe writes what is left in its buffer. This fails, because the process that would read it was
        # killed.
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _start(self) -> None:
        command = [sys.executable, "-c", DECODER_PROGRAM, str(DECODE_TIMEOUT_S)]
        path = os.pathsep.join([str(CODE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # The child gets a new session, because Ctrl-C in the terminal must end the page and not the decoder. Windows
        # ignores `start_new_session` and has a flag instead.
        options = {"start_new_session": True, "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        options |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**os.environ, "PYTHONPATH": path}}
        self._process = subprocess.Popen(command, **options)


def _send_messages(file: BinaryIO, *messages: bytes) -> None:
    """Write messages to a pipe, each after its length."""
    for message in messages:
        file.write(len(message).to_bytes(LENGTH_BYTES))
        file.write(message)
    file.flush()


def _receive_message(file: BinaryIO) -> bytes:
    """Read a message that `_send_messages` has written.

    Raises:
        EOFError: If the other process has closed the pipe, or announces more than `MAX_IMAGE_BYTES` bytes. Without this
            limit, a malicious picture that has taken control of the child process could fill the memory of this
            process.
    """
    prefix = file.read(LENGTH_BYTES)
    length = int.from_bytes(prefix)
    if len(prefix) < LENGTH_BYTES or length > MAX_IMAGE_BYTES or len(message := file.read(length)) < length:
        raise EOFError
    return message


def main(seconds: float) -> None:
    """Run the child process of `DecoderProcess`: decode pictures until the parent process closes the pipe.

    Args:
        seconds: Time limit for each picture, in seconds. The process ends if a picture takes longer.
    """
    # PIL warns about pictures with very many pixels. The warning is not needed, because `decode_picture` refuses such
    # pictures with an error.
    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
    # The standard output is a pipe to the parent process, and only answers may be written to it. But libraries may
    # print to the standard output. So the pipe is moved to another file descriptor, and the output of libraries goes to
    # the standard error.
    page, pixels_out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        while True:
            try:
                name, data = _receive_message(page).decode(), _receive_message(page)
            except (EOFError, OSError):
                return
            # A malicious picture may keep a C library busy forever, and Python threads might then not run any more.
            # `faulthandler` uses a thread of C code, so it can end the process nevertheless.
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            try:
                limit = MAX_PICTURE_PIXELS if name else MAX_IMAGE_PIXELS
                image = limit_long_side(decode_picture(data, name, limit, MAX_VIEW_SIDE), MAX_VIEW_SIDE)
                header, pixels = {"size": image.size}, image.tobytes()
            except BadImage as bad:
                header, pixels = {"bad": bad.args}, b""
            faulthandler.cancel_dump_traceback_later()
            # JSON is used instead of pickle, because a malicious picture may take control of this process. Unpickling
            # data from this process could then run code in the parent process.
            _send_messages(pixels_out, json.dumps(header).encode(), pixels)
