"""Which settings go together: what no single house can refuse, said in one line that names the keys, before anything is loaded.

Every rule looks at a whole recipe. It must never know a model, data or ranks.
"""

from typing import TYPE_CHECKING

from fedmpi.aggregation import FOLDING, ServerConfig
from fedmpi.codecs import AUTO
from fedmpi.errors import ConfigError
from fedmpi.offsite import Config as OffsiteConfig
from fedmpi.offsite import Scheme
from fedmpi.settings import exchange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedmpi.settings.recipe import Recipe

_WEEK_S = 604_800  # what is beyond it is a slip, and an infinite wait no deadline
_AT_LEAST = {
    **dict.fromkeys(("rounds", "min_clients", "threads", "checkpoint_every", "keep", "ranks_per_client", "bench_rounds"), 1),
    **dict.fromkeys(("early_stop", "eval_every", "seed", "bench_after"), 0),
}


def numbers(recipe: "Recipe") -> None:
    """Counts, seconds and speeds that make sense by themselves."""
    for key, least in _AT_LEAST.items():
        if getattr(recipe, key) is None or getattr(recipe, key) < least:
            raise ConfigError(f"{key} {getattr(recipe, key)}: at least {least} is needed")
    if recipe.clients is not None and recipe.clients < 1:
        raise ConfigError(f"clients {recipe.clients}: at least 1 is needed")
    if recipe.time_left_s is not None and not recipe.time_left_s > 0:
        raise ConfigError(f"time_left_s {recipe.time_left_s}: give seconds above 0, or leave it out")
    if recipe.link_mbps is not None and not recipe.link_mbps > 0:
        raise ConfigError(f"link_mbps {recipe.link_mbps}: give a speed above 0")
    if not 0 < recipe.timeout_s <= _WEEK_S:
        raise ConfigError(f"timeout_s {recipe.timeout_s}: give seconds above 0, at most {_WEEK_S} (a week)")
    if recipe.early_stop and not recipe.eval_every:
        raise ConfigError(f"early_stop {recipe.early_stop} needs evaluations: give eval_every 1 or more")


def overlap(recipe: "Recipe") -> None:
    """Who scores a round behind the next one cannot decide by it whether there is a next one."""
    if recipe.eval.overlap and recipe.early_stop:
        raise ConfigError(
            f"eval.overlap scores a round while the next one runs, early_stop {recipe.early_stop} cannot wait: leave one out"
        )
    if recipe.eval.overlap and not recipe.eval_every:
        raise ConfigError(
            "eval.overlap has nothing to score behind the rounds, eval_every is 0: leave it out, or give eval_every 1 or more"
        )


def ranks(recipe: "Recipe") -> None:
    """Clients of several ranks, and engines that use them."""
    engine = recipe.train.engine
    if recipe.clustered and engine == "plain":
        raise ConfigError(
            "ranks_per_client and groups make clients of several ranks, train.engine plain uses one: give train.engine ddp"
        )
    if not recipe.clustered and engine != "plain":
        raise ConfigError(f"train.engine {engine} is for groups of ranks: give ranks_per_client or groups as well")
    if recipe.clustered and recipe.scenario != "fed":
        raise ConfigError(f"scenario {recipe.scenario} runs each client on one rank: leave ranks_per_client and groups out")


def needs_all_ranks(recipe: "Recipe") -> str:
    """Why a run of these settings cannot go on without a rank; nothing where it can."""
    needs = {
        "clients of one rank each are left out, ranks_per_client and groups make larger ones": recipe.clustered,
        f"scenario {recipe.scenario} needs every client's run": recipe.scenario != "fed",
        "compare starts further trainings, which all ranks begin together": bool(recipe.compare),
        "codec auto measures with all ranks": AUTO in (recipe.codec, recipe.codec_up, recipe.codec_down),
    }
    return next((why for why, given in needs.items() if given), "")


