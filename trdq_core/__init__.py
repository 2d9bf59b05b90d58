"""TR-DQ Studio's library: post-training quantization of diffusion transformers, measured and shown honestly."""

__version__ = "0.1.0"
