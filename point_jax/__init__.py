"""Point Transformer V3 pretraining on 3D scenes in JAX."""
