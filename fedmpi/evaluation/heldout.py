"""The tasks on a federation's own held-out rows: loss and token accuracy by client, and exact match of answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmpi.data.prompts import Example, render
from fedmpi.evaluation.answers import SLACK
from fedmpi.evaluation.decoding import Decoding, Speaker
from fedmpi.evaluation.intervals import bootstrap, wilson
from fedmpi.evaluation.task import Heldout, Record, prompt_hash


@dataclass(frozen=True)
class Perplexity:
    """Loss per supervised token, perplexity and token accuracy; overall, for each client, and who is worst off."""

    heldout: Heldout
    examples: Sequence[Example]
    about: Mapping[str, Any]  # template and length, counts of what was cut and dropped
    name: str = "perplexity"

    @property
    def ids(self) -> Sequence[str]:
        """The rows that have a token to predict."""
        return [example.id for example in self.examples]

    def facts(self) -> Mapping[str, Any]:
        """The rows come in with their tokens, so the hash of these stands for the prompts."""
        tokens = prompt_hash([f"{example.input_ids} {example.labels}" for example in self.examples])
        return {"prompt_hash": tokens, "shots": 0, "decoding": None, "rows": self.heldout.source, **self.about}

    def ask(self, speaker: Speaker, chosen: Sequence[int]) -> list[Record]:
        """The loss of some rows."""
        examples = [self.examples[index] for index in chosen]
        measured = zip(examples, speaker.measure(examples), strict=True)
        owners = self.heldout.owners
        return [
            {"id": e.id, "client": owners.get(e.id), "loss": m.loss, "num_tokens": m.num_tokens, "right": m.right}
            for e, m in measured
        ]

    def score(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """Sums over tokens; a client without rows is said to have none."""
        clients = {c: [record for record in records if record["client"] == c] for c in range(self.heldout.num_clients)}
        by_client = {str(client): _figures(found) for client, found in clients.items() if found}
        worst = max(by_client, key=lambda client: float(by_client[client]["loss"])) if by_client else None
        losses, tokens = [record["loss"] for record in records], [record["num_tokens"] for record in records]
        overall = _figures(records)
        return {
            "score": overall["loss"],
            "interval": bootstrap(losses, tokens),
            **overall,
            "clients": by_client,
            "clients_without_rows": [client for client, found in clients.items() if not found],
            "worst_client": None if worst is None else {"client": int(worst), **by_client[worst]},
        }


def _figures(records: Sequence[Record]) -> dict[str, Any]:
    tokens = sum(record["num_tokens"] for record in records)
    loss = math.fsum(record["loss"] for record in records) / tokens
    right = sum(record["right"] for record in records)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {
        **{"loss": loss, "perplexity": perplexity, "token_accuracy": right / tokens},
        **{"num_rows": len(records), "num_tokens": tokens},
    }


@dataclass(frozen=True)
class ExactMatch:
    """Greedy answers to held-out instructions, right when they equal the response but for white space around it."""

    heldout: Heldout
    template: str
    decoding: Decoding
    about: Mapping[str, Any]
    tokenizer: Any = None  # for the template `chat`
    name: str = "exact_match"

    @property
    def ids(self) -> Sequence[str]:
        """The rows."""
        return [row.id for row in self.heldout.rows]

    def facts(self) -> Mapping[str, Any]:
        """As every task."""
        prompts = [self._prompt(index) for index in range(len(self.heldout.rows))]
        decoding = self.decoding.facts()
        return {"prompt_hash": prompt_hash(prompts), "shots": 0, "decoding": decoding, "rows": self.heldout.source, **self.about}

    def ask(self, speaker: Speaker, chosen: Sequence[int]) -> list[Record]:
        """The answers to some rows."""
        rows = [self.heldout.rows[index] for index in chosen]
        limits = [len(row.output.encode()) + SLACK for row in rows]
        said = speaker.say([self._prompt(index) for index in chosen], self.decoding, [row.id for row in rows], limits)
        return [
            {
                **{"id": row.id, "client": self.heldout.owners.get(row.id), "category": row.category},
                **{"output": text, "gold": row.output, "right": text.strip() == row.output.strip()},
            }
            for row, text in zip(rows, said, strict=True)
        ]

    def score(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """Shares of right answers."""
        return {
            **shares(records),
            "categories": {name: shares(found) for name, found in grouped(records, "category").items()},
            "clients": {str(client): shares(found) for client, found in grouped(records, "client").items()},
        }

    def _prompt(self, index: int) -> str:
        row = self.heldout.rows[index]
        return render(row.instruction, row.input, self.template, self.tokenizer)


def shares(records: Sequence[Record]) -> dict[str, Any]:
    """The share of right records, with its interval."""
    right, num = sum(bool(record["right"]) for record in records), len(records)
    return {"score": right / max(1, num), "interval": wilson(right, num), "num_rows": num}


def grouped(records: Sequence[Record], key: str) -> dict[Any, list[Record]]:
    """Records by one of their values, in the order of these."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(record[key], []).append(record)
    return dict(sorted(found.items(), key=lambda pair: str(pair[0])))
