"""Uploads are decoded in a process of its own, which ends where a picture takes too long.

A JPEG of 400 kB can take minutes, a JPEG 2000 of 2 kB stops all threads of its process for ten seconds, and no thread
can be ended. `python -m hub_upload.space.decoder` is that process; the page starts it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import PIL.Image

from capivara_search.common.image_files import BadImage, decode_image

ROOT = Path(__file__).resolve().parents[2]
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")  # of pixels, and a palette; what others there are becomes RGB
PICTURE_S = 10  # a photograph of 50 million pixels takes under 2 s


class Decoder:
    """Called with the file of an upload, gives its image as `capivara_search.common.image_files.decode_image` does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start()

    def __call__(self, upload: bytes) -> PIL.Image.Image:
        """Raises BadImage where it can't be read, has too many pixels, or takes longer than `PICTURE_S`."""
        with self._lock:
            try:
                self._connection.send_bytes(upload)
                about = json.loads(self._connection.recv_bytes())
                pixels = self._connection.recv_bytes()
            except (EOFError, OSError):
                self.close()
                self._start()
                about = {"reason": "unreadable image", "detail": f"not read in {PICTURE_S} s, or it broke its reader"}
        if "reason" in about:
            raise BadImage(about["reason"], about["detail"])
        image = PIL.Image.frombytes(about["mode"], about["size"], pixels)
        if about["palette"]:
            image.putpalette(about["palette"])
        return image

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        self._connection, far = Pipe()
        command = [sys.executable, "-m", "hub_upload.space.decoder", str(far.fileno()), str(PICTURE_S)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with far:  # a session of its own: Ctrl-C is the page's
            self._process = subprocess.Popen(
                command, pass_fds=[far.fileno()], env={**os.environ, "PYTHONPATH": path}, start_new_session=True
            )


def main(descriptor: int, seconds: float) -> None:
    """Decode what comes, until the page has closed its end."""
    # A picture of 16 bits needs it, and it takes seconds to import, which are none of the picture's.
    import modeling_capivara.image_processing_capivara  # noqa: F401

    with Connection(descriptor) as page:
        while True:
            try:
                upload = page.recv_bytes()
            except (EOFError, OSError):
                return
            signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process, whatever that is doing
            try:
                image = decode_image({"bytes": upload, "path": None})
                image = image if image.mode in MODES else image.convert("RGB")
                about = {"mode": image.mode, "size": image.size, "palette": image.getpalette()}
                pixels = image.tobytes()
            except BadImage as bad:
                about, pixels = {"reason": bad.reason, "detail": bad.detail}, b""
            signal.setitimer(signal.ITIMER_REAL, 0)
            page.send_bytes(json.dumps(about).encode())  # what was fed strangers' files gets no say in objects
            page.send_bytes(pixels)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
