"""transformers' common image processor tests on `CapivaraImageProcessor`."""

import unittest

from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

from modeling_capivara import CapivaraImageProcessor


class CapivaraImageProcessingTester(ImageProcessingTester):
    """Settings and images. The crop is smaller than the short side, so that cropping has an effect."""

    def __init__(self, parent, **kwargs):
        kwargs = {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}} | kwargs
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": CapivaraImageProcessor}


class CapivaraImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    """The image processor."""

    image_processor_tester_class = CapivaraImageProcessingTester
