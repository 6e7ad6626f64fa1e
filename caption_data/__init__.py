"""Rows in: the images and captions of a data set, for building, training, evaluation and search."""
