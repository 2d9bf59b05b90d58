"""Failures of the hub, the network and the disk as one plain sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trdq_core.errors import Cancelled, ModelError, StorageError
from trdq_core.hub.known import HubModel


@contextmanager
def in_words(model: HubModel) -> Iterator[None]:
    """What goes wrong inside becomes a ModelError or a StorageError with one sentence."""
    from huggingface_hub import errors

    repo = model.repo
    # The client's HTTP library is its own affair, so its base error is taken from where the client names it.
    unreachable = (errors.HfHubHTTPError, *errors.HfHubHTTPError.__bases__[:1], errors.LocalEntryNotFoundError)
    try:
        yield
    except (ModelError, StorageError, Cancelled):
        raise
    except errors.GatedRepoError as error:
        raise ModelError(
            f"model {repo}: its licence must be accepted first; do so on its page of the hub, then set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"model {repo}: the hub has no such model, or it is private; check the id.") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"model {repo}: the hub has no revision {model.revision} of it any more.") from error
    except errors.OfflineModeIsEnabled as error:
        raise ModelError(
            f"model {repo}: not on this machine, and HF_HUB_OFFLINE forbids to fetch it; unset it, or use --model-root."
        ) from error
    except (*unreachable, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {repo}: the hub cannot be reached ({reason}); check the network, or put the folder under --model-root."
        ) from error
    except OSError as error:
        reason = error.strerror or str(error).strip().splitlines()[0][:120]
        raise StorageError(f"model {repo}: it could not be stored ({reason}); free some disk space.") from error
