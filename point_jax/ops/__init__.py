"""Differentiable primitives over the integer structure of a row; gradients are gathers, not scatters."""
