"""The table at the end of a run: who was trained on what, and how well it does on rows that nobody trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def show(results: Mapping[str, Any], path: Path) -> None:
    """The table at the end."""
    from rich.console import Console
    from rich.table import Table

    rows = rows_of(results)
    columns = {"eval_loss": ("held-out loss", "{:.3f}"), "exact_match": ("exact match", "{:.1%}")}
    if any("eval_loss_emu" in scores for _, scores in rows):
        columns |= {"eval_loss_emu": ("loss with emulator", "{:.3f}"), "exact_match_emu": ("match with emulator", "{:.1%}")}
    table = Table()
    table.add_column("trained on", no_wrap=True)
    for title, _ in columns.values():
        table.add_column(title, justify="right")
    for name, scores in rows:
        table.add_row(name, *(form.format(scores[key]) if key in scores else "-" for key, (_, form) in columns.items()))
    print(f"results in {path}")
    Console(width=112, force_terminal=False).print(table)  # no escapes: a rank may have a terminal while its output is a file


def rows_of(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Named scores, from the base to the federation."""
    rows: list[tuple[str, Mapping[str, float]]] = []
    if "fed" in results:
        rows.append(("nothing (the base model)", results["fed"]["base"]))
    if "local" in results:
        alone = results["local"]
        rows += [(f"client {client} alone", scores) for client, scores in sorted(alone.items())]
        kept = {f"{key}{ending}" for key in ("eval_loss", "eval_token_accuracy", "exact_match") for ending in ("", "_emu")}
        keys = kept.intersection(*alone.values())
        rows.append(("mean of the clients alone", {key: sum(s[key] for s in alone.values()) / len(alone) for key in keys}))
    if "global" in results:
        rows.append(("all data in one place", results["global"][0]))
    if "fed" in results:
        rows.append(("the federation", results["fed"]["final"]))
    others = (name for name in results if name not in ("fed", "local", "global"))
    return rows + [(f"the federation with {name}", results[name]["final"]) for name in others]
