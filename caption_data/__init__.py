"""Read images and captions from datasets, for caption builds, training, evaluation and search."""
