"""Captions as they lie in shards: which of them can be used, and their text.

A sample's `.txt` member is UTF-8. Web captions are alt texts of pages, so HTML entities become the characters that
they stand for.
"""

from __future__ import annotations

import html
from typing import Literal

USABLE, MISSING, EMPTY, NOT_UTF8 = range(4)
"""What `NAME.captions.npy` holds of each sample."""
REASONS = {MISSING: "missing", EMPTY: "empty", NOT_UTF8: "not UTF-8"}
CaptionForm = Literal["whole", "lines"]


def caption_state(content: bytes | None) -> int:
    """Whether a member's content is a usable caption, or why not."""
    if content is None:
        return MISSING
    try:
        return USABLE if caption_text(content) else EMPTY
    except UnicodeDecodeError:
        return NOT_UTF8


def caption_text(content: bytes) -> str:
    """The whole member as one text. Raises UnicodeDecodeError."""
    return _plain(content.decode("utf-8-sig"))


def caption_lines(content: bytes) -> list[str]:
    """One caption a line, empty ones left out. Raises UnicodeDecodeError."""
    lines = (_plain(line) for line in content.decode("utf-8-sig").splitlines())
    return [line for line in lines if line]


def _plain(text: str) -> str:
    """Entities resolved (twice, as pages are often escaped twice), white space joined."""
    if "&" in text:
        text = html.unescape(html.unescape(text))
    return " ".join(text.split())
