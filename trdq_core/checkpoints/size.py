"""What a saved denoiser takes on disk, counted without writing it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor

from trdq_core.checkpoints.describe import describe, stored_sizes
from trdq_core.checkpoints.files import DTYPE_NAMES
from trdq_core.checkpoints.manifest import KEY
from trdq_core.convert import Conversion

# Safetensors sorts by type before it sorts by name, the last of these first; where a tensor lies is written in digits.
_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
_ALIGNMENT = 8  # bytes; the header is filled up to a multiple of it
_NO_DIGEST = "0" * 64


def file_bytes(conversion: Conversion) -> int:
    """Bytes of the one safetensors file that saving a conversion writes: every tensor, and the header with the description.

    Exact but for its digests, which have one length. config.json and, beyond the size of a shard, further headers come on top.
    """
    tensors = stored_sizes(conversion)
    config = getattr(conversion.denoiser, "config", {})
    text = describe(conversion, tensors, config, lambda tensor: _NO_DIGEST).text()
    header = _header(tensors, {"format": "pt", KEY: text})
    return 8 + header + -header % _ALIGNMENT + sum(tensor.nbytes for tensor in tensors.values())


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Bytes of the JSON that stands before the tensors."""
    data, end = {"__metadata__": dict(metadata)}, 0
    kinds = {name: DTYPE_NAMES[tensor.dtype] for name, tensor in tensors.items()}
    for name in sorted(tensors, key=lambda name: (-_ORDER.index(kinds[name]), name)):
        begin, end = end, end + tensors[name].nbytes
        data[name] = {"dtype": kinds[name], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    return len(json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode())
