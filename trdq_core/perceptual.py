"""How different two pictures look, without a downloaded network: gradients, and what the model's own autoencoder sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

GMSD_CONSTANT = 170.0  # of the paper, for luminance from 0 to 255
LUMINANCE = (0.299, 0.587, 0.114)
KID_LEAST = 50  # pictures; with fewer the estimate's own spread is larger than what it is to show


def gmsd(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Gradient magnitude similarity deviation (Xue et al. 2014) of pictures (n, height, width, 3) uint8: (n,), 0 if equal.

    Luminance, averaged over 2x2 and halved; Prewitt gradients; the standard deviation of their similarity over the picture.
    """
    own, other = _gradients(pictures), _gradients(references)
    similarity = (2 * own * other + GMSD_CONSTANT) / (own.square() + other.square() + GMSD_CONSTANT)
    return similarity.flatten(1).std(1, correction=0).numpy()


def _gradients(pictures: np.ndarray) -> Tensor:
    values = torch.from_numpy(pictures).double() @ torch.tensor(LUMINANCE, dtype=torch.float64)
    halved = functional.avg_pool2d(values[:, None], 2)
    across = torch.tensor([[1.0, 0.0, -1.0]] * 3, dtype=torch.float64) / 3
    found = functional.conv2d(halved, torch.stack([across, across.T])[:, None], padding=1)
    return found.square().sum(1).sqrt()


def feature_distance(features: Sequence[Tensor], references: Sequence[Tensor]) -> np.ndarray:
    """Distance (n,) of two batches seen through the stages of an encoder, (n, channels, height, width) each; 0 if equal.

    As LPIPS does it (Zhang et al. 2018) without its learned weights: the channels of each position are scaled to length
    one, squared differences summed over channels, averaged over positions, then over stages. It lies between 0 and 4.
    """
    stages = []
    for own, other in zip(features, references, strict=True):
        gap = _unit(own) - _unit(other)
        stages.append(gap.square().sum(1).flatten(1).mean(1))
    return torch.stack(stages).mean(0).double().numpy()


def _unit(feature: Tensor) -> Tensor:
    return feature / (feature.square().sum(1, keepdim=True).sqrt() + 1e-10)


def pooled(features: Sequence[Tensor]) -> Tensor:
    """One vector (n, channels of all stages) for each picture: the mean of every channel."""
    return torch.cat([feature.flatten(2).mean(2) for feature in features], 1).double()


def kernel_distance(values: Tensor, references: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of two paired samples (n, d), with the kernel (x.y / d + 1)^3 of KID.

    Binkowski et al. 2018. Picture i of both samples starts from the same latents, so the pairs (i, i) are left out of the
    mixed term too (Gretton et al. 2012, the statistic for pairs): else likeness of pairs would be taken for likeness of
    distributions. Dimensions are scaled by the references' mean and deviation first. May be below 0, as KID may.
    """
    mean, deviation = references.mean(0), references.std(0).clamp_min(1e-12)
    own, other = (values - mean) / deviation, (references - mean) / deviation

    def off_diagonal(a: Tensor, b: Tensor) -> Tensor:
        kernel = (a @ b.T / a.shape[1] + 1) ** 3
        return (kernel.sum() - kernel.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(off_diagonal(own, own) + off_diagonal(other, other) - 2 * off_diagonal(own, other))
