"""What a classifier takes for what, as HTML: names that look like HTML, classes without images, many classes."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import torch
from PIL import Image

from mlcd_ds.artefacts.html_page import captioned, page, table
from mlcd_ds.evaluation.class_page import MAX_TABLE, class_sections, spread

NAMES = ["cat", "<b>dog</b>", "bird"]
CONFUSION = torch.tensor([[6, 2, 0], [1, 9, 0], [0, 0, 0]])


def cells(html: str) -> list[list[str]]:
    lines = re.findall(r"<tr>(.*?)</tr>", html)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line) for line in lines]


def test_best_worst_and_confusions() -> None:
    sections = dict(class_sections(CONFUSION, NAMES, num_times=2))
    dog = "&lt;b&gt;dog&lt;/b&gt;"
    wanted = [[dog, "5", "90.0 %", "cat (10.0 %)"], ["cat", "4", "75.0 %", f"{dog} (25.0 %)"]]
    assert cells(sections["Best classes"])[1:] == wanted and cells(sections["Worst classes"])[1:] == wanted[::-1]
    assert cells(sections["Most frequent confusions"])[1:] == [["cat", dog, "1"], [dog, "cat", "0.5"]]
    (confusion,) = (body for heading, body in sections.items() if heading.startswith("Confusion"))
    first = [["", "cat", dog, "bird"], ["cat", "75", "25", ""]]
    assert cells(confusion) == [*first, [dog, "10", "90", ""], ["bird", "", "", ""]]


def test_the_confusion_of_many_classes_is_a_picture() -> None:
    num_classes = MAX_TABLE + 10
    confusion = 4 * torch.eye(num_classes, dtype=torch.int64)
    confusion[1, 0] = 12
    sections = class_sections(confusion, [str(number) for number in range(num_classes)])
    (body,) = (body for heading, body in sections if heading.startswith("Confusion"))
    (encoded,) = re.findall(r"base64,([^\"]+)", body)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    scale = len(pixels) // num_classes
    found = pixels[scale // 2 :: scale, scale // 2 :: scale]
    assert found.shape == (num_classes, num_classes) and found[0, 0] == 0 and found[0, 1] == 255
    assert found[1, 0] == round(255 * (1 - 0.75**0.5)) < found[1, 1] == 128


def test_images_are_chosen_from_the_first_to_the_last() -> None:
    assert spread(torch.arange(100) % 2 == 1, 5) == [1, 25, 49, 73, 99]
    assert spread(torch.tensor([True, False, True]), 5) == [0, 2]


def test_what_comes_from_data_is_escaped() -> None:
    body = page("<i>", [table({"<u>": "<s>", "yes": True, "share": 0.12345, "many": 12345})], [("<h>", "<p>kept</p>")])
    assert "<i>" not in body and "<u>" not in body and "<s>" not in body and "<h>" not in body and "<p>kept</p>" in body
    assert ">0.1235<" in body and ">12,345<" in body and ">True<" in body
    assert "&lt;x&gt;" in captioned(["data:,"], ["<x>"])
