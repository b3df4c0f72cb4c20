"""Local training on a GPU: speed against transformers' Trainer as a benchmark prints it, and numbers against the CPU's.

The benchmark's own path also runs here on the CPU, with one layer of its shape, so that it is not first tried on a GPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "local_training.py"
GPU = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no NVIDIA GPU here: speed, MFU and memory on one are still to be measured"
    ),
]
LARGE = ("--length", "512", "--steps", "10", "--device", "cuda")
SIZES = [
    pytest.param(("--shape", shape, "--batch_size", str(batch), *LARGE), id=f"{shape}-{batch}", marks=GPU)
    for shape in ("1b", "7b")
    for batch in (1, 8)
]
SMALL = ("--shape", "tiny", "--layers", "1", "--batch_size", "1", "--length", "32", "--steps", "1", "--peak_tflops", "0.1")


@pytest.mark.parametrize("size", [pytest.param(SMALL, id="cpu"), *SIZES])
def test_the_benchmark_prints_speed_mfu_and_memory(size: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARK), *size, "--precision", "bf16", "--repeats", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{json.dumps(figures)}" if "cuda" in size else "", end="")
    for name in ("fedmpi", "trainer"):
        assert figures[f"{name}_tokens_per_s"] > 0 and 0 < figures[f"{name}_mfu"] < 1
        assert figures[f"{name}_peak_gib"] is None if "cuda" not in size else figures[f"{name}_peak_gib"] > 0


def fitted(device: str, settings: dict[str, object], quantization: str = "none") -> float:
    """The last loss of the packaged model after eight steps."""
    from fedmpi import models
    from fedmpi.data.prompts import IGNORED, Example
    from fedmpi.training import Config, fit

    dtype = "float16" if settings.get("precision") == "half" else "float32"
    base = models.load_model(models.Config(dtype=dtype, quantization=quantization), device)
    model = models.add_adapter(base, models.PeftConfig(), 0)
    rows = [Example(list(range(3 + i, 35 + i)), [IGNORED] * 8 + list(range(11 + i, 35 + i)), str(i)) for i in range(8)]
    return fit(model, rows, Config(**{"steps": 8, "batch_size": 4, "lr": 1e-2} | settings), seed=0, pad_id=0).last_loss


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here: these paths have run on CPUs only")
@pytest.mark.parametrize(
    ("settings", "near"),
    [
        ({}, 1e-3),
        ({"precision": "bf16"}, 5e-2),
        ({"precision": "fp16"}, 2e-2),
        ({"precision": "half", "optimizer": "sgd", "lr": 0.1}, None),
        ({"checkpointing": True}, 1e-3),
        ({"optimizer": "paged_adamw"}, 1e-2),
        ({"optimizer": "paged_adamw8bit"}, 5e-2),
        ({"accumulation": 2, "on_nonfinite": "skip"}, 1e-3),
    ],
)
def test_a_gpu_gives_the_losses_of_a_cpu(settings: dict[str, object], near: float | None) -> None:
    if "paged" in str(settings) and not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("no bitsandbytes here: pip install 'fedmpi[quant]'")
    plain = {key: value for key, value in settings.items() if key not in ("precision", "checkpointing", "optimizer")}
    expected = fitted("cpu", plain if near else {"optimizer": "sgd", "lr": 0.1})
    assert fitted("cuda", settings) == pytest.approx(expected, rel=near or 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here: quantised bases have run on CPUs only")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_base_on_a_gpu_gives_the_losses_of_a_cpu(quantization: str) -> None:
    pytest.importorskip("bitsandbytes", reason="no bitsandbytes here: pip install 'fedmpi[quant]'")
    assert fitted("cuda", {}, quantization) == pytest.approx(fitted("cpu", {}, quantization), rel=5e-2)
