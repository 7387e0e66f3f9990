"""Plots as inline SVG text: lines of a run over its steps, and accuracy against speed."""

import itertools
import math
from collections.abc import Mapping, Sequence

from siamese_jax.report.page import escape
from siamese_jax.storage.json_files import json_text

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 12.0, 8.0, 22.0
Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float) -> list[float]:
    """At least three round numbers within [low, high]: multiples of 1, 2 or 5 times 10^n.

    >>> ticks(0.0, 0.97), ticks(0.42, 0.51)
    ([0.0, 0.2, 0.4, 0.6, 0.8], [0.42, 0.44, 0.46, 0.48, 0.5])
    """
    if not high > low:
        return [low]
    power = 10.0 ** math.ceil(math.log10(high - low))
    for step in (m * power / 10**d for d in range(4) for m in (1, 0.5, 0.2)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 >= 3:
            break
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def smooth(points: Points, weight: float = 0.9) -> list[tuple[float, float]]:
    """The exponential moving average, without the pull towards zero at its start.

    s_t = weight * s_{t-1} + (1 - weight) * y_t,   shown: s_t / (1 - weight^t)

    >>> smooth([(0, 3.0), (1, 3.0)])
    [(0, 3.0), (1, 3.0)]
    """
    total, out = 0.0, []
    for t, (x, y) in enumerate(points, start=1):
        total = weight * total + (1 - weight) * y
        out.append((x, float(f"{total / (1 - weight**t):.12g}")))
    return out


def is_noisy(points: Points) -> bool:
    """Whether a line of many points goes up and down far more than it gets anywhere."""
    ys = [y for _, y in points]
    travelled = sum(abs(b - a) for a, b in itertools.pairwise(ys))
    return len(ys) > 60 and travelled > 3 * (max(ys) - min(ys))


def thin(points: Points, limit: int = 300) -> Points:
    """At most `limit` of the points, evenly, the first and the last among them."""
    if len(points) <= limit:
        return points
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


class _Axes:
    """Maps data to the drawing, and draws the grid with its numbers."""

    def __init__(self, points: Points, size: tuple[float, float], *, log_x: bool = False) -> None:
        (self.width, self.height), self.log_x = size, log_x
        xs, ys = [self._x(x) for x, _ in points], [y for _, y in points]
        self.x0, self.x1 = min(xs), max(xs)
        self.y0, self.y1 = min(ys), max(ys)
        if self.x1 == self.x0:
            self.x0, self.x1 = self.x0 - 0.5, self.x1 + 0.5
        slack = 0.06 * (self.y1 - self.y0) or 0.05 * abs(self.y1) or 1.0
        # A measure that never goes below zero keeps zero as its floor.
        low = self.y0 - slack
        self.y0, self.y1 = (max(low, 0.0) if self.y0 >= 0 else low), self.y1 + slack

    def _x(self, x: float) -> float:
        return math.log10(max(x, 1e-12)) if self.log_x else x

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (self._x(x) - self.x0) / (self.x1 - self.x0)
        up = (y - self.y0) / (self.y1 - self.y0)
        return (
            round(LEFT + across * (self.width - LEFT - RIGHT), 1),
            round(TOP + (1 - up) * (self.height - TOP - BOTTOM), 1),
        )

    def draw(self) -> str:
        parts, floor, edge = [], self.height - BOTTOM, self.width - RIGHT
        for y in ticks(self.y0, self.y1):
            py = self.place(10**self.x0 if self.log_x else self.x0, y)[1]
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{edge}" y1="{py}" y2="{py}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{py + 3}" text-anchor="end">{_short(y)}</text>')
        if self.log_x:
            decades = range(math.floor(self.x0) - 1, math.ceil(self.x1) + 1)
            numbers = [m * 10.0**d for d in decades for m in (1, 2, 5)]
            xs = [x for x in numbers if self.x0 <= math.log10(x) <= self.x1]
            if len(xs) < 3:  # A range too narrow for 1, 2 and 5 to say where it is.
                xs = ticks(10**self.x0, 10**self.x1)
        else:
            xs = ticks(self.x0, self.x1)
        for x in xs:
            px = self.place(x, self.y0)[0]
            parts.append(f'<text x="{px}" y="{floor + 15}" text-anchor="middle">{_short(x)}</text>')
        return "".join(parts)


def _path(axes: _Axes, points: Points, style: str) -> str:
    places = " L".join(f"{px} {py}" for px, py in (axes.place(x, y) for x, y in points))
    return f'<path class="{style}" d="M{places}"/>'


def line_chart(title: str, series: Mapping[str, Points]) -> str:
    """One chart of named series over the step; long noisy ones get a smoothed line on top.

    Values that are not finite are left out; a series without finite values is named as such.
    """
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()
    }
    drawn = {name: points for name, points in finite.items() if points}
    if not drawn:
        return f'<div class="card plot"><h3>{escape(title)}</h3><p>no finite value</p></div>'
    axes = _Axes([p for points in drawn.values() for p in points], (WIDTH, HEIGHT))
    lines, legend, hover = [], [], []
    for i, (name, points) in enumerate(drawn.items()):
        colour, thinned = f"s{i % 6}", thin(points)
        if is_noisy(points):
            lines.append(_path(axes, thinned, f"{colour} raw"))
            thinned = thin(smooth(points))
        lines.append(_path(axes, thinned, colour))
        if len(points) <= 30:
            dots = (axes.place(x, y) for x, y in points)
            lines += [f'<circle class="{colour}" r="2.4" cx="{px}" cy="{py}"/>' for px, py in dots]
        legend.append(f'<b class="{colour}">{escape(name)} {points[-1][1]:.4g}</b>')
        where = [(*axes.place(x, y), x, y) for x, y in thinned]
        hover.append(
            {"name": name, "points": [[px, f"{x:g}", f"{y:.4g}"] for px, _, x, y in where]}
        )
    cursor = (
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0" '
        'style="visibility:hidden"/>'
    )
    return (
        f'<div class="card plot" data-series="{escape(json_text(hover))}"><h3>{escape(title)}</h3>'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(title)} by step">'
        f"{axes.draw()}{''.join(lines)}{cursor}</svg>"
        f'<div class="readout">last: {" ".join(legend)}</div></div>'
    )


