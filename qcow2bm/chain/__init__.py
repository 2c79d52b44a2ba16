"""Backing chains: what a guest finds on a disk, read offline, and where two disks differ."""
