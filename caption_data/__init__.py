"""Read images and captions from datasets, for the caption pipeline `captions`, training, evaluation and search."""
