"""What work costs: energy from counters that wrap, from none that may be read None; a peak that a large allocation raises."""

from pathlib import Path

import numpy
import pytest

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


def test_figures_of_a_stretch_of_work() -> None:
    running = meter.Meter()
    before = running.figures()
    large = numpy.ones(40_000_000)
    after = running.figures()
    assert after["turn_s"] > before["turn_s"] >= 0 and after["peak_gpu_bytes"] is None
    assert after["peak_rss_bytes"] >= before["peak_rss_bytes"] > 0 and after["peak_rss_bytes"] > large.nbytes
    assert after["energy_j"] is None or after["energy_j"] >= 0
