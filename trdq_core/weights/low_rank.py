"""A branch of small rank beside the integer weight, which takes the largest part off the grid (SVDQuant, arXiv 2411.05007).

    y = T(x) L^T + Q_A(T(x)) Q_W(W - L)^T,  L = up @ down

Linears that read one tensor share `down`, so it is multiplied once for q, k and v together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.errors import CalibrationError, ShapeError
from trdq_core.specs import LowRankSpec, QuantSpec, Rounding
from trdq_core.weights.rounding import quantize_weight
from trdq_core.weights.stored import Weight, dequantize_weight

OVERSAMPLING = 16  # columns of the random sketch beyond the rank
POWER_ITERATIONS = 4  # enough for 1 % of the exact residual even where singular values fall slowly


class LowRankFit(NamedTuple):
    """Branches and residual weights of linears that read one tensor, and the output errors on the sampled inputs."""

    down: Tensor  # (rank, in) fp32
    ups: tuple[Tensor, ...]  # (out, rank) fp32 each
    weights: tuple[Weight, ...]  # of weight - up @ down
    error: float  # squared output error of all linears together
    error_without: float  # the same without a branch
    iteration: int  # which decomposition was kept, from 1; 0: no branch was better, and down and ups are zero


def low_rank_factors(weight: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(down (rank, in), up (out, rank)) float64 with up @ down the best approximation of `weight` (out, in).

    Randomised SVD with power iterations (Halko, Martinsson, Tropp 2011), exact where the sketch would be as large as the
    weight. Rows of `down` are orthonormal. A rank above the smaller side is filled with zeros.
    """
    weight = weight.double()
    small = min(weight.shape)
    if rank + OVERSAMPLING >= small:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(weight.shape[1], rank + OVERSAMPLING, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(weight @ sketch.to(weight.device)).Q
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
        u, s, vt = torch.linalg.svd(basis.T @ weight, full_matrices=False)
        u = basis @ u
    kept = min(rank, small)
    down, up = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(len(weight), rank)
    down[:kept], up[:, :kept] = vt[:kept], u[:, :kept] * s[:kept]
    return down, up


def fit_low_rank(
    weights: Sequence[Tensor],
    spec: QuantSpec,
    low_rank: LowRankSpec,
    *,
    inputs: Tensor | None,
    rounding: Rounding = "nearest",
    layer: str = "weight",
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> LowRankFit:
    """Branches for `weights` ((out, in) each, one width), which all read the tensor that `inputs` (rows, in) samples.

    L <- SVD_r(W - Q(W - L)), beginning at L = SVD_r(W), until the output error grows or `low_rank.iterations` are done; the
    best is kept, and no branch at all if that is better. Q rounds to nearest meanwhile; "gptq" then rounds what was kept.
    `layers` names the weights in messages, `layer` all of them.
    """
    names = list(layers) if layers is not None else [layer] * len(weights)
    weights = [weight.detach().double() for weight in weights]
    rows = _checked(weights, inputs, names)
    outs, stacked = [len(weight) for weight in weights], torch.cat(weights)

    def fitted(down: Tensor, ups: Sequence[Tensor], iteration: int, how: Rounding) -> LowRankFit:
        residuals = tuple(
            quantize_weight(weight - up.double() @ down.double(), spec, layer=name, rounding=how, inputs=inputs)
            for weight, up, name in zip(weights, ups, names, strict=True)
        )
        error = _output_error(rows, stacked, down, ups, residuals)
        return LowRankFit(down, tuple(ups), residuals, error, error, iteration)

    down = torch.zeros(low_rank.rank, stacked.shape[1], device=stacked.device)
    without = fitted(down, [torch.zeros(n, low_rank.rank, device=stacked.device) for n in outs], 0, "nearest")
    kept, target = None, stacked
    for iteration in range(1, low_rank.iterations + 1):
        exact_down, exact_up = low_rank_factors(target, low_rank.rank, seed=seed)
        # The residual is taken from the factors as they are stored, so their rounding is made up for as well.
        found = fitted(exact_down.float(), exact_up.float().split(outs), iteration, "nearest")
        if kept is not None and found.error > kept.error:
            break
        kept, target = found, stacked - torch.cat([dequantize_weight(residual) for residual in found.weights])
    candidates = [without] if kept is None else [without, kept]
    if rounding == "gptq":
        candidates = [fitted(fit.down, fit.ups, fit.iteration, rounding) for fit in candidates]
    return min(candidates, key=lambda fit: fit.error)._replace(error_without=candidates[0].error)


def _output_error(
    rows: Tensor, stacked: Tensor, down: Tensor, ups: Sequence[Tensor], residuals: Sequence[Weight]
) -> float:
    """Squared error of all outputs on the inputs whose triangular factor is `rows` (at most in, in)."""
    rounded = torch.cat([dequantize_weight(residual) for residual in residuals])
    change = torch.cat(list(ups)).double() @ down.double() + rounded - stacked
    return float((rows @ change.T).square().sum())


def _checked(weights: Sequence[Tensor], inputs: Tensor | None, names: Sequence[str]) -> Tensor:
    """The inputs as float64 rows, no more of them than columns: errors need only their second moments."""
    if inputs is None or not len(inputs):
        raise CalibrationError(
            f"{names[0]}: a low-rank branch is chosen by the output error and needs sampled inputs of the layer; "
            "calibrate the model, or leave low_rank out."
        )
    widths = {weight.shape[1] for weight in weights} | {inputs.shape[-1]}
    if len(widths) != 1 or inputs.dim() != 2:
        raise ShapeError(
            f"{names[0]}: got weights and inputs of widths {', '.join(map(str, sorted(widths)))}; linears with one low-rank "
            "branch read the same tensor, so give one width."
        )
    if not torch.isfinite(inputs).all():
        raise CalibrationError(f"{names[0]}: its sampled inputs hold NaN or infinity; calibrate the model again.")
    rows = inputs.detach().double()
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows
