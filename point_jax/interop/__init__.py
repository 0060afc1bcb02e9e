"""Weights of the PyTorch releases, in and out."""
