"""Measures qcow2bm beside qemu-img: `python -m benchmarks`, or `make bench`."""
