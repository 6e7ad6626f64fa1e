"""Backends that generate captions of images. Each is a module with a class that implements `base.Captioner`."""

from captions.captioners.base import Captioner
from captions.captioners.blip2 import Blip2Captioner
from captions.captioners.chat import ChatCaptioner

# Value of the flag `--captioner` -> class of the backend. To add a backend, write its module and add a line here.
CAPTIONERS: dict[str, type[Captioner]] = {
    "blip2": Blip2Captioner,
    "chat": ChatCaptioner,
}
