"""Data: corpora, how their rows are dealt to clients, prompts and batches. It must never know models or rounds."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fedmpi.errors import ConfigError
from fedmpi.lazy import door

if TYPE_CHECKING:
    from fedmpi.data.batching import Batch as Batch
    from fedmpi.data.batching import ByLength as ByLength
    from fedmpi.data.batching import batches as batches
    from fedmpi.data.batching import collate as collate
    from fedmpi.data.batching import pack as pack
    from fedmpi.data.cache import tokenize as tokenize
    from fedmpi.data.clients import ClientData as ClientData
    from fedmpi.data.clients import Federated as Federated
    from fedmpi.data.clients import federate as federate
    from fedmpi.data.clients import has_common as has_common
    from fedmpi.data.corpora import Corpus as Corpus
    from fedmpi.data.corpora import Row as Row
    from fedmpi.data.corpora import load as load
    from fedmpi.data.declared import CORPORA as CORPORA
    from fedmpi.data.declared import FEDERATED as FEDERATED
    from fedmpi.data.declared import Declaration as Declaration
    from fedmpi.data.prompts import TEMPLATES as TEMPLATES
    from fedmpi.data.prompts import Counts as Counts
    from fedmpi.data.prompts import Example as Example
    from fedmpi.data.prompts import encode_prompts as encode_prompts
    from fedmpi.data.prompts import prompt_ids as prompt_ids
    from fedmpi.data.prompts import render as render
    from fedmpi.data.prompts import template_hash as template_hash
    from fedmpi.data.splitters import follow as follow
    from fedmpi.data.splitters import split as split

Splitter = Literal["auto", "iid", "meta", "dirichlet", "shards", "unequal_shards", "quantity", "root_verb", "given"]


@dataclass(frozen=True)
class Config:
    """Which rows, dealt to clients in which way, cut into tokens in which way.

    Args:
        name: builtin:toy; gsm8k, dolly, rosetta, code_search_net, alpaca, alpaca_cleaned; fed-code-alpaca, fed-dolly,
            fed-gsm8k-3, fed-code-search-net, whose clients are fixed; json, csv or parquet for files of one's own
        path: a file, or a folder that is searched for the corpus's known names; plain, .gz, .bz2 or .xz; default the hub
            (with splitter given a file per client, as site/{client}.jsonl; site/heldout.jsonl is nobody's, for measuring)
        fields: names of the fields in the file, as instruction=q,input=c,response=a,category=lang
        splitter: how rows are dealt: iid, meta (a category per client), dirichlet (label skew), shards and unequal_shards (few
            categories per client), quantity (volume skew), root_verb (by the instruction's first verb), given (each client has
            its own file), auto = the data set's own
        alpha: dirichlet, quantity, unequal_shards: small is uneven, large is even
        min_rows: dirichlet, quantity, unequal_shards: no client gets fewer rows
        balance: dirichlet: a client that has its even share gets no more (Shepherd's unequal volumes)
        shards: shards, unequal_shards: how many a client gets
        heldout_per_category: hold out so many rows of each category before the split (Shepherd: 10); 0 = the usual way
        num_rows: train on so many rows only, drawn with the seed (builtin:toy makes that many); default all
        max_length: tokens of prompt and response together
        template: the text around an instruction: alpaca, qa, chat (the model's own), or a file that ends in {response}
        packing: put several samples into one row of at most max_length tokens; each attends to itself alone
        group_by_length: put examples of like length into a batch, for less padding; which ones meet is drawn anew in each epoch
        cache: a folder for tokenised rows, shared by all ranks and runs; default none, as it holds the rows readably
    """

    name: str = "builtin:toy"
    path: str | None = None
    fields: dict[str, str] | str = field(default_factory=dict)
    splitter: Splitter = "auto"
    alpha: float = 0.5
    min_rows: int = 1
    balance: bool = False
    shards: int = 2
    heldout_per_category: int = 0
    num_rows: int | None = None
    max_length: int = 512
    template: str = "alpaca"
    packing: bool = False
    group_by_length: bool = False
    cache: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no corpus could make sense of."""
        at_least = {"min_rows": 1, "shards": 1, "heldout_per_category": 0, "num_rows": 1, "max_length": 32}
        for key, least in at_least.items():
            found = getattr(self, key)
            if found is not None and found < least:
                raise ConfigError(f"data.{key} is {found}: it must be at least {least}")
        if self.packing and self.group_by_length:
            raise ConfigError("data.packing leaves no padding that data.group_by_length could save: give one of them")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"data.alpha is {self.alpha}: it must be a positive number (small is uneven, large is even)")


__getattr__ = door(
    __name__,
    {
        **dict.fromkeys(("CORPORA", "FEDERATED", "Declaration"), "declared"),
        **dict.fromkeys(("Row", "Corpus", "load"), "corpora"),
        **dict.fromkeys(("ClientData", "Federated", "federate", "has_common"), "clients"),
        **dict.fromkeys(("split", "follow"), "splitters"),
        **dict.fromkeys(("TEMPLATES", "render", "template_hash", "encode_prompts", "prompt_ids", "Example", "Counts"), "prompts"),
        "tokenize": "cache",
        **dict.fromkeys(("Batch", "ByLength", "batches", "collate", "pack"), "batching"),
    },
)
