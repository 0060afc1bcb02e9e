"""Scenes: folders on disk, procedural rooms, and the batches that the host ships."""
