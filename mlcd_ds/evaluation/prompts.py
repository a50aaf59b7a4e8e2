"""Class names and text templates, read from files: what turns labels into texts.

Templates hold {} (or {c}, as in CLIP_benchmark's files) where the name goes. CLIP's own lie in templates/.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mlcd_ds.artefacts.readers import decoding, read_bytes, read_json
from mlcd_ds.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
NAMED_TEMPLATES = ("clip_80", "clip_7")
PLACEHOLDER = "{}"
NAMES_FIX = "Class names are a JSON list, or a .txt file with one a line, in the order of the labels."
TEMPLATES_FIX = f"Templates are {', '.join(NAMED_TEMPLATES)}, or a file with one a line."


def filled(template: str, name: str) -> str:
    """The template's text about a class. Names are taken literally, braces and all."""
    return template.replace(PLACEHOLDER, name)


def read_names(path: Path) -> list[str]:
    """Class names in the order of the labels: a JSON list, or one a line of a .txt file."""
    names = _lines(path, NAMES_FIX) if path.suffix == ".txt" else read_json(path, NAMES_FIX)
    if not isinstance(names, list) or not names:
        raise UserError(f"class names {path} is no list of names. {NAMES_FIX}")
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"class names {path}: the name of label {number} is {str(name)[:50]!r}. {NAMES_FIX}")
    return names


def read_templates(given: str) -> list[str]:
    """Templates with {} for the name: those of a name in NAMED_TEMPLATES, or the lines of a file."""
    path = TEMPLATES / f"{given}.txt" if given in NAMED_TEMPLATES else Path(given)
    templates = [line.replace("{c}", PLACEHOLDER) for line in _lines(path, TEMPLATES_FIX)]
    if not templates:
        raise UserError(f"templates {path} has no template. {TEMPLATES_FIX}")
    for number, template in enumerate(templates, 1):
        rest = template.replace(PLACEHOLDER, "")
        if rest == template or re.search("[{}]", rest):
            raise UserError(
                f"templates {path}: template {number}, {template[:80]!r}, must have {{}} (or {{c}}) where the name "
                "goes, and no other braces."
            )
    return templates


def _lines(path: Path, fix: str) -> list[str]:
    """Lines of a text file without surrounding space; empty ones are left out."""
    content = read_bytes(path, fix)
    with decoding(path, fix):
        lines: Sequence[str] = content.decode("utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]
