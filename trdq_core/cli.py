"""The command line: `python -m trdq_core COMMAND`, the commands being those of --help.

Flags and `--spec spec.json` end in the same `RunSpec` that the studio builds; torch is loaded only once a run starts.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trdq_core import listings, local_models, terminal
from trdq_core.arguments import Given, build_parser, spec_from
from trdq_core.errors import Cancelled, RecipeError, StorageError, TRDQError
from trdq_core.presets import PEERS, missing
from trdq_core.presets.peers import PREFIX
from trdq_core.specs import RunSpec

# Read by the libraries when they are imported: the terminal belongs to the progress bar, and nothing asks a network.
QUIET_LIBRARIES = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
EXIT_ERROR, EXIT_CANCELLED, EXIT_UNEXPECTED = 2, 130, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 2 a mistake in what was asked, 130 cancelled, 1 a fault of ours."""
    given = vars(build_parser().parse_args(arguments))
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    handlers = {"models": _models, "peers": _peers, "download": _download, "plan": _plan, "budget": _budget}
    handlers |= {"activations": _activations, "runs": _runs, "clean": _clean}
    try:
        if "model_root" in given:
            local_models.use_root(given["model_root"])
        handlers.get(given["command"], _run)(given)
        sys.stdout.flush()
    except (Cancelled, KeyboardInterrupt) as stopped:
        return _fail(str(stopped) or "Stopped.", EXIT_CANCELLED)
    except TRDQError as error:
        return _fail(str(error), EXIT_ERROR)
    except BrokenPipeError:
        # The reader of a pipe left: there is nobody to tell, and nothing must be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNEXPECTED
    except OSError as error:
        return _fail(_storage_sentence(error), EXIT_ERROR)
    except MemoryError:
        return _fail("Memory ran out; use fewer prompts, a smaller model or storage switched.", EXIT_ERROR)
    except Exception as error:
        if os.environ.get("TRDQ_DEBUG"):
            raise
        first = (str(error).strip().splitlines() or ["no text"])[0]
        kind = type(error).__name__
        return _fail(f"Unexpected {kind}: {first} (TRDQ_DEBUG=1 shows where it happened).", EXIT_UNEXPECTED)
    return 0


def _fail(text: str, status: int) -> int:
    print(text, file=sys.stderr)
    return status


def _storage_sentence(error: OSError) -> str:
    """One sentence on a file that could not be written or read."""
    place = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{place}the disk is full; free some space or name another folder with --out."
    return f"{place}{error.strerror or error}; check the path, or name another folder with --out."


def _models(given: Given) -> None:
    from trdq_core import runs

    found = runs.models()
    if given.get("json"):
        print(json.dumps([model._asdict() for model in found], indent=2, default=str))
    else:
        print(listings.models_text(found))


def _download(given: Given) -> None:
    from trdq_core import runs

    with stop_on_signal() as cancelled, terminal.ProgressBar(quiet=given.get("quiet", False)) as bar:
        found = runs.download(given["name"], on_event=bar, cancelled=cancelled)
    if given.get("json"):
        print(json.dumps(found._asdict(), indent=2, default=str))
    else:
        print(f"{found.repo} is here as {found.name}, revision {found.revision}, in {found.folder}")


def _peers(given: Given) -> None:
    if given.get("json"):
        print(json.dumps([{**peer._asdict(), "missing": missing(peer)} for peer in PEERS.values()], indent=2))
    else:
        print(listings.peers_text((f"{PREFIX}{name}", missing(peer), peer.description) for name, peer in PEERS.items()))


def _plan(given: Given) -> None:
    spec = spec_from(given)
    from trdq_core import runs

    plans = {
        recipe.name: runs.plan(spec.model, recipe, backend=spec.backend, steps=spec.steps) for recipe in spec.recipes
    }
    if given.get("json"):
        whole = {name: {**p._asdict(), "layers": [layer._asdict() for layer in p.layers]} for name, p in plans.items()}
        print(json.dumps(whole, indent=2, default=str))
    else:
        print("\n\n".join(terminal.plan_text(name, plan) for name, plan in plans.items()))
        memory = runs.preflight(spec.model, loading=spec.loading)
        if memory is not None:
            print(f"\n{memory.sentence()}")


