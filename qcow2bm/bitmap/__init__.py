"""Persistent dirty bitmaps: the bit vectors, how they are stored in an image, and what can be done with them."""
