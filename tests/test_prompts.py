"""Which prompts a run starts with: those of the model's kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trdq_core import arguments, prompts
from trdq_core.errors import StorageError
from trdq_core.models import ASSETS


def test_each_kind_has_its_lists(tiny_video_folder: Path, tiny_folder: Path) -> None:
    clips = json.loads((ASSETS / "pocket-video" / "prompts.json").read_text())
    pictures = json.loads((ASSETS / "prompts.json").read_text())
    for model, lists in (
        ("pocket-video", clips), (str(tiny_video_folder), clips), ("pocket-image", pictures), ("random-dit", pictures),
        (str(tiny_folder), pictures),
    ):  # fmt: skip
        assert prompts.stored_prompts(model) == {name: tuple(texts) for name, texts in lists.items()}
        assert prompts.prompts_for(model, "evaluation") == tuple(lists["evaluation"])
    assert clips["calibration"] != pictures["calibration"]


def test_flags_take_the_prompts_of_their_model() -> None:
    parser = arguments.build_parser()
    spec = arguments.spec_from(vars(parser.parse_args(["compare", "--model", "pocket-video", "--prompts", "3"])))
    stored = prompts.stored_prompts("pocket-video")
    assert spec.prompts == stored["evaluation"][:3]
    assert spec.calibration_prompts == stored["calibration"][: prompts.CALIBRATION_PROMPTS]
    attention = arguments.spec_from(vars(parser.parse_args(["attention", "--model", "pocket-video"])))
    assert attention.prompts == stored["evaluation"][:4]


def test_a_list_that_is_not_there_is_one_sentence_or_a_short_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompts.json").write_text("[]")
    monkeypatch.setattr(prompts, "VIDEO_PROMPTS_FILE", tmp_path / "prompts.json")
    with pytest.raises(StorageError, match="prompts: prompts.json cannot be read .* clone the repository again"):
        prompts.stored_prompts("pocket-video")
    assert prompts.prompts_for("pocket-video", "calibration") == prompts.FALLBACK_PROMPTS
    assert prompts.prompts_for("pocket-image", "nothing") == prompts.FALLBACK_PROMPTS
