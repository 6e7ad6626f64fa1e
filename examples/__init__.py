"""Runnable examples: real data and real encoders small enough for a laptop."""
