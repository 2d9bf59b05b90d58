"""Exceptions a user may meet. Each subclasses the builtin a caller would expect, and its text is one plain sentence:
what arrived, what is allowed, what to do, with the layer or field named."""


class TRDQError(Exception):
    """Base of every error this project raises on purpose; its text is meant for people."""


class RecipeError(TRDQError, ValueError):
    """A recipe, a specification or one of their fields cannot be used."""


class ShapeError(TRDQError, ValueError):
    """A tensor or a layer has a size that the operation cannot take."""


class ModelError(TRDQError, ValueError):
    """A model folder is missing, damaged, foreign or of a kind that is not supported."""


class CheckpointError(ModelError):
    """A saved quantized model is damaged, newer than this version, or not what its description says."""


class CalibrationError(TRDQError, ValueError):
    """Statistics are missing, damaged, or belong to another model or schedule."""


class BackendUnavailable(TRDQError, RuntimeError):
    """A kernel backend was asked for by name and cannot run here."""


class PeerError(TRDQError, RuntimeError):
    """Another tool that recipes are compared with is not installed, or could not convert or run the model."""


class StorageError(TRDQError, OSError):
    """A file could not be written or read: disk full, no permission, folder gone."""


class MemoryShort(TRDQError, MemoryError):
    """A model needs more memory than there is; said before it is loaded."""


class Cancelled(TRDQError):
    """The person pressed Cancel; what was finished before is kept."""
