"""Pictures: PCA colours of point features, rendered scenes, curves of a run."""
