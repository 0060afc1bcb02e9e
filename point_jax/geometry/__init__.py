"""Integer structure of point sets: curves, grids, hierarchies, patches, neighbours, matching."""
