"""The models of the hub that can be got by name: which repository, which revision. Data, nothing else."""

from __future__ import annotations

from typing import NamedTuple


class HubModel(NamedTuple):
    """A model of the hub. One that is asked for by its id has no `revision`: the newest is taken, and its commit recorded."""

    name: str
    repo: str
    revision: str | None
    kind: str  # "image" or "video"
    description: str


# Revisions are commits at which each repository was in public use as a diffusers folder, as public text has them. A model
# of which none could be found is not listed (Lumina-Image 2.0): it can be fetched by its id, at its newest revision.
KNOWN_MODELS = (
    HubModel(
        "pixart-sigma-512", "PixArt-alpha/PixArt-Sigma-XL-2-512-MS", "76fb7eb5a9314bc1e4e479d2f13447517fca9be4",
        "image", "PixArt-Sigma, 0.6 B, 512 pixels.",
    ),
    HubModel(
        "pixart-sigma-1024", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "e102b3591cc82e97071b8b4cb90d834d0c487207",
        "image", "PixArt-Sigma, 0.6 B, 1024 pixels.",
    ),
    HubModel(
        "pixart-alpha-512", "PixArt-alpha/PixArt-XL-2-512x512", "50f702106901db6d0f8b67eb88e814c56ded2692",
        "image", "PixArt-alpha, 0.6 B, 512 pixels.",
    ),
    HubModel(
        "pixart-alpha-1024", "PixArt-alpha/PixArt-XL-2-1024-MS", "b89adadeccd9ead2adcb9fa2825d3fabec48d404",
        "image", "PixArt-alpha, 0.6 B, 1024 pixels.",
    ),
    HubModel(
        "sana-600m-512", "Efficient-Large-Model/Sana_600M_512px_diffusers", "83d7a190bfd1fd070570a793d2dab5c7a3231b9d",
        "image", "Sana, 0.6 B, 512 pixels.",
    ),
    HubModel(
        "sd3.5-medium", "stabilityai/stable-diffusion-3.5-medium", "b940f670f0eda2d07fbb75229e779da1ad11eb80",
        "image", "Stable Diffusion 3.5 medium, 2.5 B.",
    ),
    HubModel(
        "flux.1-schnell", "black-forest-labs/FLUX.1-schnell", "741f7c3ce8b383c54771c7003378a50191e9efe9",
        "image", "FLUX.1 schnell, 12 B, few steps.",
    ),
    HubModel(
        "qwen-image", "Qwen/Qwen-Image", "75e0b4be04f60ec59a75f475837eced720f823b6", "image", "Qwen-Image, 20 B.",
    ),
    HubModel(
        "z-image-turbo", "Tongyi-MAI/Z-Image-Turbo", "f332072aa78be7aecdf3ee76d5c247082da564a6",
        "image", "Z-Image turbo, 6 B, few steps.",
    ),
    HubModel(
        "hunyuandit-1.2", "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers", "5e96094e0ad19e7f475de8711f03634ca0ccc40c",
        "image", "HunyuanDiT 1.2, 1.5 B.",
    ),
    HubModel(
        "auraflow-0.3", "fal/AuraFlow-v0.3", "2cd8588f04c886002be4571697d84654a50e3af3", "image", "AuraFlow 0.3, 6.8 B.",
    ),
    HubModel(
        "cogview4", "zai-org/CogView4-6B", "63a52b7f6dace7033380cd6da14d0915eab3e6b5", "image", "CogView4, 6 B.",
    ),
    HubModel("latte-1", "maxin-cn/Latte-1", "0653024365272f061fc44d1078134df22842b687", "video", "Latte, 0.7 B."),
    HubModel(
        "wan2.1-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "0fad780a534b6463e45facd96134c9f345acfa5b",
        "video", "Wan 2.1 text to video, 1.3 B.",
    ),
    HubModel(
        "cogvideox-2b", "THUDM/CogVideoX-2b", "1137dacfc2c9c012bed6a0793f4ecf2ca8e7ba01", "video", "CogVideoX, 2 B.",
    ),
    HubModel(
        "ltx-video", "Lightricks/LTX-Video", "8984fa25007f376c1a299016d0957a37a2f797bb", "video", "LTX-Video, 2 B.",
    ),
    HubModel(
        "hunyuanvideo", "hunyuanvideo-community/HunyuanVideo", "e8c2aaa66fe3742a32c11a6766aecbf07c56e773",
        "video", "HunyuanVideo, 13 B.",
    ),
)  # fmt: skip
