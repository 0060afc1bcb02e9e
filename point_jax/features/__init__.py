"""Features of any cloud: the default transform, bucketed encoding, and maps back to the points."""
