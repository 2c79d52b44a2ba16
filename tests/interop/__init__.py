"""Tests against the real QEMU tools. A missing tool fails them: an interop test that skips has tested nothing."""
