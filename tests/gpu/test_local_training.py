"""Local training on a GPU: speed against transformers' Trainer as a benchmark prints it, and numbers against the CPU's.

The benchmark's own path also runs here on the CPU, with one layer of its shape, so that it is not first tried on a GPU.
"""

import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
SPACE_GIB = {"1b-1": 16, "1b-8": 32, "7b-1": 40, "7b-8": 72}  # for two models, ours and the Trainer's, and one's activations
SIZES = [
    pytest.param(("--shape", name[:2], "--batch_size", name[3:], *LARGE), space, id=name, marks=GPU)
    for name, space in SPACE_GIB.items()
]
SMALL = ("--shape", "tiny", "--layers", "1", "--batch_size", "1", "--length", "32", "--steps", "1", "--peak_tflops", "0.1")


@pytest.mark.parametrize(("size", "space_gib"), [pytest.param(SMALL, 0, id="cpu"), *SIZES])
def test_the_benchmark_prints_speed_mfu_and_memory(
    size: tuple[str, ...], space_gib: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if space_gib and (there := torch.cuda.get_device_properties(0).total_memory / 2**30) < space_gib:
        pytest.skip(f"this GPU has {there:.0f} GiB, about {space_gib} are needed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARK), *size, "--precision", "bf16", "--repeats", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{json.dumps(figures)}" if "cuda" in size else "", end="")
    for name in ("fedmpi", "trainer"):
        assert figures[f"{name}_tokens_per_s"] > 0
        assert 0 < figures[f"{name}_mfu"] < 1 if "cuda" not in size or figures[f"{name}_mfu"] else True  # no data sheet, no share
        assert figures[f"{name}_peak_gib"] is None if "cuda" not in size else figures[f"{name}_peak_gib"] > 0


def test_what_a_gpu_could_do_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    promised = importlib.import_module("local_training").promised
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA L4")
    assert [promised(name) for name in names] == [989e12, 989e12, 756e12, 312e12, 362e12, 121e12]
    assert promised("NVIDIA H200 MIG 1g.18gb") is promised("NVIDIA GB200") is None, "a part of one, and one that nobody told of"


def rows() -> list[Any]:
    from fedmpi.data.prompts import IGNORED, Example

    return [Example(list(range(3 + i, 35 + i)), [IGNORED] * 8 + list(range(11 + i, 35 + i)), str(i)) for i in range(8)]


def fitted(device: str, settings: dict[str, object], quantization: str = "none") -> float:
    """The last loss of the packaged model after eight steps."""
    from fedmpi import models
    from fedmpi.training import Config, fit

    dtype = "float16" if settings.get("precision") == "half" else "float32"
    base = models.load_model(models.Config(dtype=dtype, quantization=quantization), device)
    model = models.add_adapter(base, models.PeftConfig(), 0)
    return fit(model, rows(), Config(**{"steps": 8, "batch_size": 4, "lr": 1e-2} | settings), seed=0, pad_id=0).last_loss


HALF = {"precision": "half", "optimizer": "sgd", "lr": 0.1}
SKIP = {"accumulation": 2, "on_nonfinite": "skip"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here: these paths have run on CPUs only")
@pytest.mark.parametrize(
    ("settings", "on_the_cpu", "near"),
    [
        ({}, {}, 1e-3),
        ({"precision": "bf16"}, {}, 5e-2),
        ({"precision": "fp16"}, {}, 2e-2),
        (HALF, HALF, 5e-2),
        ({"checkpointing": True}, {}, 1e-3),
        ({"compile": True}, {}, 1e-3),
        ({"optimizer": "paged_adamw"}, {}, 1e-2),
        ({"optimizer": "paged_adamw8bit"}, {}, 5e-2),
        (SKIP, SKIP, 1e-3),
    ],
)
def test_a_gpu_gives_the_losses_of_a_cpu(settings: dict[str, object], on_the_cpu: dict[str, object], near: float) -> None:
    if "paged" in str(settings) and not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("no bitsandbytes here: pip install 'fedmpi[quant]'")
    assert fitted("cuda", settings) == pytest.approx(fitted("cpu", on_the_cpu), rel=near)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here: quantised bases have run on CPUs only")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_base_on_a_gpu_gives_the_losses_of_a_cpu(quantization: str) -> None:
    pytest.importorskip("bitsandbytes", reason="no bitsandbytes here: pip install 'fedmpi[quant]'")
    assert fitted("cuda", {}, quantization) == pytest.approx(fitted("cpu", {}, quantization), rel=5e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here: what turns leave on one is still to be seen")
def test_between_turns_a_client_waits_on_the_cpu() -> None:
    """Its adapter, its optimiser's state and what it sends: hosted clients cost the GPU nothing until their turn comes."""
    from fedmpi import models
    from fedmpi.training import Config, fit

    model = models.add_adapter(models.load_model(models.Config(dtype="float32"), "cuda"), models.PeftConfig(), 0)
    settings = Config(steps=2, batch_size=4, optimizer_state="keep")
    fit(model, rows(), settings, seed=0, pad_id=0)  # what libraries keep for themselves is there from here on
    gc.collect()
    before = torch.cuda.memory_allocated()
    done = fit(model, rows(), settings, seed=1, pad_id=0)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before
    assert done.state is not None
    assert {t.device.type for t in (*done.state.tensors.values(), *models.trainable(model).values())} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here: a whole run on one is still to be seen")
def test_a_run_on_a_gpu_ends_near_that_of_a_cpu(tmp_path: Path) -> None:
    from fedmpi import run

    size = ["--clients=3", "--rounds=2", "--data.num_rows=60", "--data.max_length=64", "--eval.rows=8", "--eval.task=none"]
    found = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        assert run.main([*size, "--model.dtype=float32", f"--device={device}", f"--run_dir={folder}"]) == 0
        found[device] = json.loads((folder / "summary.json").read_text())["final"]["eval_loss"]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-2)
