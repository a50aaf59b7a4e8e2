"""One HTML file without outside links: tables and pictures are inside. Whatever comes from data is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

THUMBNAIL, QUALITY = 96, 80
STYLE = (
    "body{font:15px sans-serif;margin:2em auto;max-width:72em;color:#222}table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right;font-weight:normal}"
    "td:first-child,th:first-child{text-align:left}img{margin:2px;vertical-align:middle}p.row{margin:.2em 0}"
    "figure{display:inline-block;margin:4px;width:120px;vertical-align:top;font-size:12px}"
)
Section = tuple[str, str]
"""A heading, and HTML."""


def data_uri(content: bytes, kind: str) -> str:
    """A file's content as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(encoded: bytes) -> str:
    """A small JPEG of an image, as a data URI; a grey one where Pillow cannot decode what DALI can."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
    except Exception:  # Pillow raises many kinds
        image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "grey")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return data_uri(buffer.getvalue(), "jpeg")


def shown(value: Any) -> str:
    """A figure as tables show it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
    return str(value)


def table(rows: dict[str, Any]) -> str:
    """A line a figure."""
    return grid([[name, shown(value)] for name, value in rows.items()])


def grid(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A table of texts, a header above it where one is given."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    lines = [f"<tr>{head}</tr>"] if header else []
    lines += ["<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def pictures(caption: str, uris: Sequence[str]) -> str:
    """A line of thumbnails."""
    return f"<p class=row>{html.escape(caption)}</p><p>{''.join(f'<img src={chr(34)}{u}{chr(34)}>' for u in uris)}</p>"


def captioned(uris: Sequence[str], captions: Sequence[str]) -> str:
    """A line of thumbnails, each with a text below."""
    pairs = zip(uris, captions, strict=True)
    return "".join(
        f'<figure><img src="{uri}"><figcaption>{html.escape(text)}</figcaption></figure>' for uri, text in pairs
    )


def page(title: str, parts: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole file: a title, parts of HTML, then sections."""
    name = html.escape(title)
    lines = [f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style><h1>{name}</h1>", *parts]
    lines += [f"<h2>{html.escape(heading)}</h2>{body}" for heading, body in sections]
    return "\n".join(lines) + "\n"
