"""One member of a client that trains one turn after another with DeepSpeed, started by test_engines.py.

Usage: engine_member.py FOLDER RANK TURNS, where TURNS is a JSON list of settings of training, one object for each turn.
In a turn with BREAKS, rank 1 raises in its third step.
"""

import json
import os
import sys
from pathlib import Path

import torch
from inner_world_member import LAUNCHER, TIMEOUT_S, Break, address, rows, small_model, train, weights

from fedmpi.training import Config, InnerWorld, check, fit, join


def broken_turn(world: InnerWorld, model: torch.nn.Module, settings: dict[str, object]) -> str | None:
    """A turn in which rank 1 raises; gives the client's first fault."""
    fault = None
    try:
        fit(model, rows(7), Config(steps=4, batch_size=1, **settings), seed=0, pad_id=0, hooks=[Break()] * world.rank)
    except RuntimeError as error:
        fault = f"rank {world.rank}: {error}"
    return world.settle(fault)


def main(folder: Path, rank: int, turns: list[dict[str, object]]) -> None:
    launcher = {key: os.environ[key] for key in LAUNCHER}
    check(Config(engine="deepspeed"))
    where, hosted = address(folder, "client", rank)
    world = join(where, rank, 2, 0, TIMEOUT_S, role="client")
    for number, settings in enumerate(turns):
        if settings.pop("BREAKS", False):
            model = small_model()
            frozen, names = model.embed.weight.clone(), {key: set(vars(p)) for key, p in model.named_parameters()}
            result = {"fault": broken_turn(world, model, settings), "generation": world.generation}
            result["frozen_as_before"] = torch.equal(frozen, model.embed.weight)
            result["clean"] = names == {key: set(vars(p)) for key, p in model.named_parameters()}
        else:
            model, result = train("client", 3, 1, settings)
            assert world.settle(None) is None
        torch.save(weights(model), folder / f"{number}.{rank}.weights")
        (folder / f"{number}.{rank}.json").write_text(json.dumps(result))
    world.leave()
    assert launcher == {key: os.environ[key] for key in LAUNCHER}
    del hosted


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
