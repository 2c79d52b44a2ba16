"""Make export-1.qcow2bm again: `python -m tests.golden.make_export` from the project root (needs qemu-img and qemu-io).

The file must be readable for ever, so it is not made again while version 1 is written: test_export.py knows what is in
it from what is done here, and reads it a second time by hand, with struct and the offsets of docs/export-format.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import qcow2bm
from tests.support.qemu import qemu_img, qemu_io

HERE = Path(__file__).parent
DISK = (1 << 29) + 3 * 512


def main() -> None:
    """An image that QEMU has recorded writes in, with a bitmap that its writer left in use."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "vm.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", image, str(DISK))
        qemu_img("bitmap", "--add", "-g", "512", image, "fine")
        qemu_img("bitmap", "--add", "-g", "1M", image, "Wöchentlich")
        qemu_io(image, "write 1M 300k", f"write {DISK - 512} 512")
        qemu_img("bitmap", "--disable", image, "Wöchentlich")
        qemu_io(image, "write 300M 512")
        with qcow2bm.open(image, writable=True) as opened, opened.edit() as edit:
            edit.add("ones", granularity=512, all_dirty=True)
            edit.add("nothing", granularity=65536, recording=False)
        with qcow2bm.open(image) as opened, (HERE / "export-1.qcow2bm").open("wb") as stream:
            qcow2bm.export_bitmaps(opened, [], stream)


if __name__ == "__main__":
    main()
