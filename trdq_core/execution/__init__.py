"""How each command runs: load, calibrate or reuse, convert, sample, measure, report."""

from trdq_core.execution.start import execute

__all__ = ["execute"]
