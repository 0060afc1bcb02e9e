"""Integer structure of point sets: curves, voxel grids, hierarchies, patches, neighbours, matching."""
