"""What a stretch of work costs: seconds, peak memory, energy, as kernel and GPU driver tell. It must never know whose work it is.

Energy is that of the processor packages and GPUs of this machine while the work went on, whatever else ran on them. Where nothing
counts it (no RAPL that may be read, no NVML), it is None: unknown is not zero.
"""

import os
import resource
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Runs from its making on."""

    def __init__(self, device: str = "cpu") -> None:
        self._gpu = device if device.startswith("cuda") else None
        if self._gpu:
            import torch

            torch.cuda.reset_peak_memory_stats(self._gpu)
        self._packages, self._gpu_j = packages_uj(), gpu_joules(self._gpu)
        self._began = time.monotonic()

    def figures(self) -> dict[str, Any]:
        """Until now; the peak of memory is this process's own so far, on a GPU that of this work."""
        spent = [joules_since(self._packages), _difference(gpu_joules(self._gpu), self._gpu_j)]
        known = [joules for joules in spent if joules is not None]
        return {
            "turn_s": time.monotonic() - self._began,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_gpu_bytes": self._peak_gpu_bytes(),
            "energy_j": sum(known) if known else None,
        }

    def _peak_gpu_bytes(self) -> int | None:
        if self._gpu is None:
            return None
        import torch

        return int(torch.cuda.max_memory_allocated(self._gpu))


def packages_uj(root: Path = POWERCAP) -> dict[Path, int]:
    """The counters of the processor packages, in microjoules; those that may not be read are left out."""
    found: dict[Path, int] = {}
    try:
        names = sorted(os.listdir(root))
    except OSError:  # no powercap in this kernel, or not for us
        return found
    for name in names:
        if name.startswith("intel-rapl:") and name.count(":") == 1:  # its cores and its memory are counted in it
            with suppress(OSError, ValueError):
                found[root / name] = int((root / name / "energy_uj").read_text())
    return found


def joules_since(before: Mapping[Path, int]) -> float | None:
    """What the same packages have used since then; a counter that began anew has gone through its range once."""
    total = 0
    for package, start in before.items():
        try:
            now, span = (int((package / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
        except (OSError, ValueError):
            return None
        total += now - start if now >= start else now + span - start
    return total / 1e6 if before else None


def gpu_joules(device: str | None) -> float | None:
    """What a GPU has used since its driver was loaded, where NVML is there to tell (package nvidia-ml-py)."""
    if device is None:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    import torch

    try:
        pynvml.nvmlInit()
        unit = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(unit)) / 1e3
    except pynvml.NVMLError:  # no driver, no such unit, or one that counts no energy
        return None


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
