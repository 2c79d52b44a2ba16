"""A qcow2 image opened by a real qemu-storage-daemon: the "virtual machine" of the tests.

It opens and closes images with the same code as a VM, so its clean exit stores the persistent bitmaps and its SIGKILL
leaves them in use. The guest is whoever writes to its NBD export; qemu-io does. Nothing is formatted by hand: options
go over as JSON, so any file name and any bitmap name will do.
"""

import json
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from qemu.qmp import QMPError

from tests.support.monitor import POLL, START_DEADLINE, Monitor, failure, listen
from tests.support.tools import DEADLINE, QemuError, Ranges, qemu_io, run

_PIECE = 1 << 30


class StorageDaemon:
    """Context manager. A block that ends well closes the image cleanly; one that raises kills the daemon.

    The kernel kills the daemon when the thread that started it is gone (setpriv --pdeathsig), so even a test run that
    is itself killed leaves no process behind. Use a daemon in the thread that started it.
    """

    def __init__(
        self,
        image: Path,
        *,
        writable: bool = True,
        secret: str | None = None,
        data_file: Path | None = None,
        force_share: bool = False,
    ) -> None:
        self.image = image.absolute()
        self.writable = writable
        self.secret = secret
        self.data_file = data_file
        self.force_share = force_share
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: Monitor | None = None
        self._exports = 0

    # ---- life ----

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        if kind is None:
            self.quit()
        else:
            self.kill()

    def start(self) -> None:
        """Start the daemon and wait until it answers on its monitor. By then image, NBD server and export are up."""
        # A socket's path has room for 107 bytes, and pytest's tmp_path often takes more.
        self._folder = Path(tempfile.mkdtemp(prefix="q-", dir="/tmp"))
        try:
            log = self._folder / "log"
            with listen(self._folder / "m") as listener:
                self._process = spawn(["qemu-storage-daemon", *self._arguments()], cwd=self.image.parent, log=log)
                self._monitor = Monitor.accept(listener, self._process, log)
        except BaseException:
            self.kill()
            raise

    def quit(self) -> None:
        """Close the image cleanly, which stores the bitmaps, and wait for the end of the process."""
        process = self._running()
        log = ""
        try:
            with suppress(QMPError, EOFError, OSError):  # it may be gone before it answers; its exit status tells
                self.qmp("quit")
            process.wait(DEADLINE)
            log = self.log()
        finally:
            self._dispose()
        # A daemon that could not store its bitmaps says so on stderr and still exits with 0.
        if process.returncode != 0 or "Lost persistent bitmaps" in log:
            raise QemuError(["qemu-storage-daemon", str(self.image)], process.returncode, log)

    def kill(self) -> None:
        """SIGKILL, as a power cut would: persistent bitmaps stay in use, what was not flushed may be missing."""
        self._dispose()

    def fill_disk(self) -> None:
        """From here on no file of the daemon can grow: writes past the image's end fail, as on a full disk."""
        size = self.image.stat().st_size
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, size))

    def log(self) -> str:
        """What the daemon printed so far."""
        return (self._folder / "log").read_text(errors="replace") if self._folder else ""

    @property
    def pid(self) -> int:
        """The process id: setpriv replaces itself by the daemon, so it is the daemon's own."""
        return self._running().pid

    # ---- monitor ----

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Execute a QMP command. Underscores in argument names become dashes; QMP's error is raised as QMPError."""
        if self._monitor is None:
            raise QemuError(["qemu-storage-daemon", str(self.image)], None, "not running")
        return self._monitor.execute(command, {key.replace("_", "-"): value for key, value in arguments.items()})

    def bitmaps(self) -> dict[str, dict[str, Any]]:
        """QMP's BlockDirtyInfo (granularity, count, recording, busy, persistent, inconsistent) by bitmap name."""
        for node in self.qmp("query-named-block-nodes", flat=True):
            if node["node-name"] == "q":
                return {entry["name"]: entry for entry in node.get("dirty-bitmaps", []) if "name" in entry}
        raise AssertionError("qemu-storage-daemon lost its node q")

    def add_bitmap(self, name: str, granularity: int | None = None, recording: bool = True) -> None:
        """A new persistent bitmap. It reaches the file at the clean close, not before."""
        size = {} if granularity is None else {"granularity": granularity}
        self.qmp("block-dirty-bitmap-add", node="q", name=name, persistent=True, disabled=not recording, **size)

    def remove_bitmap(self, name: str) -> None:
        """Remove a bitmap."""
        self.qmp("block-dirty-bitmap-remove", node="q", name=name)

    def enable_bitmap(self, name: str) -> None:
        """Let a bitmap record from here on."""
        self.qmp("block-dirty-bitmap-enable", node="q", name=name)

    def disable_bitmap(self, name: str) -> None:
        """Stop a bitmap's recording; its bits stay."""
        self.qmp("block-dirty-bitmap-disable", node="q", name=name)

    def clear_bitmap(self, name: str) -> None:
        """Unset every bit."""
        self.qmp("block-dirty-bitmap-clear", node="q", name=name)

    def merge_bitmaps(self, target: str, sources: Iterable[str]) -> None:
        """OR the sources into an existing bitmap."""
        self.qmp("block-dirty-bitmap-merge", node="q", target=target, bitmaps=list(sources))

    def dirty(self, names: Iterable[str] | None = None) -> dict[str, Ranges]:
        """The dirty ranges of bitmaps as they are at this moment, by default of every persistent, consistent one.

        They are read over an export of their own. QEMU lets a recording bitmap onto an export only if the bitmap can't
        change under it in a way it forbids: the node is read-only, or the export itself is writable. So the export is
        exactly as writable as the node.
        """
        known = self.bitmaps()
        wanted = [n for n, b in known.items() if b["persistent"] and not b.get("inconsistent")]
        wanted = wanted if names is None else list(names)
        if not wanted:
            return {}
        self._exports += 1
        name = f"b{self._exports}"
        self.qmp(
            "block-export-add", type="nbd", id=name, node_name="q", name=name, writable=self.writable, bitmaps=wanted
        )
        try:
            return {bitmap: read_map(self.uri(name), bitmap) for bitmap in wanted}
        finally:
            self._remove_export(name)

    # ---- guest ----

    def uri(self, export: str = "q") -> str:
        """The NBD URI of an export of the daemon."""
        return f"nbd+unix:///{quote(export, safe='')}?socket={self._folder}/n"

    def io(self, *commands: str) -> str:
        """Guest requests as qemu-io commands over NBD, all in one connection, which ends with a flush."""
        return qemu_io(self.uri(), *commands, fmt="raw", options=("-d", "unmap")).stdout

    def write(self, offset: int, length: int, pattern: int = 0xA5) -> None:
        """A guest write of one repeated byte."""
        self._request(f"write -P {pattern}", offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool = False) -> None:
        """A guest WRITE ZEROES; with `unmap` the guest allows the clusters to be freed."""
        self._request("write -z -u" if unmap else "write -z", offset, length)

    def discard(self, offset: int, length: int) -> None:
        """A guest TRIM. The node is opened with discard=unmap; without that QEMU ignores it and no bitmap sees it."""
        self._request("discard", offset, length)

    def flush(self) -> None:
        """A guest FLUSH."""
        self.io("flush")

    def expect(self, offset: int, length: int, pattern: int) -> None:
        """A guest read that must find one repeated byte. qemu-io raises otherwise."""
        self._request(f"read -P {pattern}", offset, length)

    # ---- inside ----

    def _arguments(self) -> list[str]:
        sharing = {"force-share": True} if self.force_share else {}
        access = {"read-only": not self.writable, "discard": "unmap"}
        file = {"driver": "file", "node-name": "f", "filename": str(self.image)}
        qcow2: dict[str, Any] = {"driver": "qcow2", "node-name": "q", "file": "f", **access, **sharing}
        argv: list[str] = []
        if self.secret is not None:
            secret = {"qom-type": "secret", "id": "key", "data": self.secret}
            argv += ["--object", json.dumps(secret)]
            qcow2["encrypt"] = {"format": "luks", "key-secret": "key"}
        argv += ["--blockdev", json.dumps({**file, **access, **sharing})]
        if self.data_file is not None:
            data = {"driver": "file", "node-name": "d", "filename": str(self.data_file.absolute())}
            argv += ["--blockdev", json.dumps({**data, **access, **sharing})]
            qcow2["data-file"] = "d"
        argv += ["--blockdev", json.dumps(qcow2)]
        argv += ["--nbd-server", f"addr.type=unix,addr.path={self._folder}/n"]
        export = {"type": "nbd", "id": "e", "node-name": "q", "name": "q", "writable": self.writable}
        argv += ["--export", json.dumps(export)]
        # The monitor comes last: once it answers, everything before it is up. Why server=off: monitor.py.
        argv += ["--chardev", f"socket,path={self._folder}/m,server=off,id=c", "--monitor", "chardev=c"]
        return argv

    def _request(self, verb: str, offset: int, length: int) -> None:
        """One guest request, in pieces, since qemu-io takes less than 2 GiB at a time."""
        pieces = range(offset, offset + length, _PIECE)
        self.io(*(f"{verb} {start} {min(_PIECE, offset + length - start)}" for start in pieces))

    def _remove_export(self, name: str) -> None:
        """Remove an export and wait until it is gone: its bitmaps are busy, and can't be changed, until then."""
        self.qmp("block-export-del", id=name, mode="hard")
        end = time.monotonic() + START_DEADLINE
        while any(export["id"] == name for export in self.qmp("query-block-exports")):
            if time.monotonic() > end:
                raise QemuError(["block-export-del", name], None, "the export does not go away")
            time.sleep(0.002)

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise QemuError(["qemu-storage-daemon", str(self.image)], None, "not running")
        return self._process

    def _dispose(self) -> None:
        """Let go of everything, from any state: monitor, process, folder."""
        process, monitor, folder = self._process, self._monitor, self._folder
        self._process = self._monitor = self._folder = None
        try:
            if process is not None:
                process.kill()  # nothing, if it has exited
                process.wait(DEADLINE)
        finally:
            if monitor is not None:
                monitor.close()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def spawn(argv: list[str], *, cwd: Path, log: Path) -> "subprocess.Popen[bytes]":
    """Start a server that can't outlive us, with its output in a file, where it blocks nobody.

    `cwd` is the image's folder, because that is where QEMU looks for a relative external data file. Signals are as
    Python has them: SIGXFSZ stays ignored, so a file that may not grow is a write error (fill_disk) and not the end.
    """
    with log.open("wb") as out:
        guarded = ["setpriv", "--pdeathsig", "KILL", *argv]
        return subprocess.Popen(
            guarded, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd, restore_signals=False
        )


def connect(path: Path, process: "subprocess.Popen[bytes]", log: Path) -> socket.socket:
    """Connect to a server's socket as soon as it listens. If it ends or hangs instead, its own words are raised."""
    end = time.monotonic() + START_DEADLINE
    while True:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(str(path))
        except OSError:
            link.close()
            if process.poll() is not None or time.monotonic() > end:
                raise failure(process, log) from None
            time.sleep(POLL)
        else:
            return link


def read_map(uri: str, bitmap: str) -> Ranges:
    """The dirty ranges of a bitmap on an NBD export, by nbdinfo.

    NBD answers in pieces of at most 4 GiB, so neighbours are joined.
    """
    ranges: Ranges = []
    for extent in json.loads(run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}", uri).stdout):
        if extent["type"] & 1 == 0:
            continue
        offset, length = extent["offset"], extent["length"]
        if ranges and sum(ranges[-1]) == offset:
            offset, length = ranges[-1][0], ranges.pop()[1] + length
        ranges.append((offset, length))
    return ranges
