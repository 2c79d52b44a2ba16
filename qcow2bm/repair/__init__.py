"""Repairs: worked out on an overlay, judged there, and written as one plan."""
