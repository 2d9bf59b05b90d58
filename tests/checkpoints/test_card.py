"""The model card beside a checkpoint, and its way to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from tests.checkpoints.conftest import Convert
from trdq_core.adapters import saving
from trdq_core.adapters.saving import save_quantized
from trdq_core.checkpoints.card import recipe_words
from trdq_core.errors import StorageError
from trdq_core.presets import METHODS, make_recipe, parse_recipe

REPORT = {
    "model": "one-block",
    "calibration": {"prompts": 2, "steps": 3},
    "recipes": {"rtn-w4a8": {"n": 1, "psnr": 31.25, "ssim": 0.91, "final_latent_sqnr_db": 20.5, "identical": False}},
}


def test_the_card_says_what_was_done_and_measured(convert_tiny: Convert, tmp_path: Path) -> None:
    conversion = convert_tiny(parse_recipe("rtn-w4a8"))
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    saved = save_quantized(conversion, tmp_path / "model", report=REPORT, picture=picture)
    card = (saved.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "# one-block, rtn-w4a8" in card
    assert "weights 4 bits for each channel, inputs 8 bits for each token as it comes" in card
    assert f"Fingerprint `{conversion.calibration}`: 2 prompts, 3 steps, timesteps" in card
    assert "Means over 1 prompt, against full precision" in card and "- PSNR dB: 31.2" in card
    assert "PixArtTransformer2DModel.from_pretrained" in card
    assert "![Sampled with this model](picture.png)" in card
    assert np.array_equal(np.asarray(Image.open(saved.folder / "picture.png")), picture)
    assert f"{saved.denoiser_bytes:,} bytes" in card


def test_a_card_without_a_report_claims_nothing(convert_tiny: Convert, tmp_path: Path) -> None:
    saved = save_quantized(convert_tiny(parse_recipe("q-dit-w4a8")), tmp_path / "model")
    card = (saved.folder / "README.md").read_text()
    assert "Not measured when it was saved." in card
    assert "Simulated: right numbers" in card
    assert "picture" not in card


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fp"])
def test_every_method_has_words(method: str) -> None:
    lines = recipe_words(make_recipe(method, weight_bits=4, groups=2))
    assert lines and all(line.endswith(".") and "None" not in line and ": ," not in line for line in lines)


class Hub:
    """What of the hub's client is used, keeping what it was asked."""

    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 - emptied by each test
    fails = False

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.fails:
            request = httpx.Request("POST", "https://hub")
            raise HfHubHTTPError("401 Unauthorized\nmore", response=httpx.Response(401, request=request))
        self.asked.append(("create", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options: Any) -> None:
        self.asked.append(("upload", options))


def test_push_to_hub_uploads_the_finished_folder(
    convert_tiny: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    conversion = convert_tiny(parse_recipe("rtn-w8a8"))
    save_quantized(conversion, tmp_path / "model", push_to_hub="somebody/tiny-w8a8")
    (created, first), (uploaded, second) = Hub.asked
    assert (created, uploaded) == ("create", "upload")
    assert first["repo_id"] == second["repo_id"] == "somebody/tiny-w8a8"
    assert Path(second["folder_path"]) == tmp_path / "model"


def test_without_a_network_it_is_one_sentence_too(
    convert_tiny: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client itself, with nobody at the other end."""
    monkeypatch.setattr(saving, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token=False))
    with pytest.raises(
        StorageError, match=r"push-to-hub: somebody/tiny could not be uploaded \(.+\); .* is in model\."
    ):
        save_quantized(convert_tiny(parse_recipe("rtn-w8a8")), tmp_path / "model", push_to_hub="somebody/tiny")
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_hub_that_refuses_is_one_sentence_and_the_folder_stays(
    convert_tiny: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "HfApi", Hub)
    monkeypatch.setattr(Hub, "fails", True)
    conversion = convert_tiny(parse_recipe("rtn-w8a8"))
    with pytest.raises(StorageError, match=r"could not be uploaded \(401 Unauthorized\); log in with hf auth login"):
        save_quantized(conversion, tmp_path / "model", push_to_hub="somebody/tiny")
    assert (tmp_path / "model" / "config.json").is_file()
    for wrong in ("tiny", "a/b/c", "../x", "a b/c", ""):
        with pytest.raises(StorageError, match="give OWNER/NAME"):
            save_quantized(conversion, tmp_path / "other", push_to_hub=wrong)
    assert not (tmp_path / "other").exists()
