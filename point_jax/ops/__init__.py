"""Differentiable primitives over a row's integer structure; gradients are gathers, not scatters."""
