"""transformers' common tokenizer tests on `CapivaraTokenizer`."""

import shutil
import tempfile
import unittest

from tiny import tiny_tokenizer
from transformers_tests.test_tokenization_common import TokenizerTesterMixin

from modeling_capivara.tokenization_capivara import CapivaraTokenizer


class CapivaraTokenizationTest(TokenizerTesterMixin, unittest.TestCase):
    """The tokenizer, with a small vocabulary."""

    tokenizer_class = CapivaraTokenizer
    test_tokenizer_from_extractor = False  # the tokenizer is built from a tokenizer.json, not from a vocabulary file

    @classmethod
    def setUpClass(cls):
        folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, folder)
        CapivaraTokenizer.from_tokenizer(tiny_tokenizer()).save_pretrained(folder)
        cls.from_pretrained_id = folder
        super().setUpClass()
