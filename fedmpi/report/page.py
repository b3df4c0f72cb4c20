"""The page: a run's heading, results, plots, clients, events and settings as HTML without script or network.

Every text from a file is escaped where it is put between tags. It must never compute a result that the files do not hold.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedmpi.progress import size
from fedmpi.record.checkpoint import write_atomically
from fedmpi.report import figures, tables
from fedmpi.report.reading import Line, Run, number, read
from fedmpi.report.style import CSS


def write(run_dir: Path) -> Path:
    """Make RUN_DIR/report.html from the files in the folder; gives its path."""
    return save(read(run_dir), run_dir / "report.html")


def save(run: Run, path: Path) -> Path:
    """Write the page of a run."""
    write_atomically(path, render(run))
    return path


def render(run: Run) -> str:
    """The whole page."""
    title = f"{run.settings.get('algorithm', 'run')} on {_setting(run, 'data', 'name')}"
    sections = (
        _heading(run, title),
        _tiles(run),
        tables.results(run),
        figures.plots(run),
        tables.numbers(run),
        tables.clients(run),
        tables.events(run),
        tables.settings(run),
        _footer(run),
    )
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f'<link rel="icon" href="data:,">\n<title>{escape(title)} · fedmpi report</title>\n<style>{CSS}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _setting(run: Run, *keys: str) -> str:
    found: Any = run.settings
    for key in keys:
        found = found.get(key, {}) if isinstance(found, Mapping) else {}
    return tables.NONE if found in ({}, None) else str(found)


def _heading(run: Run, title: str) -> str:
    summary = run.summary or next(iter([*run.alone.values(), *([run.pooled] if run.pooled else [])]), {})
    facts = {
        "model": _setting(run, "model", "path"),
        "trained": _trained(run),
        "clients": len(run.data.get("train_rows", ())) or run.settings.get("clients"),
        "scenario": run.scenario,
        "launcher": summary.get("launcher"),
        "world": summary.get("world"),
        "transport": summary.get("transport"),
        "seed": run.settings.get("seed"),
        "folder": run.path,
    }
    badge = f'<span class="badge {escape(run.state)}">{escape(run.state)}</span>' if run.state else ""
    return f'<header>\n<h1>{escape(title)}{badge}</h1>\n<dl class="facts">{tables.pairs(facts)}</dl>\n</header>'


def _trained(run: Run) -> str:
    method = _setting(run, "peft", "method")
    return f"{method} of rank {_setting(run, 'peft', 'rank')}" if method == "lora" else method


def _tiles(run: Run) -> str:
    tiles = []
    for key, name, form in (("eval_loss", "held-out loss", "{:.3f}"), ("exact_match", "exact match", "{:.1%}")):
        first, newest = run.score(key)
        if newest is not None:
            tiles.append((form.format(newest), name, f"{form.format(first)} before round 0" if first is not None else ""))
    rounds = run.rounds
    if rounds:
        tiles.append((f"{rounds[-1]['round'] + 1:,} of {_setting(run, 'rounds')}", "rounds done", _missing(rounds)))
        up, down, seconds, wait = (_total(run, key) for key in ("up_bytes", "down_bytes", "seconds", "wait_s"))
        tiles.append((size(up + down), "bytes sent", f"{size(up)} up, {size(down)} down"))
        tiles.append((_duration(seconds), "time in rounds", f"{_duration(wait)} of them waiting"))
    cards = (
        f'<div class="card tile"><span>{name}</span><b>{escape(value)}</b><span>{note}</span></div>' for value, name, note in tiles
    )
    return f'<div class="tiles">{"".join(cards)}</div>' if tiles else ""


def _missing(rounds: Sequence[Line]) -> str:
    failures = sum(len(line.get("failures", ())) for line in rounds)
    return f"{failures:,} failures of clients" if failures else "no client failed"


def _total(run: Run, key: str) -> float:
    told = number((run.summary or {}).get("totals", {}).get(key))
    return told if told is not None else sum(value for _, value in run.points(key))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _footer(run: Run) -> str:
    """What the numbers depend on besides the settings."""
    summary = run.summary or {}
    parts = [f"{name} {number}" for name, number in summary.get("versions", {}).items()]
    parts += [f"CPU capability {summary['cpu_capability']}"] if "cpu_capability" in summary else []
    parts += [f"threads {summary['threads']}"] if "threads" in summary else []
    parts += [f"adapter SHA-256 {summary['adapter_sha256']}"] if "adapter_sha256" in summary else []
    return f"<footer>{escape(' · '.join(parts))}</footer>" if parts else ""
