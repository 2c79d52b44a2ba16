"""An open image: the only code that touches a file. It knows the format and clusters, but no bitmaps."""
