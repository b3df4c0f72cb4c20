"""FederatedScope-LLM's messages (Table 4: LLaMA-7B in float32), and what a codec chain makes of so many values."""

from collections.abc import Iterator

import torch

from fedmpi.codecs import parse
from fedmpi.codecs.coder import Coder

CHUNK = 1 << 18  # values, as on the wire
HIDDEN, LAYERS, RANK = 4096, 32, 8
MESSAGES = {  # values in each: LoRA on query and value projections, P-tuning with an MLP and 20 tokens, 8 tokens
    "lora": LAYERS * 2 * 2 * HIDDEN * RANK,
    "ptuning_20": 20 * HIDDEN + 3 * (HIDDEN + 1) * HIDDEN,
    "prompt_8": 8 * HIDDEN,
}


def normal(num: int) -> torch.Tensor:
    """Normally distributed values: the hardest case for the packers."""
    return 1e-3 * torch.randn(num, generator=torch.Generator().manual_seed(0))


def coded(coder: Coder, values: torch.Tensor) -> Iterator[memoryview]:
    """The chunks of a message. Differences and feedback change the values that a coder gets, not how many bytes they take here."""
    for seed, chunk in enumerate(values.split(CHUNK)):
        yield coder.encode(chunk, seed)


def mib(chain: str, num: int) -> float:
    """The size of a message of so many normally distributed values."""
    return sum(map(len, coded(Coder(parse(chain)), normal(num)))) / 2**20
