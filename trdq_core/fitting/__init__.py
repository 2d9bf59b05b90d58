"""One input tensor: its transform, the integer weights behind it, the do-no-harm check."""

from trdq_core.fitting.inputs import FittedInput, fit_input, split_rows
from trdq_core.fitting.one_set import FittedSet

__all__ = ["FittedInput", "FittedSet", "fit_input", "split_rows"]
