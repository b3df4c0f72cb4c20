"""Metrics of the HELM subtasks: pure functions of texts and ranks. They never know a model or a file."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
CUT = 10  # RR@10, NDCG@10


def normal(text: str) -> str:
    """Lower case, without punctuation, articles and needless white space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def exact(gold: str, said: str) -> float:
    """Equal but for white space around it."""
    return float(gold.strip() == said.strip())


def quasi_exact(gold: str, said: str) -> float:
    """Equal in the normal form."""
    return float(normal(gold) == normal(said))


def f1(gold: str, said: str) -> float:
    """Harmonic mean of precision and recall of the words (each counted once, as HELM does) of the normal forms."""
    wanted, found = set(normal(gold).split()), set(normal(said).split())
    both = len(wanted & found)
    return 2 * both / (len(wanted) + len(found)) if both else float(wanted == found)


def rouge2(gold: str, said: str) -> float:
    """F-measure of pairs of neighbouring words, counted as often as they occur; lower case, no stemming."""
    wanted, found = _pairs(gold), _pairs(said)
    both = sum((wanted & found).values())
    return 2 * both / (sum(wanted.values()) + sum(found.values())) if both else 0.0


def _pairs(text: str) -> Counter[tuple[str, str]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return Counter(pairwise(words))


def reciprocal_rank(relevant: Sequence[float], cut: int = CUT) -> float:
    """One over the place of the first relevant result among the first `cut`, in ranked order."""
    return next((1 / place for place, gain in enumerate(relevant[:cut], start=1) if gain > 0), 0.0)


def ndcg(relevant: Sequence[float], cut: int = CUT) -> float:
    """Discounted gain of the first `cut` results over that of the best order of all."""
    best = _gain(sorted(relevant, reverse=True)[:cut])
    return _gain(relevant[:cut]) / best if best else 0.0


def _gain(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, start=1))


def best(metric: Callable[[str, str], float], golds: Sequence[str], said: str) -> float:
    """The score against the gold that fits best."""
    return max(metric(gold, said) for gold in golds)


OF_TEXT: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact,
    "quasi_exact_match": quasi_exact,
    "f1": f1,
    "rouge2": rouge2,
}
OF_RANKS: Mapping[str, Callable[[Sequence[float]], float]] = {"rr@10": reciprocal_rank, "ndcg@10": ndcg}
