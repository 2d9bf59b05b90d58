"""What the pocket models are told about a picture: its name, or one of three sentences about a composed picture.

A composed picture is made from the same RGBA pictures in pixel space. An eighth of the combinations is held out: never
trained on, decided by a hash of the caption's parts, so the same ones in every run and on every machine.
"""

from __future__ import annotations

import hashlib
import random
from typing import NamedTuple

import numpy as np
from PIL import Image

from training.data import SIZE, on_colour

COLOURS = {
    "red": (222, 62, 62),
    "orange": (245, 150, 50),
    "yellow": (250, 222, 80),
    "green": (82, 176, 92),
    "blue": (70, 125, 225),
    "purple": (145, 85, 200),
    "pink": (250, 165, 200),
    "grey": (150, 150, 155),
}
SMALL = 60  # pixels, the side of a "small" object
HALF = SIZE // 2  # pixels, the side of each of two objects
MARGIN = 3  # pixels between a small object and the corner it sits in
# Place name to (top, left) of a small object in pixels.
PLACES = {
    "top left": (MARGIN, MARGIN),
    "top right": (MARGIN, SIZE - SMALL - MARGIN),
    "bottom left": (SIZE - SMALL - MARGIN, MARGIN),
    "bottom right": (SIZE - SMALL - MARGIN, SIZE - SMALL - MARGIN),
}
HELD_OUT_OF = 8  # one combination in this many is never trained on
PAIRS_EACH = 4  # second objects drawn for each picture
LONGEST = 9  # words in a trained caption at most, so that every caption fits the trained length


class Sample(NamedTuple):
    """A caption and how its picture is made. `other` is -1 unless the picture holds two objects."""

    caption: str
    picture: int
    kind: str  # "plain", "colour", "place" or "pair"
    detail: str = ""
    other: int = -1


def plain(name: str) -> str:
    """An emoji's name as a caption: lower case, straight apostrophes."""
    return name.lower().replace("\u2019", "'")


def caption_of(kind: str, name: str, detail: str) -> str:
    """The sentence about a composed picture; `detail` is a colour, a place or a second name."""
    if kind == "colour":
        return f"a {plain(name)} on a {detail} background"
    if kind == "place":
        return f"a small {plain(name)} in the {detail}"
    if kind == "pair":
        return f"a {plain(name)} and a {plain(detail)}"
    return plain(name)


def held_out(name: str, detail: str) -> bool:
    """Whether a combination is kept from training; the same answer everywhere."""
    digest = hashlib.blake2b(f"{plain(name)}|{plain(detail)}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_OF == 0


def composed(names: list[str]) -> list[Sample]:
    """Every composed combination, held-out ones included: all colours, all places, a few second objects each."""
    samples: list[Sample] = []
    for i, name in enumerate(names):
        samples += [Sample(caption_of("colour", name, c), i, "colour", c) for c in COLOURS]
        samples += [Sample(caption_of("place", name, p), i, "place", p) for p in PLACES]
        # A generator for each name, so that its partners do not depend on the other names' draws.
        partners = random.Random(plain(name)).choices(range(len(names)), k=PAIRS_EACH)
        samples += [Sample(caption_of("pair", name, names[j]), i, "pair", names[j], j) for j in partners if j != i]
    return [sample for sample in samples if len(sample.caption.split()) <= LONGEST]


def trained(names: list[str]) -> list[Sample]:
    """What a model is trained on: every plain name first, in order, then the composed ones not held out."""
    kept = [sample for sample in composed(names) if not held_out(names[sample.picture], sample.detail)]
    return [Sample(plain(name), i, "plain") for i, name in enumerate(names)] + kept


def never_trained(names: list[str]) -> list[Sample]:
    """The held-out combinations."""
    return [sample for sample in composed(names) if held_out(names[sample.picture], sample.detail)]


def _shrunk(rgba: np.ndarray, side: int) -> np.ndarray:
    """RGBA (height, width, 4) uint8 resized to (side, side, 4), premultiplied so that hidden colours do not bleed."""
    return np.asarray(Image.fromarray(rgba).convert("RGBa").resize((side, side), Image.LANCZOS).convert("RGBA"))


def _placed(canvas: np.ndarray, rgba: np.ndarray, top: int, left: int) -> None:
    """Copy an RGBA object into a transparent RGBA canvas; objects do not overlap."""
    canvas[top : top + rgba.shape[0], left : left + rgba.shape[1]] = rgba


def picture_of(sample: Sample, rgba: np.ndarray) -> np.ndarray:
    """The picture (128, 128, 3) uint8 a sample describes, made from all pictures (count, 128, 128, 4) uint8."""
    first = rgba[sample.picture]
    if sample.kind == "plain":
        return on_colour(first)
    if sample.kind == "colour":
        return on_colour(first, COLOURS[sample.detail])
    canvas = np.zeros_like(first)
    if sample.kind == "place":
        _placed(canvas, _shrunk(first, SMALL), *PLACES[sample.detail])
    else:
        _placed(canvas, _shrunk(first, HALF), HALF // 2, 0)
        _placed(canvas, _shrunk(rgba[sample.other], HALF), HALF // 2, HALF)
    return on_colour(canvas)
