"""What replaces a dropped layer, and how the remaining weights are refitted."""
