"""Scratch space: bytes by place, in memory while they are few, else in a file without a name, so that nothing stays behind however
the process ends. It must never know what the bytes are.
"""

import io
import os
import tempfile
from pathlib import Path
from typing import IO

from fedmpi.errors import CheckpointError

IN_MEMORY_BYTES = 8 << 20  # what a round of small updates takes before it goes to disk
_idle: dict[Path | None, list[IO[bytes]]] = {}  # by folder; to write in pages that are new to the system costs three times as much


class Scratch:
    """One such space. Its file, where it came to have one, is used again by the next in the same folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._memory = folder, io.BytesIO()
        self._file: IO[bytes] | None = None

    def claim(self, end: int) -> None:
        """Make sure of room for so many bytes: who writes while others wait for him must not find the disk full."""
        if end > IN_MEMORY_BYTES:
            try:
                if self._file is None:
                    self._to_file()
                assert self._file is not None
                os.posix_fallocate(self._file.fileno(), 0, end)
            except OSError as error:
                raise self._full(error) from None

    def write(self, place: int, data: memoryview, end: int = 0) -> None:
        """Put bytes at a place. What will reach to such an `end` never begins in memory: malloc would keep what it had grown to."""
        try:
            self._write(place, data, max(end, place + len(data)))
        except OSError as error:
            raise self._full(error) from None

    def _full(self, error: OSError) -> CheckpointError:
        where = f"{self._folder}" if self._folder is not None else f"{tempfile.gettempdir()} (TMPDIR sets where that is)"
        return CheckpointError(f"scratch space in {where} takes no more: {error.strerror}; free some, and start again")

    def _write(self, place: int, data: memoryview, end: int) -> None:
        if self._file is None and end > IN_MEMORY_BYTES:
            self._to_file()
        if self._file is None:
            self._memory.seek(place)
            self._memory.write(data)
            return
        while data:
            num = os.pwrite(self._file.fileno(), data, place)
            data, place = data[num:], place + num

    def read(self, place: int, into: memoryview) -> None:
        """Bytes that were written."""
        while into:
            got = self._some(place, into)
            if not got:
                raise EOFError(f"{len(into)} bytes at {place} were never written")
            into, place = into[got:], place + got

    def _some(self, place: int, into: memoryview) -> int:
        if self._file is not None:
            return os.preadv(self._file.fileno(), [into], place)
        self._memory.seek(place)
        return self._memory.readinto(into)

    def close(self) -> None:
        """Nothing of it is needed any more."""
        if self._file is not None:
            _idle.setdefault(self._folder, []).append(self._file)
        self._file, self._memory = None, io.BytesIO()

    def _to_file(self) -> None:
        idle = _idle.get(self._folder)
        self._file = idle.pop() if idle else tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115 - see close
        held = self._memory.getbuffer()
        if held:
            os.pwrite(self._file.fileno(), held, 0)
        held.release()
        self._memory = io.BytesIO()
