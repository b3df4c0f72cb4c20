"""What each chain makes of an adapter: bytes, speed on one core, and the error it leaves.

    python benchmarks/codecs.py [--mib 16] [--chain int8 --chain int4,zstd ...] [--adapter FILE.safetensors]

The messages are those of FederatedScope-LLM's Table 4 for LLaMA-7B in float32: LoRA (rank 8 on query and value projections),
P-tuning (20 tokens, MLP) and prompt tuning (8 tokens). Without --adapter the values are normally distributed, the hardest case
for the packers. One JSON line per chain; speeds are the best of several runs over all chunks, after one that is thrown away.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from fedmpi.codecs import parse
from fedmpi.codecs.coder import Coder

CHUNK = 1 << 18  # values
CHAINS = (
    *(
        "raw",
        "bf16",
        "bf16,shuffle,zstd",
        "shuffle,zstd",
        "int8",
        "int8,zstd",
        "int8:stochastic",
        "nf4",
        "int4",
        "int4,zstd",
        "int2,zstd",
    ),
    *("topk:0.1,int8,zstd", "topk:0.1,int4,zstd", "topk:0.05,int4,zstd", "topk:0.01,int8"),
)
HIDDEN, LAYERS, RANK = 4096, 32, 8
MESSAGES = {
    "lora": LAYERS * 2 * 2 * HIDDEN * RANK,
    "ptuning_20": 20 * HIDDEN + 3 * (HIDDEN + 1) * HIDDEN,
    "prompt_8": 8 * HIDDEN,
}
REPEATS = 5


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def measure(chain: str, values: torch.Tensor, num_values: dict[str, int]) -> dict[str, object]:
    """One line of the table."""
    coder, chunks = Coder(parse(chain)), values.split(CHUNK)
    sent = [coder.encode(chunk, seed) for seed, chunk in enumerate(chunks)]
    encode_s = best(lambda: [coder.encode(chunk, seed) for seed, chunk in enumerate(chunks)])
    decode_s = best(lambda: [coder.decode(data, len(chunk)) for data, chunk in zip(sent, chunks, strict=True)])
    back = torch.cat([coder.decode(data, len(chunk)) for data, chunk in zip(sent, chunks, strict=True)])
    per_value = sum(map(len, sent)) / len(values)
    return {
        "chain": chain,
        "bits_per_value": round(8 * per_value, 3),
        **{f"{name}_mib": round(per_value * num / 2**20, 3) for name, num in num_values.items()},
        "encode_gb_per_s": round(4 * len(values) / encode_s / 1e9, 2),
        "decode_gb_per_s": round(4 * len(values) / decode_s / 1e9, 2),
        "relative_error": round(float((back - values).norm() / values.norm()), 5),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=16)
    parser.add_argument("--chain", action="append")
    parser.add_argument("--adapter", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.adapter:
        values = torch.cat([tensor.float().view(-1) for _, tensor in sorted(load_file(asked.adapter).items())])
    else:
        values = 1e-3 * torch.randn(int(asked.mib * 2**18), generator=torch.Generator().manual_seed(0))
    for chain in asked.chain or CHAINS:
        print(json.dumps(measure(chain, values, MESSAGES)), flush=True)


if __name__ == "__main__":
    main()
