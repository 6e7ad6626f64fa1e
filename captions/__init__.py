"""Builds the caption data set: which captions of an image are used, and which pairs."""
