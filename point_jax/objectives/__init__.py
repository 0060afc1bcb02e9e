"""Objectives: what a model learns from. Each is a few pure functions; see `interface`."""
