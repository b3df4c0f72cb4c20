"""Which way updates go: each by itself, as one sum of each rank, or by collectives. Every way ends in the same bytes.

It knows settings and placement; never links, tensors or rounds.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedmpi.aggregation import FOLDING
from fedmpi.codecs import AUTO
from fedmpi.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from fedmpi.round import Placement
    from fedmpi.settings.recipe import Recipe

Exchange = Literal["star", "sums", "collective", "auto"]
VALUE_BYTES, SUM_BYTES = 4, 8  # of a parameter in an update, and in a sum on the exact grid


@dataclass(frozen=True)
class Way:
    """What was decided, and the line that says so."""

    exchange: Literal["star", "sums", "collective"]
    reason: str


def single(recipe: "Recipe", algorithm: "ModuleType | None" = None) -> str:
    """The setting that must see single updates, as key and value; nothing where sums will do."""
    rules, coded = recipe.aggregation, f"codec_up {recipe.codec_up or recipe.codec}"
    looks = {
        f"algorithm {recipe.algorithm}": bool(getattr(algorithm, "SINGLE", False)),
        f"aggregation.rule {rules.rule}": rules.rule in (*FOLDING, "flexlora"),
        f"aggregation.robust {rules.robust}": rules.robust != "none",
        "aggregation.most_norm adaptive": rules.most_norm == "adaptive",
        "aggregation.record_error true": rules.record_error and recipe.peft.method == "lora",
        f"peft.client_ranks {','.join(map(str, recipe.peft.client_ranks))}": bool(recipe.peft.client_ranks),
        coded: (recipe.codec_up or recipe.codec) == AUTO or not recipe.chain("up").raw,
        f"close_share {recipe.close_share}": recipe.close_share is not None,
        "on_rank_lost continue": recipe.on_rank_lost == "continue",
        "a client of several ranks (ranks_per_client, groups)": recipe.clustered,
    }
    return next((key for key, given in looks.items() if given), "")


def fits(recipe: "Recipe", algorithm: "ModuleType | None" = None) -> None:
    """Refuse sums where somebody must see single updates; auto then is the star."""
    if recipe.exchange in ("star", "auto"):
        return
    if key := single(recipe, algorithm):
        advice = "give aggregation.record_error false" if "record_error" in key else "leave it out"
        raise ConfigError(
            f"exchange {recipe.exchange} adds updates up on their way, {key} must see each: {advice}, or give exchange star"
        )
    if recipe.exchange == "collective" and ((recipe.codec_down or recipe.codec) == AUTO or not recipe.chain("down").raw):
        raise ConfigError(
            f"exchange collective broadcasts values as they are: leave codec_down {recipe.codec_down or recipe.codec} out, "
            "or give exchange sums"
        )


def choose(recipe: "Recipe", algorithm: "ModuleType", placement: "Placement", cohort: int) -> Way:
    """The way of a run: as it was asked for, or what sends fewer bytes."""
    if recipe.exchange != "auto":
        return Way(recipe.exchange, "")
    if key := single(recipe, algorithm):
        return Way("star", f"{key} must see single updates")
    ranks = min(len(placement.leaders), cohort)
    each, summed = VALUE_BYTES * cohort, SUM_BYTES * ranks
    figures = f"a round's {cohort} updates take {each} bytes a parameter, the sums of {ranks} ranks {summed}"
    return Way("sums" if summed < each else "star", f"{figures}: summing first pays from three clients on a rank")
