"""Quantized denoisers on disk: what a checkpoint says of itself, the checks before it is believed, putting it back together.

Nothing here knows diffusers; trdq_core.adapters hands in the model it made and the files it found.
"""
