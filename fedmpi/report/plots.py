"""Numbers over rounds as small SVG pictures: curves and stacked bars. Pure; it never knows what the numbers mean."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

LEFT, RIGHT, TOP, BOTTOM = 60, 14, 14, 48  # room around the picture for ticks and axis titles
LEAST_LABEL_GAP = 40  # between two labels on the x axis
Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """A named line; `style` is its CSS class."""

    name: str
    style: str
    points: Points


@dataclass(frozen=True)
class Text:
    """What stands around a picture."""

    title: str
    y_axis: str
    told: Mapping[int, str]  # what a round says when it is pointed at


@dataclass(frozen=True)
class Frame:
    """From rounds and values to places in the picture."""

    width: int
    height: int
    first: float
    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        """Across."""
        return LEFT + (value - self.first) / (self.last - self.first) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Down, since SVG counts from the top."""
        return self.height - BOTTOM - (value - self.low) / (self.high - self.low) * (self.height - TOP - BOTTOM)


def curves(text: Text, main: Sequence[Curve], thin: Iterable[Points], width: int, height: int) -> str:
    """Main lines over any number of thin ones; single points become dots, gaps are bridged."""
    below = [points for points in thin if points]
    everything = [point for points in [*below, *(curve.points for curve in main)] for point in points]
    if not everything:
        return ""
    rounds, values = [x for x, _ in everything], [y for _, y in everything]
    pad = 0.5 if min(rounds) == max(rounds) else 0.0
    levels = ticks(min(values), max(values), 6, around=True)
    frame = Frame(width, height, min(rounds) - pad, max(rounds) + pad, levels[0], levels[-1])
    strength = max(0.12, min(0.55, 3 / max(1, len(below))))
    faint = "".join(f'<path d="{_path(frame, points)}"{_dot(points)}/>' for points in below)
    drawn = "".join(_curve(frame, curve) for curve in main)
    body = f'<g class="thin" stroke-opacity="{strength:.2f}">{faint}</g>{drawn}'
    told = "; ".join(_ends(curve) for curve in main if curve.points)
    return _svg(frame, text, f"{text.title}. {told}", levels, sorted(set(rounds)), body)


def _curve(frame: Frame, curve: Curve) -> str:
    near = len(curve.points) * 14 < frame.width  # enough room for a dot per round
    dots = "".join(f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5"/>' for x, y in curve.points) if near else ""
    return f'<g class="{curve.style}"><path d="{_path(frame, curve.points)}"/>{dots}</g>'


def _path(frame: Frame, points: Points) -> str:
    places = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points]
    return "M" + "L".join(places) + ("h0" if len(places) == 1 else "")  # a round line cap makes a dot of it


def _dot(points: Points) -> str:
    return ' class="dot"' if len(points) == 1 else ""


def _ends(curve: Curve) -> str:
    (first, start), (last, end) = curve.points[0], curve.points[-1]
    return f"{curve.name}: {start:.4g} in round {first}, {end:.4g} in round {last}"


def bars(text: Text, rounds: Sequence[int], stack: Sequence[Curve], width: int, height: int) -> str:
    """A bar per round, its parts on top of each other; all parts have a point for every one of `rounds`."""
    if not rounds:
        return ""
    highest = max(sum(values) for values in zip(*([y for _, y in part.points] for part in stack), strict=True))
    levels = ticks(0.0, highest or 1.0, 5, around=True)
    frame = Frame(width, height, rounds[0] - 0.6, rounds[-1] + 0.6, 0.0, levels[-1])
    thick = min(44.0, 0.78 * (frame.x(1) - frame.x(0)))
    base = [0.0] * len(rounds)
    body = ""
    for part in stack:
        top = [low + y for low, (_, y) in zip(base, part.points, strict=True)]
        shape = _columns(frame, rounds, base, top, thick) if thick > 2 else _steps(frame, rounds, base, top)
        body += f'<path class="{part.style}" d="{shape}"/>'
        base = top
    told = "; ".join(_ends(part) for part in stack)
    return _svg(frame, text, f"{text.title}, {text.y_axis}. {told}", levels, rounds, body)


def _columns(frame: Frame, rounds: Sequence[int], low: Sequence[float], high: Sequence[float], thick: float) -> str:
    return "".join(
        f"M{frame.x(x) - thick / 2:.1f} {frame.y(foot):.1f}V{frame.y(head):.1f}h{thick:.2f}V{frame.y(foot):.1f}z"
        for x, foot, head in zip(rounds, low, high, strict=True)
    )