def lost_ranks(recipe: "Recipe") -> None:
    """What a run that goes on without lost ranks cannot be."""
    if recipe.on_rank_lost == "continue" and (why := needs_all_ranks(recipe)):
        raise ConfigError(f"on_rank_lost continue: {why}: leave that out, or give on_rank_lost end")


def early_close(recipe: "Recipe") -> None:
    """Who closes a round early must be able to do without the late ones."""
    share = recipe.close_share
    if share is None:
        return
    if not 0 < share < 1:
        raise ConfigError(f"close_share {share}: give a share of the updates between 0 and 1, or leave it out")
    if recipe.scenario != "fed":
        raise ConfigError(f"close_share {share}: scenario {recipe.scenario} needs every client's run: leave it out, or give fed")


def cohort(recipe: "Recipe") -> None:
    """Who takes part in a round."""
    named = recipe.sampling == "all" or recipe.sampling.startswith("fixed:")
    if not named and recipe.sampling not in ("uniform", "weighted"):
        raise ConfigError(f"sampling {recipe.sampling!r}: allowed are all, uniform, weighted, fixed:0,3,5")
    if named and recipe.clients_per_round is not None:
        raise ConfigError(f"sampling {recipe.sampling} names the cohort: leave clients_per_round {recipe.clients_per_round} out")


def compare(recipe: "Recipe") -> None:
    """Each algorithm has one folder."""
    names = [name.rpartition(".")[2] for name in (recipe.algorithm, *recipe.compare)]
    if len(set(names)) < len(names):
        raise ConfigError(f"compare {', '.join(recipe.compare)}: name each once, and not {recipe.algorithm}, which is run anyway")


def codec(recipe: "Recipe") -> None:
    """Chains that can be read."""
    recipe.chain("up"), recipe.chain("down")
    if not 0 <= recipe.codec_budget < 1:
        raise ConfigError(f"codec_budget {recipe.codec_budget}: give a share of at least 0 and below 1")
    for key, default in (("codec_budget", 0.004), ("codec_chosen", None)):
        if recipe.codec != AUTO and getattr(recipe, key) != default:
            raise ConfigError(f"{key} {getattr(recipe, key)} belongs to codec auto, codec is {recipe.codec}")


def with_groups(recipe: "Recipe", groups: "Sequence[str]") -> None:
    """Chains of their own for tensor groups that the algorithm sends besides the adapter."""
    for way in ("up", "down"):
        for group in (group for group, _ in recipe.chain(way).own if group not in groups):
            there = ", ".join(groups) or "none"
            raise ConfigError(f"codec: {group} is no tensor group that algorithm {recipe.algorithm} sends {way}; it has {there}")


def places(recipe: "Recipe") -> None:
    """Where rows lie."""
    if recipe.scenario in ("global", "all") and recipe.data.splitter == "given":
        raise ConfigError(
            f"scenario {recipe.scenario} puts all rows in one place, data.splitter given leaves them where they are: "
            "give scenario fed or local"
        )


def method(recipe: "Recipe") -> None:
    """What a PEFT method cannot be trained with."""
    if recipe.train.checkpointing and recipe.peft.method == "prefix":
        raise ConfigError(
            "train.checkpointing computes layers again without the cache, in which peft.method prefix lives: leave it out, or "
            "take another method"
        )
    if recipe.train.compile and recipe.peft.method == "prefix":
        raise ConfigError("train.compile makes one code for all layers, peft.method prefix gives each its own cache: leave it out")


def quantization(recipe: "Recipe") -> None:
    """Numbers of four or eight bits are neither trained, nor added to, nor shared out among ranks."""
    if recipe.model.quantization == "none":
        return
    given = f"model.quantization {recipe.model.quantization}"
    if recipe.peft.method == "none":
        raise ConfigError(f"{given} freezes the base, peft.method none trains it: give an adapter, or quantization none")
    if recipe.aggregation.rule in FOLDING:
        raise ConfigError(
            f"{given}: aggregation.rule {recipe.aggregation.rule} adds to the base, which cannot be: give another rule"
        )
    if recipe.train.engine == "deepspeed" and recipe.train.zero_stage == 3:
        raise ConfigError(f"{given}: train.zero_stage 3 shares out the base, which cannot be: give 1 or 2")
    if recipe.train.engine == "fsdp":
        raise ConfigError(f"{given}: train.engine fsdp shares out the base, which cannot be: give ddp")


