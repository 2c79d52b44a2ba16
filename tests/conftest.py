"""What holds for every test run: Hypothesis profiles, and real QEMU programs or no run at all."""

from __future__ import annotations

import os
import shutil

import pytest
from hypothesis import HealthCheck, settings

QEMU_TOOLS = ("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", "nbdinfo")
QEMU_PACKAGES = "qemu-utils qemu-system-common libnbd-bin"

# No deadline and no complaint about slow data: on a shared machine both measure the neighbours.
_SHARED_MACHINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
# The ordinary run: the same commit tries the same examples everywhere, so a failure is the change's own.
settings.register_profile("ci", derandomize=True, max_examples=100, **_SHARED_MACHINE)
# `make fuzz`: other examples on each run, and many; prints how to repeat what it finds.
settings.register_profile("deep", derandomize=False, max_examples=5_000, print_blob=True, **_SHARED_MACHINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to start without QEMU: a comparison that is skipped looks like one that passed."""
    if hasattr(config, "workerinput"):
        return
    missing = [tool for tool in QEMU_TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.exit(
            f"The tests compare with the real QEMU, and these programs are missing: {', '.join(missing)}\n"
            f"On Debian and Ubuntu: sudo apt-get install -y --no-install-recommends {QEMU_PACKAGES}",
            returncode=1,
        )
