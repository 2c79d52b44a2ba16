"""Real block devices for tests: loop devices over sparse files.

They need root, or a sudo that asks nothing (as on the machines of GitHub Actions), and a kernel with the loop driver:
any Debian, also in a container that is started with --privileged. Where there is none, the tests fail and say so: a
device is a promise of qcow2bm, and a skipped test would look like a kept one.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.tools import QemuError, run

WHY = (
    "no loop device to test block devices on: run the tests as root or with a sudo that needs no password, on a kernel "
    "with the loop driver, in a container with --privileged (or leave these tests out: pytest --ignore {file})"
)


class NoDeviceError(RuntimeError):
    """This machine gives us no block device."""


@contextmanager
def loop_device(backing: Path, *, read_only: bool = False) -> Iterator[Path]:
    """A block device with the content and the size of a file, which must be a multiple of 512 bytes."""
    assert backing.stat().st_size % 512 == 0, "the kernel would cut the rest off"
    options = ["--read-only"] if read_only else []
    try:
        device = _attach(options, backing)
    except (QemuError, OSError):
        _load_driver()
        try:
            device = _attach(options, backing)
        except (QemuError, OSError) as error:
            file = "tests/interop/test_devices.py"
            raise NoDeviceError(f"{WHY.format(file=file)}\n{error}") from error
    try:
        if os.geteuid() != 0:
            as_root("chown", str(os.getuid()), str(device))
        yield device
    finally:
        as_root("losetup", "--detach", str(device))


def _attach(options: list[str], backing: Path) -> Path:
    return Path(as_root("losetup", "--find", "--show", *options, str(backing)).strip())


def _load_driver() -> None:
    """What a plain machine may not have done yet: load the driver, make its control node. Failing shows afterwards."""
    for command in (("modprobe", "loop"), ("mknod", "/dev/loop-control", "c", "10", "237")):
        with suppress(QemuError, OSError):
            as_root(*command)


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where a user's PATH does not lead


def _sudo() -> list[str]:
    return [] if os.geteuid() == 0 else ["sudo", "-n"]


def as_root(*argv: str) -> str:
    program = shutil.which(argv[0], path=_PATH)
    if program is None:
        raise FileNotFoundError(f"{argv[0]} is not installed")
    return run(*_sudo(), program, *argv[1:]).stdout