def _steps(frame: Frame, rounds: Sequence[int], low: Sequence[float], high: Sequence[float]) -> str:
    """One outline around all columns: where they are thinner than a pixel or two, seams between them would be all one sees."""
    there = "".join(f"V{frame.y(y):.1f}H{frame.x(x + 0.5):.1f}" for x, y in zip(rounds, high, strict=True))
    back = [f"V{frame.y(y):.1f}H{frame.x(x - 0.5):.1f}" for x, y in zip(rounds, low, strict=True)]
    return f"M{frame.x(rounds[0] - 0.5):.1f} {frame.y(low[0]):.1f}{there}{''.join(reversed(back))}z"


def ticks(low: float, high: float, wanted: int, around: bool = False, least: float = 0.0) -> list[float]:
    """Round values between two numbers, or, with `around`, from just below the one to just above the other."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = max(least, next(m * power for m in (1, 2, 2.5, 5, 10, 20) if span / (m * power) <= wanted))
    first, last = low / step, high / step
    start = math.floor(first + 1e-9) if around else math.ceil(first - 1e-9)
    stop = math.ceil(last - 1e-9) if around else math.floor(last + 1e-9)
    if around and start == stop:
        stop += 1
    return [position * step for position in range(start, stop + 1)]


def _svg(frame: Frame, text: Text, told: str, levels: Sequence[float], rounds: Sequence[int], body: str) -> str:
    size = f'viewBox="0 0 {frame.width} {frame.height}" style="min-width:{max(400, frame.width * 3 // 4)}px"'
    return (
        f'<svg role="img" aria-label="{escape(told)}" {size}>{_y_axis(frame, text.y_axis, levels)}'
        f"{_x_axis(frame)}{body}{_hits(frame, rounds, text.told)}</svg>"
    )


def _y_axis(frame: Frame, name: str, levels: Sequence[float]) -> str:
    end, middle = frame.width - RIGHT, (TOP + frame.height - BOTTOM) / 2
    marks = "".join(
        f'<path class="grid" d="M{LEFT} {frame.y(level):.1f}H{end}"/>'
        f'<text x="{LEFT - 8}" y="{frame.y(level) + 4.5:.1f}" text-anchor="end">{plain(level, levels[1] - levels[0])}</text>'
        for level in levels
    )
    return (
        f'{marks}<text class="axis" transform="translate(15 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(name)}</text>'
    )


def _x_axis(frame: Frame) -> str:
    foot, room = frame.height - BOTTOM, (frame.x(1) - frame.x(0))
    wanted = max(1, min(12, (frame.width - LEFT - RIGHT) // LEAST_LABEL_GAP))
    places = [x for x in ticks(max(0.0, frame.first), max(1.0, frame.last), wanted, least=1.0) if x <= frame.last and x == int(x)]
    labels = [(x, f"{x:.0f}") for x in places]
    if frame.first <= -1 and (room >= LEAST_LABEL_GAP or frame.last < 0):
        labels.append((-1.0, "start"))
    marks = "".join(
        f'<path class="tick" d="M{frame.x(x):.1f} {foot}v5"/>'
        f'<text x="{frame.x(x):.1f}" y="{foot + 19}" text-anchor="middle">{label}</text>'
        for x, label in labels
    )
    axis = f'<path class="tick" d="M{LEFT} {foot}H{frame.width - RIGHT}"/>'
    middle = (LEFT + frame.width - RIGHT) / 2
    return f'{axis}{marks}<text class="axis" x="{middle:.0f}" y="{frame.height - 8}" text-anchor="middle">round</text>'


def _hits(frame: Frame, rounds: Sequence[int], told: Mapping[int, str]) -> str:
    """An invisible column per round that says the round's numbers when it is pointed at; no script is needed for it."""
    edges = [frame.first, *((a + b) / 2 for a, b in pairwise(rounds)), frame.last]
    height = frame.height - TOP - BOTTOM
    return "".join(
        f'<rect class="hit" x="{frame.x(left):.1f}" y="{TOP}" width="{frame.x(right) - frame.x(left):.1f}" height="{height}">'
        f"<title>{escape(told.get(index, f'round {index}'))}</title></rect>"
        for index, (left, right) in zip(rounds, pairwise(edges), strict=True)
    )


def plain(value: float, step: float) -> str:
    """A tick's number with the digits that its neighbours need."""
    if step >= 1e6 or step < 1e-5:
        return f"{value:.3g}".replace("-", "−")
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += 0 if abs(step * 10**digits - round(step * 10**digits)) < 1e-6 else 1  # 2.5 needs one more than 2
    return f"{value:,.{digits}f}".replace("-", "−")
