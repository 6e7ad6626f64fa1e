"""Backends (models, services, tables) that translate captions. Each is a module with a subclass of `Translator`."""

from captions.translators.base import Translator
from captions.translators.chat import ChatTranslator
from captions.translators.file import FileTranslator
from captions.translators.google import GoogleTranslator
from captions.translators.seq2seq import Seq2SeqTranslator

# Maps each value of the flag `--backend` to the class of its backend. To add a backend, write its module and add a line
# here.
TRANSLATORS: dict[str, type[Translator]] = {
    "transformers": Seq2SeqTranslator,
    "google": GoogleTranslator,
    "file": FileTranslator,
    "chat": ChatTranslator,
}
