"""Pictures as SVG: without a background, in colours that a light page and a dark one can show."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

TEXT, GREY, OURS = "#757d87", "#9aa4af", "#2f81f7"
FONT = "-apple-system, Segoe UI, Helvetica, Arial, sans-serif"


def picture(width: int, height: int, parts: Sequence[str]) -> str:
    """Return the whole file."""
    frame = f'viewBox="0 0 {width} {height}" font-family="{FONT}" font-size="12" fill="{TEXT}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>', *parts, "</svg>\n"])


def title(x: float, head: str, below: str) -> list[str]:
    return [
        f'<text x="{x:g}" y="18" font-size="15" font-weight="600">{escape(head)}</text>',
        text(x, 38, below, "start"),
    ]


def text(x: float, y: float, words: str, anchor: str, colour: str = TEXT) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(words)}</text>"


def line(
    points: Sequence[tuple[float, float]], colour: str, opacity: float, width: float = 1
) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = f'fill="none" stroke="{colour}" stroke-opacity="{opacity:g}" stroke-width="{width:g}"'
    return f'<polyline points="{places}" {style}/>'


def dot(x: float, y: float, colour: str, radius: float = 4) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>'


def bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    size = f'width="{width:.1f}" height="{height:.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} rx="2" fill="{colour}"/>'
