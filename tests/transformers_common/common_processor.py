"""transformers' common processor tests on `CapivaraProcessor`."""

import unittest

from tiny import tiny_tokenizer
from transformers_tests.test_processing_common import ProcessorTesterMixin

from modeling_capivara import CapivaraImageProcessor, CapivaraProcessor


class CapivaraProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    """The processor, with a small vocabulary."""

    processor_class = CapivaraProcessor

    @classmethod
    def _setup_image_processor(cls):
        return CapivaraImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()