def _activations(given: Given) -> None:
    spec = spec_from(given)
    from trdq_core.inspection import look

    wanted = {name: given[name] for name in ("layer", "group", "calibration") if name in given}
    found = look(spec.model, spec.recipes[0], **wanted)
    print(json.dumps(found, indent=2) if given.get("json") else listings.activations_text(found))


def _runs(given: Given) -> None:
    from trdq_core import runs

    found = runs.list_runs()
    if given.get("json"):
        print(json.dumps([info._asdict() for info in found], indent=2, default=str))
    else:
        print(listings.runs_text(found))


def _budget(given: Given) -> None:
    from trdq_core.budget import allocate, parse_bytes
    from trdq_core.sensitivity.table import Sensitivity

    sensitivity = Sensitivity.load(Path(given["sensitivity"]))
    size = "packed_bytes" if given.get("packed") else "bytes"
    error = f"{given.get('error', 'denoiser')}_error"
    found = allocate(sensitivity, parse_bytes(given["bytes"], sensitivity), error=error, size=size)
    if "out" in given:
        Path(given["out"]).write_text(found.recipe.to_json(), encoding="utf-8")
    if given.get("json"):
        choices = [choice._asdict() for choice in found.choices]
        print(json.dumps({**found._asdict(), "choices": choices, "recipe": found.recipe.to_dict()}, indent=2))
    else:
        print(terminal.budget_text(found, packed=size == "packed_bytes"))
        if "out" in given:
            print(f"\nThe recipe is in {given['out']}")


def _clean(given: Given) -> None:
    from trdq_core.cleaning import clean

    found, dry = clean(given["older_than"], dry_run=given.get("dry_run", False)), given.get("dry_run", False)
    if given.get("json"):
        print(json.dumps([one._asdict() for one in found], indent=2, default=str))
    else:
        print(listings.cleaned_text(found, dry_run=dry))


def _run(given: Given) -> None:
    spec = spec_from(given)
    from trdq_core import runs

    named = "out" in given and spec.command != "save"  # whose folder is the model's
    folder = Path(given["out"]) if named else runs.new_run_folder(spec.command)
    prepare_folder(folder, spec)
    quiet = given.get("quiet", False)
    with stop_on_signal() as cancelled, terminal.ProgressBar(quiet=quiet) as bar:
        try:
            report = runs.run(spec, folder, on_event=bar, cancelled=cancelled)
        except Cancelled as stopped:
            raise Cancelled(f"{stopped} It is in {folder}.") from stopped
    if given.get("json"):
        print(json.dumps(report, indent=2))
    else:
        print(terminal.report_text(report))
        print(f"\nEverything of this run is in {folder}")


def prepare_folder(folder: Path, spec: RunSpec) -> None:
    """Make the run folder and try to write in it, before any work is done; a folder with another run is left alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
            probe.flush()
        stored = folder / "spec.json"
        before = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StorageError(f"--out: {folder} cannot be written ({reason}); name another folder.") from error
    except ValueError:
        before = None
    if before is not None and not _is_of(before, spec):
        raise StorageError(f"--out: {folder} holds another run; name a new folder so that nothing of it is lost.")


def _is_of(stored: object, spec: RunSpec) -> bool:
    """Whether a stored specification is `spec`: what was added to specifications since has its defaults."""
    try:
        return RunSpec.from_dict(stored) == spec  # type: ignore[arg-type]  # what is no mapping is refused there
    except RecipeError:
        return False


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C (or a polite kill) came. The first asks the run to stop and keep what is finished; the second ends it."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt("Stopped at once; what was finished before is kept.")
        asked.set()
        print("\nStopping after this step; Ctrl-C again stops at once.", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
