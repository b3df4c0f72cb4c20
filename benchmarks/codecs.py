"""What each chain makes of an adapter: bytes, speed on one core, and the error it leaves.

    python benchmarks/codecs.py [--mib 16] [--chain int8 --chain int4,zstd ...] [--adapter FILE.safetensors]
    python benchmarks/codecs.py --messages

The messages are those of FederatedScope-LLM's Table 4 for LLaMA-7B in float32: LoRA (rank 8 on query and value projections),
P-tuning (20 tokens, MLP) and prompt tuning (8 tokens). Without --adapter the values are normally distributed, the hardest case
for the packers. One JSON line per chain; speeds are the best of several runs over all chunks, after one that is thrown away.
With --messages nothing is timed: it encodes each message once per chain and puts the sizes into the README, beside FS-LLM's.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cells import publish
from safetensors.torch import load_file
from sizes import CHUNK, MESSAGES, coded, mib, normal

from fedmpi.codecs import parse
from fedmpi.codecs.coder import Coder

PUBLISHED = Path(__file__).parent / "published" / "fs_llm.json"
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
    *("sign", "topk:0.2,sign", "topk:0.1,int8,zstd", "topk:0.1,int4,zstd", "topk:0.05,int4,zstd", "topk:0.01,int8"),
)
SIZED = ("raw", "bf16", "int8", "int4,zstd", "topk:0.2,sign", "topk:0.1,int4,zstd", "topk:0.05,int8,zstd")
PUBLISHED_AS = {"lora": "lora", "ptuning_20": "ptuning", "prompt_8": "prompt"}
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
    sent = list(coded(coder, values))
    encode_s = best(lambda: list(coded(coder, values)))
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


def message_table() -> str:
    """FS-LLM's Table 4 and ours side by side, as Markdown; MiB."""
    rows = json.loads(PUBLISHED.read_text())["table_4"]["rows"]
    lines = ["| message | values | FS-LLM | " + " | ".join(f"`{chain}`" for chain in SIZED) + " |", "|---" * (3 + len(SIZED)) + "|"]
    for name, num in MESSAGES.items():
        sizes = " | ".join(f"{mib(chain, num):.3f}" for chain in SIZED)
        lines.append(f"| {name} | {num:,} | {rows[PUBLISHED_AS[name]]['message_mb']} | {sizes} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=16)
    parser.add_argument("--chain", action="append")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--messages", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.messages:
        publish("messages", message_table())
        return
    if asked.adapter:
        values = torch.cat([tensor.float().view(-1) for _, tensor in sorted(load_file(asked.adapter).items())])
    else:
        values = normal(int(asked.mib * 2**18))
    for chain in asked.chain or CHAINS:
        print(json.dumps(measure(chain, values, MESSAGES)), flush=True)


if __name__ == "__main__":
    main()