def rule(recipe: "Recipe") -> None:
    """Aggregation rules that do not go with a method."""
    rule = recipe.aggregation.rule
    if rule != "mean" and recipe.peft.method != "lora":
        raise ConfigError(
            f"aggregation.rule {rule} is about LoRA's factors, peft.method is {recipe.peft.method}: give lora, or rule mean"
        )
    if rule in (*FOLDING, "flexlora") and recipe.peft.dora:
        raise ConfigError(f"aggregation.rule {rule} averages products B A; with peft.dora they are not what is added to a weight")


def robust(recipe: "Recipe") -> None:
    """Robust rules count updates, and compare them."""
    robust = recipe.aggregation.robust
    if robust != "none" and recipe.weights != "equal":
        raise ConfigError(
            f"aggregation.robust {robust} counts every update as one, weights is {recipe.weights}: give weights equal"
        )
    if robust != "none" and recipe.peft.client_ranks:
        raise ConfigError(f"aggregation.robust {robust} compares updates of one shape: leave peft.client_ranks out")


def server_optimizer(recipe: "Recipe") -> None:
    """The server's own step."""
    optimizer, rule = recipe.server_optimizer, recipe.aggregation.rule
    if optimizer != "none" and rule in (*FOLDING, "flexlora"):
        raise ConfigError(
            f"server_optimizer {optimizer} steps along the adapter's own tensors, aggregation.rule {rule} makes others: "
            "give rule mean, ffa or rolora"
        )
    if optimizer == "none" and recipe.server != ServerConfig():
        raise ConfigError("server.* are settings of the server's optimiser: give server_optimizer avgm, adam, yogi or adagrad")


RULES = (
    numbers,
    overlap,
    ranks,
    lost_ranks,
    early_close,
    cohort,
    compare,
    codec,
    exchange.fits,
    places,
    method,
    quantization,
    rule,
    robust,
    server_optimizer,
)


def offsite_is_read(recipe: "Recipe", read: bool) -> None:
    """Settings of offsite tuning are for an algorithm that has them."""
    if not read and recipe.offsite != OffsiteConfig():
        raise ConfigError(f"offsite settings are given, but algorithm {recipe.algorithm} has none: give fedot or fedbiot")


def with_offsite(recipe: "Recipe", scheme: Scheme | None) -> None:
    """What offsite tuning asks of the rest. The algorithm's file says whether it is offsite."""
    if scheme is None:
        return
    methods = ("lora",) if scheme.tunes_emulator else ("lora", "none")
    if recipe.peft.method not in methods:
        raise ConfigError(
            f"peft.method {recipe.peft.method}: algorithm {recipe.algorithm} trains layers, with {' or '.join(methods)}"
        )
    if recipe.model.quantization != "none":
        raise ConfigError(
            f"model.quantization {recipe.model.quantization}: algorithm {recipe.algorithm} makes models of layers, which packed "
            "weights do not allow: give quantization none, and offsite.builder quantized for a small emulator"
        )
    if recipe.aggregation.rule != "mean" or recipe.peft.client_ranks:
        raise ConfigError(
            f"algorithm {recipe.algorithm} takes the mean of adapters of one rank: leave aggregation.rule "
            f"{recipe.aggregation.rule} and peft.client_ranks {recipe.peft.client_ranks} out"
        )
    if scheme.tunes_emulator and recipe.scenario != "fed":
        raise ConfigError(
            f"scenario {recipe.scenario}: {recipe.algorithm} aligns the emulator on the server in every round, so nobody can train "
            "alone with it: give scenario fed, or algorithm fedot"
        )
