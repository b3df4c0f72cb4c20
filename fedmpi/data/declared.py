"""What is known of each data set before a file is opened: a table, and nothing that runs. It must never open a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Hub:
    """Where a corpus lies on the hub, and what its parts and fields are called there."""

    name: str
    subset: str | None = None
    parts: Mapping[str, str] = field(default_factory=lambda: {"train": "train"})
    fields: Mapping[str, str] = field(default_factory=dict)  # role -> name; empty: as in the files


@dataclass(frozen=True)
class Declaration:
    """A corpus. A name of a file may hold wildcards; of several names the first that is found counts."""

    fields: Mapping[str, str]  # role -> name in the file; empty: the usual names
    licence: str
    source: str
    rows: tuple[int, int] | None  # train and test rows of the published release
    train_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()  # only files of these kinds; empty: any that can be read
    splitter: str = "iid"
    clients: int | None = None  # None with splitter meta: one client per category
    categories: tuple[str, ...] = ()  # all that may occur; empty: any
    dropped: tuple[str, ...] = ()  # categories whose rows leave the corpus, whatever the splitter
    cleaned: Mapping[str, str] = field(default_factory=dict)  # characters that are replaced in every field
    hub: Hub | None = None


@dataclass(frozen=True)
class Published:
    """What a paper's table says of a federated data set."""

    where: str
    rows: int
    clients: int
    largest: int | None = None
    smallest: int | None = None
    std: float | None = None
    rows_to: int = 1  # the table prints rows in steps of so many


@dataclass(frozen=True)
class FederatedSet:
    """A corpus with its clients, as papers name it: what may not be chosen otherwise under this name."""

    corpus: str
    splitter: str
    clients: int
    task: str  # what it is evaluated on by default
    published: Published


OWN = {
    "json": (".jsonl", ".json"),
    "csv": (".csv",),
    "parquet": (".parquet",),
}

DOLLY = ("brainstorming", "classification", "closed_qa", "creative_writing", "general_qa", "information_extraction")

CORPORA: Mapping[str, Declaration] = {
    "builtin:toy": Declaration(
        fields={},
        licence="Apache-2.0",
        source="made by fedmpi/data/toy.py",
        rows=(4096, 512),
        splitter="meta",
    ),
    "gsm8k": Declaration(
        fields={"instruction": "question", "response": "answer"},
        licence="MIT",
        source="https://github.com/openai/grade-school-math",
        rows=(7473, 1319),
        train_files=("train.jsonl", "gsm8k_train.jsonl", "grade_school_math/data/train.jsonl"),
        test_files=("test.jsonl", "gsm8k_test.jsonl", "grade_school_math/data/test.jsonl"),
        clients=3,
        hub=Hub("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    ),
    "dolly": Declaration(
        fields={"instruction": "instruction", "input": "context", "response": "response", "category": "category"},
        licence="CC BY-SA 3.0",
        source="https://huggingface.co/datasets/databricks/databricks-dolly-15k",
        rows=(15011, 0),
        train_files=("databricks-dolly-15k.jsonl", "new-databricks-dolly-15k.json"),
        splitter="meta",
        categories=(*DOLLY, "open_qa", "summarization"),
        hub=Hub("databricks/databricks-dolly-15k"),
    ),
    "rosetta": Declaration(
        fields={"instruction": "instruction", "input": "input", "response": "output", "category": "input"},
        licence="GFDL 1.2",
        source="https://github.com/sahil280114/codealpaca (data/rosetta_alpaca.json)",
        rows=(7954, 0),  # without the assembly
        train_files=("rosetta_alpaca.json", "rosetta_code_10lang.jsonl"),
        splitter="meta",
        categories=("C", "C#", "C++", "Go", "Java", "PHP", "Pascal", "Python", "Scala"),
        dropped=("X86 Assembly", "X86-64 Assembly"),
        cleaned={"\u00a0": " "},
    ),
    "code_search_net": Declaration(
        fields={"instruction": "docstring", "input": "language", "response": "code", "category": "language"},
        licence="each repository's own, named in the rows",
        source="https://github.com/github/CodeSearchNet",
        rows=(1_880_853, 100_529),
        train_files=("*/final/jsonl/train/*.jsonl", "final/jsonl/train/*.jsonl", "*_train_*.jsonl"),
        test_files=("*/final/jsonl/test/*.jsonl", "final/jsonl/test/*.jsonl", "*_test_*.jsonl"),
        splitter="meta",
        categories=("go", "java", "javascript", "php", "python", "ruby"),
        hub=Hub(
            "code-search-net/code_search_net",
            "all",
            {"train": "train", "test": "test"},
            {
                "instruction": "func_documentation_string",
                "input": "language",
                "response": "func_code_string",
                "category": "language",
            },
        ),
    ),
    "alpaca": Declaration(
        fields={"instruction": "instruction", "input": "input", "response": "output"},
        licence="CC BY-NC 4.0",
        source="https://github.com/tatsu-lab/stanford_alpaca",
        rows=(52_002, 0),
        train_files=("alpaca_data.json",),
        hub=Hub("tatsu-lab/alpaca"),
    ),
    "alpaca_cleaned": Declaration(
        fields={"instruction": "instruction", "input": "input", "response": "output"},
        licence="CC BY-NC 4.0",
        source="https://github.com/gururise/AlpacaDataCleaned",
        rows=(51_760, 0),
        train_files=("alpaca_data_cleaned.json",),
        hub=Hub("yahma/alpaca-cleaned"),
    ),
    **{
        name: Declaration(
            fields={},
            licence="the user's",
            source="the user's",
            rows=None,
            train_files=tuple(stem + kind for kind in kinds for stem in ("train", "data")),
            test_files=tuple("test" + kind for kind in kinds),
            kinds=kinds,
        )
        for name, kinds in OWN.items()
    },
}

FEDBIOT, FS_LLM = "FedBiOT Table 1", "FS-LLM Table 6"
FEDERATED: Mapping[str, FederatedSet] = {
    "fed-code-alpaca": FederatedSet("rosetta", "meta", 9, "humaneval", Published(FEDBIOT, 7954, 9, 1172, 439, 236.94)),
    "fed-dolly": FederatedSet("dolly", "meta", 8, "helm", Published(FEDBIOT, 15015, 8, 3611, 711, 795.06)),
    "fed-gsm8k-3": FederatedSet("gsm8k", "iid", 3, "gsm8k", Published(FEDBIOT, 7473, 3, 2491, 2491, 0.0)),
    "fed-code-search-net": FederatedSet("code_search_net", "meta", 6, "humaneval", Published(FS_LLM, 1_880_800, 6, rows_to=100)),
}