def pareto_front(points: Points) -> list[int]:
    """Indices of the points that no other one beats: none is as good in both and better in one.

    >>> pareto_front([(1.0, 0.9), (2.0, 0.5), (3.0, 0.7)])
    [0, 2]
    """

    def beaten(i: int) -> bool:
        x, y = points[i]
        return any(a >= x and b >= y and (a > x or b > y) for a, b in points)

    return [i for i in range(len(points)) if not beaten(i)]


def pareto_plot(
    title: str, points: Points, names: Sequence[str], groups: Sequence[str], *, x: str, y: str
) -> str:
    """Accuracy (up) against speed (right, logarithmic), the undominated ones joined by a line."""
    axes = _Axes(points, (960.0, 400.0), log_x=True)
    colours = {group: f"s{i % 6}" for i, group in enumerate(dict.fromkeys(groups))}
    front = sorted(pareto_front(points), key=lambda i: points[i])
    parts = [axes.draw(), _path(axes, [points[i] for i in front], "frontier")]
    labels: dict[tuple[float, float], list[str]] = {}
    for i, point in enumerate(points):
        (px, py), best = axes.place(*point), i in front
        style = colours[groups[i]] + ("" if best else " dominated")
        tip = f"{names[i]}: {y} {point[1]:.4g}, {point[0]:.4g} {x}"
        parts.append(
            f'<circle class="{style}" r="{6 if best else 4}" cx="{px}" cy="{py}">'
            f"<title>{escape(tip)}</title></circle>"
        )
        if best:
            labels.setdefault((px, py), []).append(names[i])
    for (px, py), equal in labels.items():  # One line for all that fall on the same point.
        side, dx = ("end", -9) if px > 0.6 * 960 else ("start", 9)
        parts.append(
            f'<text class="name" x="{px + dx}" y="{py - 6}" text-anchor="{side}">'
            f"{escape(', '.join(equal))}</text>"
        )
    key = " ".join(f'<b class="{style}">● {escape(group)}</b>' for group, style in colours.items())
    return (
        f'<div class="card plot"><h3>{escape(title)}</h3><svg viewBox="0 0 960 400" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<div class="readout">up: {escape(y)}; right: {escape(x)} (logarithmic); '
        f"dashed: those that no other one beats &nbsp; {key}</div></div>"
    )
