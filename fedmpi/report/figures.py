"""The plots of a run: loss, accuracy, bytes and seconds by round, each with its key. It must never know of files."""

from collections.abc import Sequence
from html import escape
from itertools import accumulate

from fedmpi.progress import size
from fedmpi.report.plots import Curve, Text, bars, curves
from fedmpi.report.reading import Line, Run, number

WIDE, HALF = (1040, 380), (510, 300)


def plots(run: Run) -> str:
    """The section with all plots that the run has numbers for."""
    figures = [_losses(run), _accuracy(run), _carried(run, running=False), _carried(run, running=True), _seconds(run)]
    drawn = [figure for figure in figures if figure]
    if not drawn:
        return ""
    return f'<h2>By round</h2>\n<div class="plots">{"".join(drawn)}</div>'


def _losses(run: Run) -> str:
    main = [Curve("training", "line a", run.points("train_loss")), Curve("held-out", "line b", run.points("eval_loss"))]
    main = [curve for curve in main if curve.points]
    keys = [(curve.style.replace("line ", ""), curve.name) for curve in main]
    keys += [("faint", "training, each client")] if run.traces else []
    text = Text("Loss", "loss per token", _all_told(run))
    return _figure("Loss", keys, curves(text, main, run.traces.values(), *WIDE), "wide")


def _all_told(run: Run) -> dict[int, str]:
    return {line["round"]: _told(line) for line in run.lines if line.get("event") in (None, "evaluation")}


def _told(line: Line) -> str:
    """What a round says when it is pointed at."""
    parts = ["before the first round" if line["round"] < 0 else f"round {line['round']}"]
    for key, name, form in (
        ("train_loss", "training loss", "{:.4f}"),
        ("eval_loss", "held-out loss", "{:.4f}"),
        ("eval_token_accuracy", "token accuracy", "{:.1%}"),
        ("seconds", "took", "{:.2f} s"),
        ("wait_s", "of which waiting", "{:.2f} s"),
    ):
        if (value := number(line.get(key))) is not None:
            parts.append(f"{name} {form.format(value)}")
    single = [value for loss in line.get("client_losses", {}).values() if (value := number(loss)) is not None]
    parts += [f"clients' losses {min(single):.4f} to {max(single):.4f}"] if single else []
    parts += [f"{name} {size(line[key])}" for key, name in (("up_bytes", "up"), ("down_bytes", "down")) if key in line]
    if "cohort" in line and "counted" in line:
        parts.append(f"{len(line['counted'])} of {len(line['cohort'])} clients counted")
    return "\n".join(parts)


def _accuracy(run: Run) -> str:
    points = [(index, 100 * value) for index, value in run.points("eval_token_accuracy")]
    text = Text("Held-out token accuracy", "tokens right, %", _all_told(run))
    curve = Curve("token accuracy", "line b", points)
    return _figure("Held-out token accuracy", [], curves(text, [curve] if points else [], (), *HALF))


def _carried(run: Run, running: bool) -> str:
    rounds = [line for line in run.rounds if "up_bytes" in line and "down_bytes" in line]
    parts = [("up_bytes", "up", "a"), ("down_bytes", "down", "b"), ("control_bytes", "control", "c")]
    parts = [part for part in parts if part[0] != "control_bytes" or any(line.get(part[0]) for line in rounds)]
    values = [[number(line.get(key)) or 0.0 for line in rounds] for key, _, _ in parts]
    values = [list(accumulate(each)) for each in values] if running else values
    unit, divisor = _unit(max(map(sum, zip(*values, strict=True)), default=0.0))
    numbers = [line["round"] for line in rounds]
    stack = [
        Curve(name, f"block {style}", [(x, y / divisor) for x, y in zip(numbers, each, strict=True)])
        for (_, name, style), each in zip(parts, values, strict=True)
    ]
    title, axis = ("Bytes sent so far", f"{unit} in all") if running else ("Bytes sent per round", f"{unit} per round")
    told = {index: _sums(index, parts, each) for index, each in zip(numbers, zip(*values, strict=True), strict=True)}
    keys = [(f"block {style}", name) for _, name, style in parts]
    return _figure(title, keys, bars(Text(title, axis, told), numbers, stack, *HALF))


def _sums(index: int, parts: Sequence[tuple[str, str, str]], values: Sequence[float]) -> str:
    told = (f"{name}: {size(value)}" for (_, name, _), value in zip(parts, values, strict=True))
    return "\n".join((f"round {index}", *told))


def _unit(most: float) -> tuple[str, float]:
    """The unit that the bars are counted in, as `progress.size` picks it."""
    exponent = next((power for power in (3, 2, 1) if most >= 1000**power), 0)
    return ("bytes", "kB", "MB", "GB")[exponent], 1000.0**exponent


def _seconds(run: Run) -> str:
    rounds = [line for line in run.rounds if number(line.get("seconds")) is not None]
    numbers = [line["round"] for line in rounds]
    wait = [number(line.get("wait_s")) or 0.0 for line in rounds]
    rest = [max(0.0, line["seconds"] - waited) for line, waited in zip(rounds, wait, strict=True)]
    stack = [
        Curve("at work", "block a", list(zip(numbers, rest, strict=True))),
        Curve("waiting for clients", "block c", list(zip(numbers, wait, strict=True))),
    ]
    keys = [(curve.style, curve.name) for curve in stack]
    text = Text("Seconds per round", "seconds", {line["round"]: _told(line) for line in rounds})
    return _figure(text.title, keys, bars(text, numbers, stack, *HALF))


def _figure(title: str, keys: Sequence[tuple[str, str]], picture: str, kind: str = "") -> str:
    if not picture:
        return ""
    legend = "".join(f'<span class="key"><i class="{style}"></i>{escape(name)}</span>' for style, name in keys)
    caption = f"<figcaption><h3>{escape(title)}</h3>{legend}</figcaption>"
    return f'<figure class="card {kind}">{caption}<div class="scroll">{picture}</div></figure>\n'
