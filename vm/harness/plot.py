"""Line plots as SVG that can be read on light and dark pages."""

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 44
LEGEND = 20
COLOURS = ("#d1495b", "#2e86ab", "#3a9d5d", "#b8860b", "#8e5ea2", "#777777")
STYLE = """
text { font: 13px sans-serif; fill: #222 }
.axis { stroke: #888 } .grid { stroke: #8884 } .title { font-size: 15px; font-weight: bold }
@media (prefers-color-scheme: dark) { text { fill: #ddd } }
"""


def plot(title: str, series: Mapping[str, tuple[Sequence[tuple[int, float]], bool]]) -> str:
    """`series` is name to (points, dashed). The x axis is logarithmic with a mark for each value."""
    marks = sorted({x for points, _ in series.values() for x, _ in points}) or [1]
    top = nice(max((y for points, _ in series.values() for _, y in points), default=1))
    bottom = HEIGHT + LEGEND * len(series)
    span = math.log2(marks[-1] / marks[0]) or 1

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(x / marks[0]) / span

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * max(y, 0) / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" role="img">',
        f'<style>{STYLE}</style><text class="title" x="{LEFT}" y="22">{html.escape(title)}</text>',
    ]
    for step in range(6):
        y = top * step / 5
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    for x in marks:
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{x}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(0):.1f}" y2="{down(0):.1f}"/>')
    # A dashed line has the colour of the one before it, whose counterpart it is.
    colour = -1
    for number, (name, (points, dashed)) in enumerate(series.items()):
        colour += 0 if dashed and number and len(series) > 3 else 1
        stroke = f'stroke="{COLOURS[colour % len(COLOURS)]}" stroke-width="2"' + (
            ' stroke-dasharray="5 4"' if dashed else ""
        )
        line = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        place = HEIGHT + LEGEND * number
        parts.append(
            f'<polyline fill="none" {stroke} points="{line}"/>'
            f'<line x1="{LEFT}" x2="{LEFT + 30}" y1="{place}" y2="{place}" {stroke}/>'
            f'<text x="{LEFT + 40}" y="{place + 4}">{html.escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def nice(value: float) -> float:
    """The next round number above a value."""
    power = 10 ** math.floor(math.log10(max(value, 1e-9)))
    return next(step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * power >= value)
