"""Draw the pictures of the pages as SVG: `scripts/docs --write` writes them to `docs/images`."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs" / "images"
INK, PAPER, LINE = "#1d2b2a", "#ffffff", "#b9c6c4"
BASE, PREFIX, SUFFIX, TOKEN = "#e9efee", "#00897b", "#ef6c00", "#f6f8f8"
ADAPTERS = ("#00897b", "#ef6c00", "#5e35b1")
FONT = "font-family='Helvetica,Arial,sans-serif'"


def rect(
    x: float, y: float, w: float, h: float, fill: str, stroke: str = LINE, radius: float = 3
) -> str:
    """A box."""
    return f"<rect x='{x}' y='{y}' width='{w}' height='{h}' rx='{radius}' fill='{fill}' stroke='{stroke}'/>"


def text(
    x: float,
    y: float,
    said: str,
    size: int = 13,
    anchor: str = "start",
    fill: str = INK,
    weight: int = 400,
) -> str:
    """A line of text with its baseline at y."""
    return (
        f"<text x='{x}' y='{y}' font-size='{size}' text-anchor='{anchor}' fill='{fill}' font-weight='{weight}'>"
        f"{escape(said)}</text>"
    )


def arrow(x1: float, y1: float, x2: float, y2: float, *, both: bool = False) -> str:
    """A line with a head at its end, or at both."""
    start = " marker-start='url(#head)'" if both else ""
    return f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='{INK}' stroke-width='1.3' marker-end='url(#head)'{start}/>"


def page(width: int, height: int, title: str, *parts: str) -> str:
    """A whole picture; `title` is for those who do not see it."""
    head = (
        "<marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto-start-reverse'>"
        f"<path d='M0 0 L8 4 L0 8 z' fill='{INK}'/></marker>"
    )
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' {FONT}>",
            f"<title>{escape(title)}</title><defs>{head}</defs>",
            f"<rect width='{width}' height='{height}' fill='{PAPER}'/>",
            *parts,
            "</svg>\n",
        ]
    )


def edits() -> str:
    """Which hidden states an adapter changes: a grid of layers over tokens."""
    words = ["You", "are", "a", "helpful", "guide", ".", "Where", "now", "?", "Go", "north", "to"]
    prompt, prefix, suffix, layers, left, top, size = 9, 2, 2, 6, 120, 62, 46
    parts = [
        text(
            20,
            30,
            "One request to an adapter with positions f2+l2 at layers 2, 4 and 5",
            16,
            weight=700,
        )
    ]
    for layer in range(layers):
        y = top + (layers - 1 - layer) * 30
        parts.append(text(left - 12, y + 19, f"layer {layer}", 12, "end"))
        for i in range(len(words)):
            first, last = i < prefix, prompt - suffix <= i < prompt
            edited = layer in (2, 4, 5) and (first or last)
            fill = (PREFIX if first else SUFFIX) if edited else BASE if i < prompt else TOKEN
            parts.append(rect(left + i * size, y, size - 6, 24, fill))
    base = top + layers * 30
    for i, word in enumerate(words):
        parts.append(
            text(
                left + i * size + 20,
                base + 16,
                word,
                12,
                "middle",
                weight=700 if i < prompt else 400,
            )
        )
    split = left + prompt * size - 3
    parts += [
        f"<line x1='{split}' y1='{top - 8}' x2='{split}' y2='{base + 26}' stroke='{INK}' stroke-dasharray='4 4'/>",
        text(left, base + 42, "prompt: read once"),
        text(split + 8, base + 42, "generated: not edited, no work at all"),
        rect(left, base + 62, 18, 14, PREFIX),
        text(left + 26, base + 74, "first tokens, edited"),
        rect(left + 170, base + 62, 18, 14, SUFFIX),
        text(left + 196, base + 74, "last tokens, edited"),
        rect(left + 340, base + 62, 18, 14, BASE),
        text(left + 366, base + 74, "the base model's own"),
        rect(700, top, 238, 150, TOKEN),
        text(716, top + 28, "An edit (LoReFT)", 14, weight=700),
        text(716, top + 58, "h  →  h + Rᵀ (W h + b − R h)", 15),
        text(716, top + 86, "R: rank × width, orthonormal rows", 12),
        text(716, top + 106, "W, b: what was learned", 12),
        text(716, top + 132, "All weights of the model stay.", 12),
    ]
    return page(
        960,
        350,
        "An adapter edits a few prompt tokens at a few layers, and no generated token",
        *parts,
    )


def prefixes() -> str:
    """Which cached blocks requests of several adapters share."""
    left, top, wide, high, blocks = 210, 84, 84, 34, 7
    names = ("base model", "adapter A, l2", "adapter B, l2", "adapter C, f2+l2")
    colours = (BASE, ADAPTERS[0], ADAPTERS[1], ADAPTERS[2])
    parts = [
        text(
            20,
            30,
            "One system prompt, four models, and the blocks of the prefix cache",
            16,
            weight=700,
        )
    ]
    parts.append(text(left, 62, "← one system prompt, the same for all →", 13))
    parts.append(text(left + 5 * wide + 8, 62, "each caller's question", 13))
    for row, (name, own) in enumerate(zip(names, colours, strict=True)):
        y = top + row * (high + 14)
        parts.append(text(left - 14, y + 22, name, 13, "end", weight=700))
        for block in range(blocks):
            keyed = row and (block == blocks - 1 or row == 3)
            fill = own if keyed else BASE
            said = "own" if keyed or block >= 5 else "shared"
            parts.append(rect(left + block * wide, y, wide - 6, high, fill))
            ink = PAPER if keyed else INK
            parts.append(
                text(left + block * wide + (wide - 6) / 2, y + 22, said, 12, "middle", ink)
            )
    below = top + 4 * (high + 14) + 18
    parts += [
        text(
            20,
            below,
            "A and B edit the prompt's end only: the system prompt is computed once, for them and the base.",
        ),
        text(
            20,
            below + 22,
            "C edits the first tokens as well: all of its blocks are its own. A LoRA's always are.",
        ),
    ]
    return page(
        830,
        340,
        "Adapters that edit only the end of the prompt share the cached system prompt",
        *parts,
    )


def processes() -> str:
    """The three processes and the two places that they share."""

    def box(x: int, y: int, name: str, *lines: str, fill: str = BASE) -> str:
        texts = [text(x + 14, y + 50 + 19 * i, line, 12) for i, line in enumerate(lines)]
        return "".join(
            [rect(x, y, 230, 84, fill, INK, 6), text(x + 14, y + 26, name, 15, weight=700), *texts]
        )

    return page(
        880, 310, "Clients speak to gateways, gateways to engines; store and database are shared",
        box(20, 20, "clients", "openai package, curl, ...", "one key per tenant", fill=PAPER),
        box(320, 20, "gateway", "keys, tenants, limits, routing", "usage, jobs; needs no torch"),
        box(630, 20, "engine", "vllm serve with our plugin", "adapters in slots"),
        box(20, 206, "training worker", "claims jobs, trains adapters", "resumes after a kill"),
        box(320, 206, "database", "tenants, keys, jobs, usage", "SQLite or PostgreSQL", fill=PAPER),
        box(630, 206, "adapter store", "immutable versions,", "named by their digest", fill=PAPER),
        arrow(250, 62, 316, 62), arrow(550, 62, 626, 62), arrow(435, 108, 435, 202, both=True),
        arrow(545, 108, 640, 202, both=True), arrow(745, 202, 745, 108), arrow(254, 248, 316, 248, both=True),
        f"<path d='M135 292 V302 H745 V294' fill='none' stroke='{INK}' stroke-width='1.3' marker-end='url(#head)'/>",
    )  # fmt: skip


PICTURES: dict[str, Callable[[], str]] = {
    "edits": edits,
    "prefixes": prefixes,
    "processes": processes,
}


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (IMAGES / f"{name}.svg").write_text(draw())


if __name__ == "__main__":
    main()
