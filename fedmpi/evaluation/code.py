"""HumanEval and HumanEval-X: programs that a model completes, run against their tests in a sandbox; pass@k without bias."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from math import comb
from typing import Any

from fedmpi.errors import ConfigError, DataError
from fedmpi.evaluation import sandbox
from fedmpi.evaluation.decoding import Decoding, Speaker
from fedmpi.evaluation.intervals import bootstrap
from fedmpi.evaluation.languages import Language, cleaned, language, missing_tools
from fedmpi.evaluation.task import Options, Record, draw, open_records, prompt_hash

DECODING = Decoding(max_new_tokens=128, temperature=0.1, top_k=40, top_p=0.75)
SAMPLES = 5
COMMENTS = {"python": "# language: Python\n", "cpp": "// language: C++\n", "java": "// language: Java\n", "go": "// language: Go\n"}


def pass_at_k(num: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, from `right` of `num`: 1 - C(num - right, k) / C(num, k)."""
    if num < k:
        raise ConfigError(f"pass@{k} needs at least {k} samples of each problem, not {num}: give --samples {k} or more")
    return float(1 - Fraction(comb(num - right, k), comb(num, k)))


@dataclass(frozen=True)
class Programs:
    """Problems of one language, and how many answers to each are tried."""

    name: str
    speaks: str
    problems: Sequence[Mapping[str, str]]
    samples: int
    ks: Sequence[int]
    decoding: Decoding
    prefix: str = ""  # HumanEval-X names the language in a comment
    limits: sandbox.Limits = field(default_factory=sandbox.Limits)

    @property
    def language(self) -> Language:
        """How the programs are made and run."""
        return language(self.speaks)

    @property
    def ids(self) -> Sequence[str]:
        """Every sample of every problem."""
        return [f"{problem['task_id']}#{sample}" for problem in self.problems for sample in range(self.samples)]

    def facts(self) -> Mapping[str, Any]:
        """As every task, and the limits, since a slow program may fail by them."""
        prompts = [self.prefix + problem["prompt"] for problem in self.problems]
        own = {"samples": self.samples, "k": list(self.ks), "limits": asdict(self.limits)}
        return {"prompt_hash": prompt_hash(prompts), "shots": 0, "decoding": self.decoding.facts(), **own}

    def ask(self, speaker: Speaker, chosen: Sequence[int]) -> list[Record]:
        """Answers, and whether their programs passed."""
        ids, problems = self.ids, [self.problems[index // self.samples] for index in chosen]
        keys = [ids[index] for index in chosen]
        said = speaker.say([self.prefix + problem["prompt"] for problem in problems], self.decoding, keys)
        return [self.judge(key, problem, text) for key, problem, text in zip(keys, problems, said, strict=True)]

    def judge(self, key: str, problem: Mapping[str, str], text: str) -> Record:
        """One answer's record. A Python program must also tell a secret at its end: exit(0) in its middle is no success."""
        answer, secret = cleaned(self.language, text), secrets.token_hex(8)
        program = self.language.program(problem, answer, secret)
        ending = sandbox.run(program, self.language.steps(program), self.limits)
        right = ending.passed and (not self.language.tells_secret or ending.output.rstrip().endswith(secret))
        return {
            **{"id": key, "task_id": problem["task_id"], "output": text, "completion": answer, "right": right},
            **{"code": ending.code, "stopped_by": ending.why, "step": ending.step, "isolated": ending.isolated},
            "message": "" if right else ending.output[-500:].replace(secret, ""),
        }

    def score(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """pass@k for each k; the interval is of the first."""
        right: dict[str, int] = {}
        for record in records:
            right[record["task_id"]] = right.get(record["task_id"], 0) + record["right"]
        found = {k: [pass_at_k(self.samples, num, k) for num in right.values()] for k in self.ks}
        means = {f"pass@{k}": sum(values) / len(values) for k, values in found.items()}
        return {
            "score": means[f"pass@{self.ks[0]}"],
            "interval": bootstrap(found[self.ks[0]]),
            **means,
            "num_problems": len(right),
            "isolated_from_network_and_files": all(record["isolated"] for record in records),
        }


def build(options: Options, speaks: str, plain: bool) -> Programs:
    """The task, with every reason that it cannot be done told before a model is loaded."""
    if not options.allow_code_execution:
        raise ConfigError(f"--task {options.task} runs programs that a model wrote: give --allow_code_execution if you want that")
    language(speaks)
    samples = SAMPLES if options.samples is None else options.samples
    for k in options.k:
        pass_at_k(samples, 0, k)
    known = ("HumanEval.jsonl", "human-eval.jsonl") if plain else (f"humaneval_{speaks}.jsonl",)
    problems = _problems(options, known)
    if missing := missing_tools(speaks, problems):
        raise ConfigError(f"--task {options.task} lacks {', '.join(missing)}: on Debian, apt install {language(speaks).package}")
    decoding = options.decoding(Decoding(**{**DECODING.facts(), "stop": language(speaks).stops}))
    name = "humaneval" if plain else f"humaneval-x:{speaks}"
    return Programs(name, speaks, problems, samples, options.k, decoding, "" if plain else COMMENTS[speaks])


def _problems(options: Options, known: tuple[str, ...]) -> list[Mapping[str, str]]:
    problems: list[Mapping[str, Any]] = []
    for record in open_records(options.task, options.data, known):
        if lacking := {"task_id", "prompt", "test"} - record.values.keys():
            raise DataError(f"{record.place} lacks {', '.join(sorted(lacking))}: it is no HumanEval problem")
        problems.append({key: str(value) for key, value in record.values.items()})
    return [problems[index] for index in draw(len(problems), options.rows, options.seed, "code")]
