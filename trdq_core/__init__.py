"""TR-DQ Studio's library: post-training quantization of diffusion transformers, measured and shown honestly.

Importing it lets diffusers load and save the models it quantizes. `save_quantized`, `quantize` and `TRDQConfig` are here.
"""

from trdq_core.registration import exported, register_quantizer

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    return exported(name)


register_quantizer()
