"""Seeds: every random choice of a run comes from (seed, what it is for, round, client), never from a rank or the past."""

import hashlib
import random


def seed_for(seed: int, *what: str | int) -> int:
    """A 63-bit seed for one purpose. Equal arguments give equal seeds on every machine and in every placement."""
    text = "\x1f".join([str(int(seed)), *map(str, what)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Begin a client's turn: the global generators of Python, numpy and torch start from `seed`."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed & 0xFFFF_FFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also writes a stack trace for each absent accelerator: 0.5 ms
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
