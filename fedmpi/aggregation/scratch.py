"""Scratch space: bytes by place, in memory while they are few, else in a file without a name, so that nothing stays behind however
the process ends. It must never know what the bytes are.
"""

import io
import os
import tempfile
from pathlib import Path
from typing import IO

IN_MEMORY_BYTES = 8 << 20  # what a round of small updates takes before it goes to disk
_idle: dict[Path | None, list[IO[bytes]]] = {}  # by folder; to write in pages that are new to the system costs three times as much


class Scratch:
    """One such space. Its file, where it came to have one, is used again by the next in the same folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._memory = folder, io.BytesIO()
        self._file: IO[bytes] | None = None

    def write(self, place: int, data: memoryview) -> None:
        """Put bytes at a place."""
        if self._file is None and place + len(data) > IN_MEMORY_BYTES:
            self._to_file()
        if self._file is None:
            self._memory.seek(place)
            self._memory.write(data)
            return
        while data:
            num = os.pwrite(self._file.fileno(), data, place)
            data, place = data[num:], place + num

    def read(self, place: int, num: int) -> bytearray:
        """So many bytes that were written."""
        if self._file is None:
            self._memory.seek(place)
            return bytearray(self._memory.read(num))
        found = bytearray(num)
        view = memoryview(found)
        while view:
            got = os.preadv(self._file.fileno(), [view], place)
            if not got:
                raise EOFError(f"{len(view)} bytes at {place} were never written")
            view, place = view[got:], place + got
        return found

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
