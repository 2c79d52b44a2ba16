"""The repair of `qemu-img check -r` (QEMU 7.2), finding by finding and place by place, and its wanted differences.

TODO
"""
