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
from trdq_core.weights.gptq import DAMPING, output_error, second_moments
from trdq_core.weights.stacked import StackedWeights
from trdq_core.weights.stored import Weight

OVERSAMPLING = 16  # columns of the random sketch beyond the rank
POWER_ITERATIONS = 4  # enough for 1 % of the exact residual even where singular values fall slowly
HOPELESS = 2.0  # a candidate with so many times the best error of rounding to nearest is not rounded by GPTQ
DAMPINGS = (DAMPING, 0.1, 1.0)  # of GPTQ and of the metric of a refit, in shares of the mean squared input


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
        # The basis only has to span the right directions, which float32 finds in half the time; what is read off it is float64.
        rough = weight.float()
        basis = torch.linalg.qr(rough @ sketch.to(rough)).Q
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(rough @ torch.linalg.qr(rough.T @ basis).Q).Q
        basis = torch.linalg.qr(basis.double()).Q
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
    held_out: Tensor | None = None,
    rounding: Rounding = "nearest",
    layer: str = "weight",
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> LowRankFit:
    """Branches for `weights` ((out, in) each, one width), which all read the tensor that `inputs` (rows, in) samples.

    L <- SVD_r(W - Q(W - L)), beginning at L = SVD_r(W), until the output error grows or `low_rank.iterations` are done; the
    best is kept, and no branch at all if that is better. Q rounds to nearest meanwhile; "gptq" then rounds what was kept.
    With `held_out` rows (rows, in), which should come from other prompts, the error on them decides: GPTQ may be damped more
    or give way to rounding to nearest, and `low_rank.refit` may fit the branch once more to what the rounding left over.
    `layers` names the weights in messages, `layer` all of them.
    """
    names = list(layers) if layers is not None else [layer, *(f"{layer} {n}" for n in range(2, len(weights) + 1))]
    weights = [weight.detach().double() for weight in weights]
    moments = _moments(weights, inputs, names)
    judge = moments if held_out is None else _moments(weights, held_out, names)
    problem = _Problem(weights, names, spec, moments, judge)
    without = problem.nearest(*problem.no_branch(low_rank.rank), 0)
    kept, target = None, problem.stacked
    for iteration in range(1, low_rank.iterations + 1):
        # The residual is taken from the factors as they are stored, so their rounding is made up for as well.
        found = problem.nearest(*low_rank_factors(target, low_rank.rank, seed=seed), iteration)
        if kept is not None and found.error > kept.error:
            break
        kept, target = found, problem.stacked - found.rounded
    candidates = [without] if kept is None else [without, kept]
    if rounding == "gptq":
        dampings = DAMPINGS[:1] if held_out is None else DAMPINGS
        least = min(fit.judged for fit in candidates)
        hopeful = [fit for fit in candidates if fit.judged <= HOPELESS * least or held_out is None]
        rounded = [problem.gptq(fit, damping) for fit in hopeful for damping in dampings]
        candidates = rounded if held_out is None else [*candidates, *rounded]
    without = min((fit for fit in candidates if not fit.iteration), key=lambda fit: fit.judged)
    best = min(candidates, key=lambda fit: fit.judged)
    if low_rank.refit:
        refits = [problem.refit(best, low_rank.rank, damping, seed) for damping in DAMPINGS]
        best = min([best, *refits], key=lambda fit: fit.judged)
    return problem.result(best, without)


class _Candidate(NamedTuple):
    """Stored factors of a branch, the residual on its grid, and the errors on both kinds of rows."""

    down: Tensor  # (rank, in) fp32
    up: Tensor  # (all outs, rank) fp32
    rounded: Tensor  # (all outs, in) float64, values on the grids of `residual`
    residual: StackedWeights  # what was rounded
    error: float
    judged: float
    iteration: int


class _Problem(NamedTuple):
    """Linears that read one tensor, and second moments (in, in) of the rows to fit on and to judge on."""

    weights: list[Tensor]
    names: list[str]
    spec: QuantSpec
    moments: Tensor
    judge: Tensor

    @property
    def stacked(self) -> Tensor:
        return torch.cat(self.weights)

    def no_branch(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors of zeros."""
        out, width = self.stacked.shape
        return self.stacked.new_zeros(rank, width), self.stacked.new_zeros(out, rank)

    def nearest(self, down: Tensor, up: Tensor, iteration: int) -> _Candidate:
        """A branch, and the rest rounded to nearest."""
        down, up = down.float(), up.float()
        residual = self.stacked - up.double() @ down.double()
        parts = residual.split([len(weight) for weight in self.weights])
        stacked = StackedWeights(dict(zip(self.names, parts, strict=True)), self.spec)
        return self._candidate(down, up, torch.cat(list(stacked.nearest().values())), stacked, iteration)

    def gptq(self, fit: _Candidate, damping: float) -> _Candidate:
        """The same branch, the rest rounded by GPTQ."""
        rounded = torch.cat(list(fit.residual.gptq(self.moments, damping).values()))
        return self._candidate(fit.down, fit.up, rounded, fit.residual, fit.iteration)

    def refit(self, fit: _Candidate, rank: int, damping: float, seed: int) -> _Candidate:
        """The same rounded rest, the branch that is best for it in the metric of the inputs: SVD_r((W - Q) C) C^-1 with
        C C^T their damped second moments (QERA, arXiv 2410.06040; EoRA, arXiv 2410.21271)."""
        moments = self.moments.clone()
        mean = moments.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        moments.diagonal().add_(damping * mean)
        root = torch.linalg.cholesky(moments)
        down, up = low_rank_factors((self.stacked - fit.rounded) @ root, rank, seed=seed)
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
        return self._candidate(down.float(), up.float(), fit.rounded, fit.residual, max(fit.iteration, 1))

    def result(self, best: _Candidate, without: _Candidate) -> LowRankFit:
        """What is stored of the best candidate."""
        sizes = [len(weight) for weight in self.weights]
        grids = best.residual.grids.values()
        encoded = tuple(grid.encode(part) for grid, part in zip(grids, best.rounded.split(sizes), strict=True))
        return LowRankFit(best.down, tuple(best.up.split(sizes)), encoded, best.error, without.error, best.iteration)

    def _candidate(
        self, down: Tensor, up: Tensor, rounded: Tensor, residual: StackedWeights, iteration: int
    ) -> _Candidate:
        change = up.double() @ down.double() + rounded - self.stacked
        errors = [output_error(change, moments) for moments in (self.moments, self.judge)]
        return _Candidate(down, up, rounded, residual, *errors, iteration)


def _moments(weights: Sequence[Tensor], inputs: Tensor | None, names: Sequence[str]) -> Tensor:
    """The second moments of the inputs, all that errors need."""
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
    return second_moments(inputs)
