"""A client process of FedBiOT where the model's folder is empty: it learns, and holds nothing but what it was given."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from probe import digests
from program import FEDBIOT, HERE, LAUNCH_S, PROGRAM, adapter_of, free_port, run, started, wait_for
from safetensors.torch import load_file

from fedmpi.models import Config, base_of, load_model


@pytest.mark.timeout(600)
def test_a_client_that_cannot_open_the_model_holds_only_what_is_disclosed(tmp_path: Path, fedbiot_alone: Path) -> None:
    can = os.geteuid() == 0 and shutil.which("unshare") and not subprocess.run(["unshare", "--mount", "true"]).returncode
    if not can:
        pytest.skip("needs root and mount namespaces to hide the model from client processes")
    model, port = tmp_path / "model", str(free_port())
    shutil.copytree(base_of(Config()), model)
    program = [sys.executable, *PROGRAM, *FEDBIOT, f"--model.path={model}", "--train.hooks=[probe.Probe]"]
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{model}" && test -z "$(ls -A "{model}")" && exec "$@"', "sh"]
    with ExitStack() as ranks:
        running = []
        for rank in range(2):
            folder = tmp_path / f"rank{rank}"
            folder.mkdir()
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [*(hidden if rank else []), *program, f"--run_dir={tmp_path / 'run'}"]
            paths = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
            running.append(ranks.enter_context(started(command, folder, PROBE=str(tmp_path), PYTHONPATH=paths, **world)))
        codes = [process.wait(LAUNCH_S) for process in running]
    said = [(tmp_path / f"rank{rank}" / "output.txt").read_text()[-3000:] for rank in range(2)]
    assert codes == [0, 0], said
    whole = digests(load_model(Config(str(model))).parameters())
    disclosed = digests(load_file(tmp_path / "run" / "emulator" / "model.safetensors").values())
    assert len(whole - disclosed) > 5 * 7  # five layers are dropped, and five have other queries and values
    held = set(json.loads((tmp_path / "client-1.json").read_text()))
    assert disclosed <= held, "the probe sees what the clients were given"
    assert not held & (whole - disclosed), "the clients hold tensors of the original that were not disclosed"
    simulated = set(json.loads((fedbiot_alone / "client-alone.json").read_text()))
    assert simulated & (whole - disclosed), "one process has the server's model too, and the probe would see it"
    for name in ("adapter", "adapter_emu"):
        file = f"{name}/adapter_model.safetensors"
        assert (fedbiot_alone / "run" / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_a_server_killed_in_its_long_alignment_begins_it_anew(tmp_path: Path, fedbiot_alone: Path) -> None:
    program, port = [sys.executable, *PROGRAM, *FEDBIOT, f"--run_dir={tmp_path / 'run'}"], str(free_port())
    by_hand = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    output = tmp_path / "output.txt"
    with ExitStack() as ranks:
        long = [*program, "--offsite.prealign_steps=100000"]
        server, client = (ranks.enter_context(started(long, tmp_path, RANK=str(rank), **by_hand)) for rank in range(2))
        wait_for(lambda: "pre-alignment, step 50 of 100000" in output.read_text(), server, "the alignment")
        server.kill()
        assert client.wait(LAUNCH_S) == 1
    assert "rank 0 is gone" in output.read_text() and "Traceback" not in output.read_text()
    run(program, tmp_path)
    assert adapter_of(tmp_path / "run") == adapter_of(fedbiot_alone / "run")
