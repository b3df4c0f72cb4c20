"""The floors of the house: a module imports only from lower floors, and third-party packages enter by known doors."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "fedmpi"
FLOORS = {
    5: "run sessions plan evaluate generate export report",
    4: "algorithms",
    3: "federation hosting record settings progress result stop target",
    2: "transports codecs training offsite evaluation",
    1: "messages manifest round world ledger meter aggregation models data",
    0: "tensors seeding config command errors lazy timeleft watch",
}
FLOOR_OF = {house: floor for floor, houses in FLOORS.items() for house in houses.split()} | {"": 0}
NO_DOORS_BETWEEN = {1, 2, 4}  # houses of these floors do not know their neighbours
DOORS = {("offsite", "training")}  # but alignment is training: there is one optimiser loop
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
PLACES = {
    "mpi4py": ("transports/mpi",),
    "torch.distributed": ("transports/torch_dist", "training/"),
    "transformers": ("models/", "evaluation/"),
    "peft": ("models/", "evaluation/"),
    "bitsandbytes": ("models/", "training/optim"),
    "datasets": ("data/",),
    "deepspeed": ("training/",),
}
PROGRAMS = ("settings.recipe", "world", "run", "evaluate", "generate", "export")
HEAVY = ("torch", "transformers", "peft", "datasets", "mpi4py", "bitsandbytes", "deepspeed")


def imports(tree: ast.AST, skip_types: bool = False) -> Iterator[str]:
    """Every dotted name that is imported below `tree`, inside functions too; `from a import b` is a.b."""
    for node in ast.iter_child_nodes(tree):
        if skip_types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node, skip_types)


def house_of(module: str) -> str:
    """`training/loop` and `fedmpi.training.loop.fit` live in `training`; the package itself in ``."""
    house = module.removeprefix("fedmpi.").replace(".", "/").split("/")[0]
    return "" if house in ("__init__", "__version__") else house


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_lower_floors(module: str) -> None:
    assert house_of(module) in FLOOR_OF, "a new house: give it a floor here, in CONTRIBUTING.md and in the design"
    floor = 5 if module.endswith("__main__") else FLOOR_OF[house_of(module)]
    for name in imports(ast.parse(MODULES[module].read_text())):
        house = house_of(name)
        if name.startswith("fedmpi.") and house != house_of(module):
            assert FLOOR_OF[house] <= floor, f"floor {floor} imports {name} of floor {FLOOR_OF[house]}"
            neighbour = FLOOR_OF[house] == floor and floor in NO_DOORS_BETWEEN and (house_of(module), house) not in DOORS
            assert not neighbour, f"{name} is a neighbour on floor {floor}"


@pytest.mark.parametrize("module", MODULES)
def test_third_party_packages_enter_by_their_own_doors(module: str) -> None:
    for name in imports(ast.parse(MODULES[module].read_text()), skip_types=True):
        for package, places in PLACES.items():
            if f"{name}.".startswith(f"{package}."):
                assert module.startswith(places), f"{package} belongs in {places}"


def test_settings_load_without_torch() -> None:
    """`--help` reads every Config: the doors, the recipe, the algorithms and the program import nothing heavy."""
    doors = [module.removesuffix("/__init__") for module in MODULES if module.endswith("/__init__")]
    algorithms = [module for module in MODULES if module.startswith("algorithms/") and not module.endswith("__init__")]
    names = ", ".join(f"fedmpi.{name.replace('/', '.')}" for name in [*doors, *algorithms, *PROGRAMS])
    code = f"import sys, {names}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by it, and refuses the second when they run together."""
    names = [path.name for path in ROOT.parent.glob("tests/**/test_*.py")]
    assert sorted(names) == sorted(set(names))
