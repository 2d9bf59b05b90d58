"""What can be asked for, as frozen data: recipes, their parts, and runs. JSON both ways; unknown keys are refused."""

from trdq_core.specs.base import FORMAT_VERSION, TIME_SPAN, Spec
from trdq_core.specs.layers import (
    ACTIVATION_BITS,
    ROUNDINGS,
    WEIGHT_BITS,
    Granularity,
    LayerRule,
    LowRankSpec,
    QuantSpec,
    Rounding,
    TransformKind,
    TransformSpec,
)
from trdq_core.specs.recipe import (
    SHARING_MEASURES,
    SKIPPED_GUIDANCE,
    STORAGE_MODES,
    TIME_GROUP_KINDS,
    AttentionSpec,
    Recipe,
    ReconstructionSpec,
    SharingMeasure,
    SharingSpec,
    SkippedGuidance,
    Storage,
    TimeGroupKind,
    TimeGroupSpec,
)
from trdq_core.specs.run import (
    DEFAULT_LOADING,
    MAX_PROMPT,
    OFFLOADS,
    PRECISIONS,
    Command,
    Loading,
    Offload,
    Precision,
    RunSpec,
    check_prompt,
    fused_name,
)

__all__ = [
    "ACTIVATION_BITS", "DEFAULT_LOADING", "FORMAT_VERSION", "MAX_PROMPT", "OFFLOADS", "PRECISIONS", "ROUNDINGS",
    "SHARING_MEASURES", "SKIPPED_GUIDANCE", "STORAGE_MODES", "TIME_GROUP_KINDS", "TIME_SPAN", "WEIGHT_BITS",
    "AttentionSpec", "Command", "Granularity", "LayerRule", "Loading", "LowRankSpec", "Offload", "Precision",
    "QuantSpec", "Recipe", "ReconstructionSpec", "Rounding", "RunSpec", "SharingMeasure", "SharingSpec",
    "SkippedGuidance", "Spec", "Storage", "TimeGroupKind", "TimeGroupSpec", "TransformKind", "TransformSpec",
    "check_prompt", "fused_name",
]  # fmt: skip
