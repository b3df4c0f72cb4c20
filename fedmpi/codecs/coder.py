"""One chain at work on one chunk: flat float32 values to bytes, and back. Chunks know nothing of each other, so that they can flow.

What depends on more than a chunk (the state that `delta` refers to, the residual of `ef`) belongs to who holds that state. This
module must never know links, rounds or names of tensors.
"""

from dataclasses import dataclass

import torch

from fedmpi.codecs import Chain, numbers, packers, sparse
from fedmpi.errors import ProtocolError

_WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Coder:
    """Encodes and decodes what a chain says of single chunks."""

    chain: Chain

    def most_bytes(self, num: int) -> int:
        """The most that a chunk of `num` values can take: what a receiver accepts before it looks at it. Nothing takes nothing."""
        if not num:
            return 0
        most = self._most_unpacked(num)
        return packers.most_bytes(most) if self.chain.packer else most

    def _most_unpacked(self, num: int) -> int:
        share, number = self.chain.share, self.chain.number
        if share is None:
            return numbers.num_bytes(number, num)
        return numbers.num_bytes(number, sparse.num_kept(share, num)) + sparse.most_bytes(share, num)

    def require(self, values: torch.Tensor) -> None:
        """Raise a NonFinite where a value could not be told from an infinity: better before a chunk is on its way."""
        numbers.require(self.chain.number, values)

    def encode(self, values: torch.Tensor, seed: int = 0) -> memoryview:
        """The bytes of flat float32 values; NonFinite where one of them is not finite and the chain would hide that."""
        chain, num, places = self.chain, values.numel(), b""
        if not num:
            return memoryview(b"")
        if chain.share is not None:
            positions = sparse.choose(values, chain.share)
            places, values = sparse.write(positions, num), values[positions]
        data = numbers.write(chain.number, values, seed).numpy().data.cast("B")
        if chain.shuffle:
            data = packers.shuffle(data, self._width)
        if places:
            data = memoryview(places + data)
        return memoryview(packers.pack(chain.packer, data)) if chain.packer else data

    def decode(self, data: memoryview, num: int) -> torch.Tensor:
        """The values in `data`, `num` of them, the same bits on every machine; a ProtocolError says what is wrong with it."""
        chain = self.chain
        if len(data) > (most := self.most_bytes(num)):
            raise ProtocolError(f"{num} values take at most {most} bytes in this chain, found {len(data)}")
        if not num:
            return torch.zeros(0)
        if chain.packer:
            data = memoryview(packers.unpack(chain.packer, data, self._most_unpacked(num)))
        if chain.share is None:
            return self._numbers(data, num)
        kept = sparse.num_kept(chain.share, num)
        positions, used = sparse.read(data, kept, num)
        values = torch.zeros(num)
        values[positions] = self._numbers(data[used:], kept)
        return values

    def _numbers(self, data: memoryview, num: int) -> torch.Tensor:
        if len(data) != (exactly := numbers.num_bytes(self.chain.number, num)):
            raise ProtocolError(f"{num} values take {exactly} bytes in this chain, found {len(data)}")
        if self.chain.shuffle:
            data = packers.unshuffle(data, self._width)
        writable = bytearray(data) if data.readonly else data  # torch warns of memory that it must not write to
        return numbers.read(self.chain.number, torch.frombuffer(writable, dtype=torch.uint8), num)

    @property
    def _width(self) -> int:
        """Bytes of one value, where they can be told apart."""
        return _WIDTHS.get(self.chain.number.name, 1)
