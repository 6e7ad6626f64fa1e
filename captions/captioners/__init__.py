"""Backends (models and services) that generate captions of images. Each is a module with a subclass of `Captioner`."""

from captions.captioners.base import Captioner
from captions.captioners.blip2 import Blip2Captioner
from captions.captioners.chat import ChatCaptioner

# Maps each value of the flag `--captioner` to the class of its backend. To add a backend, write its module and add a
# line here.
CAPTIONERS: dict[str, type[Captioner]] = {
    "blip2": Blip2Captioner,
    "chat": ChatCaptioner,
}
