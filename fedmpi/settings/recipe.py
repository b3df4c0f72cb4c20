"""A recipe: everything a user can set for a run, composed from the houses' own settings. `accord` says what goes together."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Literal

from fedmpi import codecs, config
from fedmpi.aggregation import Config as AggregationConfig
from fedmpi.aggregation import Optimizer, ServerConfig
from fedmpi.data import Config as DataConfig
from fedmpi.errors import ConfigError
from fedmpi.evaluation import Config as EvalConfig
from fedmpi.models import Config as ModelConfig
from fedmpi.models import PeftConfig
from fedmpi.offsite import Config as OffsiteConfig
from fedmpi.offsite import Scheme
from fedmpi.settings import accord, exchange
from fedmpi.settings.exchange import Exchange
from fedmpi.training import Config as TrainConfig

EXPORTS = ("Config", "Server", "Client", "build_server", "build_client", "run_round")
_NOT_THE_EXPERIMENT = (
    "run_dir",
    "resume",
    "transport",
    "ranks_per_client",
    "groups",
    "timeout_s",
    "time_left_s",
    "on_rank_lost",
    "keep",
    "checkpoint_every",
    "link_mbps",
    "exchange",
    "codec_chosen",
)


@dataclass(frozen=True)
class Recipe:
    """The settings of one run.

    Args:
        algorithm: a module of fedmpi.algorithms, or a dotted name outside the package
        scenario: fed = the federation; local = every client alone; global = all data in one place; all = the three and a table
        compare: algorithms whose federation of the same clients is run afterwards, each in RUN_DIR/NAME, a row of the table
        run_dir: where the run leaves its results; default runs/ALGORITHM-HASH, so that a restart finds it
        rounds: communication rounds
        seed: every random choice of the run comes from it
        clients: number of clients; default what the data set fixes
        clients_per_round: a number or a share such as 0.05; default all
        sampling: all, uniform, weighted (by data size), or fixed:0,3,5
        min_clients: fewer updates than this and the round does not count
        weights: an update weighs its client's training examples, 1, or the examples processed in the round
        ranks_per_client: ranks that train one client together, with train.engine ddp, fsdp or deepspeed
        groups: unequal groups of ranks, such as 4,2,1
        threads: torch threads of every rank, whatever the launcher
        device: auto, cpu, cuda, or cuda:1
        time_left_s: seconds that the job may run from its start on: a round that would not end in them is not begun; default what
            Slurm says of the job's time limit
        timeout_s: seconds without a byte or a heartbeat after which a rank counts as silent, or without a step (and ten times the
            step before) after which a client's training counts as stuck
        early_stop: stop after so many evaluations without a better held-out loss; 0 = never
        resume: auto = continue a run of the same configuration; never = refuse a used folder; must = refuse an empty one
        checkpoint_every: rounds between durable states
        keep: checkpoints that are kept
        eval_every: rounds between evaluations (the first is before round 0); 0 = only at the end
        on_quorum_lost: repeat the round with a new cohort (three times at most), or stop
        close_share: share of a cohort's updates with which a round is closed; the others are late. Off by default, since who is
            late depends on time, and the result with it
        bench_after: failures in a row after which a client sits out; 0 = never
        bench_rounds: rounds that it sits out, unless too few others are left
        on_rank_lost: end the job, or continue without the clients of a rank that died or fell silent, until it is started again;
            auto continues under the launchers that leave the other ranks alone
        server_optimizer: none, or what steps along the clients' move: avgm (FedAvgM), adam, yogi or adagrad (FedAdam and so on)
        codec: what tensors are coded by on their way: raw, or stages such as delta,int8,ef,zstd (see fedmpi.codecs), or auto = what
            is best for links and ranks as they are measured before the first round. A tensor group may have its own chain, as in
            `int4,ef; control=int8`
        codec_budget: of auto: the most that a value may lose in a message, as a share of the largest magnitude in its block
        codec_chosen: what auto has chosen; the run writes it into its config.yaml, and keeps to it
        codec_up: of updates, where it differs
        codec_down: of broadcasts, where it differs
        exchange: star = every update travels by itself; sums = a rank adds up those of its clients first, exactly; collective =
            broadcasts and sums go by collectives of all ranks; auto = star or sums, by what is less to send; the same bytes result
        transport: auto, torch or mpi; decides where the environment is ambiguous
        link_mbps: speed of a client's link, for the seconds that its transfers would take there; default unknown
    """

    algorithm: str = "fedavg"
    scenario: Literal["fed", "local", "global", "all"] = "fed"
    compare: tuple[str, ...] | str = ()
    run_dir: str | None = None
    rounds: int = 10
    seed: int = 0
    clients: int | None = None
    clients_per_round: str | int | float | None = None
    sampling: str = "uniform"
    min_clients: int = 1
    weights: Literal["examples", "equal", "processed"] = "examples"
    ranks_per_client: int = 1
    groups: tuple[int, ...] | str = ()
    threads: int = 1
    device: str = "auto"
    timeout_s: float = 60.0
    time_left_s: float | None = None
    early_stop: int = 0
    resume: Literal["auto", "never", "must"] = "auto"
    checkpoint_every: int = 1
    keep: int = 2
    eval_every: int = 1
    on_quorum_lost: Literal["repeat", "stop"] = "repeat"
    close_share: float | None = None
    bench_after: int = 3
    bench_rounds: int = 3
    on_rank_lost: Literal["auto", "end", "continue"] = "auto"
    server_optimizer: Optimizer = "none"
    codec: str = "raw"
    codec_budget: float = 0.004
    codec_chosen: str | None = None
    codec_up: str | None = None
    codec_down: str | None = None
    exchange: Exchange = "star"
    transport: Literal["auto", "torch", "mpi"] = "auto"
    link_mbps: float | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    offsite: OffsiteConfig = field(default_factory=OffsiteConfig)

    def __post_init__(self) -> None:
        """Texts become tuples; what cannot go together is refused."""
        if isinstance(self.groups, str):
            object.__setattr__(self, "groups", _whole_numbers("groups", self.groups))
        if isinstance(self.compare, str):
            object.__setattr__(self, "compare", tuple(name.strip() for name in self.compare.split(",") if name.strip()))
        if self.clients_per_round is not None:
            object.__setattr__(self, "clients_per_round", str(self.clients_per_round))
        for rule in accord.RULES:
            rule(self)

    @property
    def clustered(self) -> bool:
        """Whether a client may have several ranks."""
        return bool(self.groups) or self.ranks_per_client > 1

    def chain(self, way: str) -> codecs.Chains:
        """How tensors are coded on their way up or down."""
        key = f"codec_{way}" if getattr(self, f"codec_{way}") is not None else "codec"
        if key == "codec" and self.codec == codecs.AUTO:
            return codecs.chains(self.codec_chosen or codecs.RAW, "codec_chosen")
        return codecs.chains(getattr(self, key), key)

    def beside(self, name: str) -> "Recipe":
        """One of `compare` as a recipe of its own."""
        offsite = self.offsite if scheme_of(name) else OffsiteConfig()
        return replace(self.unscored(), algorithm=name, scenario="fed", compare=(), offsite=offsite)

    def unscored(self) -> "Recipe":
        """The same where only the end counts: rounds are scored where that may stop them, and else not."""
        return self if self.early_stop else replace(self, eval_every=0, eval=replace(self.eval, overlap=False))

    def settings(self) -> dict[str, Any]:
        """All settings as plain values."""
        return config.as_dict(self)

    def experiment(self) -> dict[str, Any]:
        """The settings that can change results: two runs with equal ones are the same experiment."""
        settings = {key: value for key, value in self.settings().items() if key not in _NOT_THE_EXPERIMENT}
        settings["data"].pop("cache", None)
        settings["eval"].pop("overlap", None)
        return settings

    def hash(self) -> str:
        """The name of the experiment."""
        return config.digest(self.experiment())


def _whole_numbers(key: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.strip("[]() ").split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{key} {text!r}: give whole numbers, such as 4,2,1") from None


def read(arguments: Sequence[str], program: str, about: str) -> tuple[Recipe, Any]:
    """The recipe and the algorithm's own settings from a command line; none at all means the packaged quickstart."""
    arguments = [_spelt_out(argument) for argument in arguments] or ["--config", "builtin:quickstart"]
    module = algorithm(_named(arguments))
    group = short(module.__name__)
    has_settings = bool(fields(module.Config))
    namespace = config.parse(Recipe, arguments, program, about, {group: module.Config} if has_settings else {})
    given: dict[str, Any] = {key: getattr(namespace, key) for key in Recipe.__dataclass_fields__}
    wanted = Recipe(**given)
    algorithms = [wanted, *map(wanted.beside, wanted.compare)]
    accord.offsite_is_read(wanted, any(scheme_of(one.algorithm) for one in algorithms))
    for one in algorithms:
        accord.with_offsite(one, scheme_of(one.algorithm))
        accord.with_groups(one, getattr(algorithm(one.algorithm), "GROUPS", ()))
        exchange.fits(one, algorithm(one.algorithm))
        if require := getattr(algorithm(one.algorithm), "require", None):
            require(one)
    return wanted, getattr(namespace, group) if has_settings else module.Config()


