"""The embedded default: an OpenMoji data set and two pretrained encoders, all from PyPI packages."""
