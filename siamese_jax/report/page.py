"""The parts of a page: text made safe, tables, nested facts, and the shell around them."""

import html
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from siamese_jax.report.style import CSS, SCRIPT


def escape(value: object) -> str:
    """Any value as text that cannot be taken for markup.

    >>> escape('<b> & "c"')
    '&lt;b&gt; &amp; &quot;c&quot;'
    """
    return html.escape(str(value), quote=True)


def is_number(value: object) -> bool:
    """Whether it is a measure or a count: NumPy's numbers too, truth values not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def number(value: object) -> str:
    """A number as people read it: counts whole, measures with four places or digits.

    >>> number(965), number(0.48123456), number(1.25e-7), number(True)
    ('965', '0.4812', '1.25e-07', 'True')
    """
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-4 <= abs(value) <= 1 or value == 0 else f"{value:.4g}"
    return str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int = 1) -> str:
    """A table of cells that are already markup; columns from `numbers_from` on align right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ['class="number"' if i >= numbers_from else "" for i in range(len(cells))]
        return "".join(f"<{tag} {k}>{c}</{tag}>" for k, c in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{line('th', header)}</tr></thead><tbody>{body}</tbody></table>"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as (dotted name, value) pairs, in their own order.

    >>> flatten({"loss": {"name": "triplet", "margin": 0.2}, "seed": 1})
    [('loss.name', 'triplet'), ('loss.margin', 0.2), ('seed', 1)]
    """
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            pairs += flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def facts(tree: Mapping[str, Any]) -> str:
    """A two-column table of nested facts, every value in full."""
    rows = "".join(
        f'<tr><td class="soft">{escape(name)}</td>'
        f'<td class="mono">{escape(number(value))}</td></tr>'
        for name, value in flatten(tree)
    )
    return f"<table>{rows}</table>"


def section(heading: str, body: str) -> str:
    """One section of HTML: a heading, which is escaped, and a body, which is HTML already."""
    return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def page(
    title: str, body: Iterable[str], *, subtitle: str = "", warnings: Iterable[str] = ()
) -> str:
    """One whole HTML page: no address is loaded from anywhere, a policy in its head forbids it."""
    loud = "".join(f'<p class="warning" role="alert">⚠ {escape(text)}</p>' for text in warnings)
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>{loud}'
        f"{''.join(body)}</main><script>{SCRIPT}</script></body></html>\n"
    )
