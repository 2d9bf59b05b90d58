"""Where the time of one denoiser step goes, and how far each operation is from what the machine can do."""

from trdq_core.step_profile.roofline import Peaks, measured_peaks, roofline
from trdq_core.step_profile.split import CATEGORIES, split_step, trace_step

__all__ = ["CATEGORIES", "Peaks", "measured_peaks", "roofline", "split_step", "trace_step"]