def _spelt_out(argument: str) -> str:
    """--on_nonfinite and --on_oom are words of the federation, like --on_quorum_lost; what they set is done in training."""
    key, equals, value = argument.partition("=")
    return f"--train.{key[2:]}{equals}{value}" if key in ("--on_nonfinite", "--on_oom") else argument


def of_run(folder: Path) -> Recipe:
    """The settings of a run, from its own folder."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.yaml")
    return read(["--config", str(path)], "config.yaml", "")[0]


def algorithm(name: str) -> ModuleType:
    """The module of an algorithm: one file in fedmpi/algorithms, or any module that Python can import from here."""
    known = known_algorithms()
    path = f"fedmpi.algorithms.{name}" if name in known else name.removesuffix(".py")
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"algorithm {name!r}: {error}; it must be {', '.join(known)}, or a module that Python can import from this folder"
        ) from None
    if missing := [part for part in EXPORTS if not hasattr(module, part)]:
        raise ConfigError(f"algorithm {name!r} lacks {', '.join(missing)}: its file must export {', '.join(EXPORTS)}")
    return module


def scheme_of(name: str) -> Scheme | None:
    """How an algorithm splits the model; None where everybody has all of it."""
    found: Scheme | None = getattr(algorithm(name), "SCHEME", None)
    return found


def short(name: str) -> str:
    """The last part of an algorithm's name: what its group of settings and its folders are called."""
    return name.rpartition(".")[2]


def known_algorithms() -> list[str]:
    """The algorithm files of the package."""
    return sorted(module.name for module in iter_modules(import_module("fedmpi.algorithms").__path__))


def _named(arguments: Sequence[str]) -> str:
    """The algorithm that the arguments or their recipe name: its own settings join the parser before the rest is read."""
    found: str = Recipe.algorithm
    for position, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        value = value or (arguments[position + 1] if position + 1 < len(arguments) else "")
        if key == "--config":
            found = config.peek(value).get("algorithm", found)
        elif key == "--algorithm":
            found = value
    if not isinstance(found, str) or not found.strip(". "):
        raise ConfigError(f"algorithm {found!r}: give a name, such as {Recipe.algorithm}")
    return found
