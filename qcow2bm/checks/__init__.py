"""Everything that can be wrong with an image, found without changing a byte of it."""
