"""What work costs: energy from counters that wrap, from none that may be read None; a peak that a large allocation raises."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch

from fedmpi import meter


def package(root: Path, name: str, now: object, span: int = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{now}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder


def test_joules_are_summed_over_packages_and_not_over_their_parts(tmp_path: Path) -> None:
    for name, start in {"intel-rapl:0": 100, "intel-rapl:1": 200, "intel-rapl:0:0": 5, "other": 1}.items():
        package(tmp_path, name, start)
    before = meter.packages_uj(tmp_path)
    assert [path.name for path in before] == ["intel-rapl:0", "intel-rapl:1"]
    package(tmp_path, "intel-rapl:0", 500_100)
    package(tmp_path, "intel-rapl:1", 250_200)
    assert meter.joules_since(before) == pytest.approx(0.75)


def test_a_counter_that_began_anew_went_through_its_range(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 900_000)
    before = meter.packages_uj(tmp_path)
    package(tmp_path, "intel-rapl:0", 100_000)
    assert meter.joules_since(before) == pytest.approx(0.2)


@pytest.mark.parametrize("content", ["", "no number"])
def test_what_nothing_tells_is_unknown_and_not_zero(tmp_path: Path, content: str) -> None:
    assert meter.joules_since(meter.packages_uj(tmp_path)) is None
    before = meter.packages_uj(package(tmp_path, "intel-rapl:0", 5).parent)
    package(tmp_path, "intel-rapl:0", content)
    assert meter.joules_since(before) is None and meter.packages_uj(tmp_path) == {}
    assert meter.gpu_joules(None) is None


class Nvml(ModuleType):
    """Stands for the driver's library: two GPUs with counters in millijoules, one of which counts nothing."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.counters, self.ready = {"GPU-aa": 5_000_000}, False

    def nvmlInit(self) -> None:
        self.ready = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert self.ready
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, unit: str) -> int:
        if unit not in self.counters:
            raise self.NVMLError("Not Supported")
        return self.counters[unit]


def test_joules_of_a_gpu_are_those_of_its_own_counter(monkeypatch) -> None:
    driver, uuids = Nvml(), {"cuda:0": "aa", "cuda:1": "bb"}
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device]))
    assert meter.gpu_joules("cuda:0") == 5000.0 and meter.gpu_joules("cuda:1") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert meter.gpu_joules("cuda:0") is None, "the library is not installed"


def test_energy_is_that_of_processors_and_gpu_together_and_null_where_nothing_counts(tmp_path: Path, monkeypatch) -> None:
    driver = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(meter, "packages_uj", lambda read=meter.packages_uj: read(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="aa"))
    for name in ("reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 7)
    package(tmp_path, "intel-rapl:0", 900_000)
    both, processor = meter.Meter("cuda:0"), meter.Meter("cpu")
    package(tmp_path, "intel-rapl:0", 400_000)
    driver.counters["GPU-aa"] += 2_500
    assert both.figures()["energy_j"] == pytest.approx(0.5 + 2.5) and both.figures()["peak_gpu_bytes"] == 7
    assert processor.figures()["energy_j"] == pytest.approx(0.5)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    driver.counters.clear()
    assert meter.Meter("cuda:0").figures()["energy_j"] is None and meter.Meter("cpu").figures()["energy_j"] is None


def test_figures_of_a_stretch_of_work() -> None:
    running = meter.Meter()
    before = running.figures()
    large = numpy.ones(40_000_000)
    after = running.figures()
    assert after["turn_s"] > before["turn_s"] >= 0 and after["peak_gpu_bytes"] is None
    assert after["peak_rss_bytes"] >= before["peak_rss_bytes"] > 0 and after["peak_rss_bytes"] > large.nbytes
    assert after["energy_j"] is None or after["energy_j"] >= 0
