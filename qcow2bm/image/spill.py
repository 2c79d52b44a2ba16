"""Bytes that memory should not hold, in a temporary file."""

from __future__ import annotations

from typing import IO

from .file import read_fd, write_fd


class Spill:
    """Written behind what is there, and never changed: who has a place may rely on it. There is no file until then.

    Nothing is buffered: what cannot be written fails at once, and not when the file is closed.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._end = 0

    def put(self, data: bytes) -> int:
        """Write; the place of the data. Raises OSError."""
        if self._file is None:
            from tempfile import TemporaryFile  # rarely needed, and slow to load

            self._file = TemporaryFile(buffering=0)  # noqa: SIM115 - `close` ends it
        place = self._end
        write_fd(self._file.fileno(), data, place)
        self._end += len(data)
        return place

    def get(self, place: int, length: int) -> bytes:
        """Read what is at a place. Raises OSError."""
        assert self._file is not None, "nothing has a place yet"
        return read_fd(self._file.fileno(), length, place)

    def close(self) -> None:
        """Forget everything."""
        if self._file is not None:
            self._file.close()
