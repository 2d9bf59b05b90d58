"""TR-DQ Studio in the browser: `python app.py`. Hugging Face Spaces starts the same file."""

from __future__ import annotations

import argparse
import logging
import os
import sys

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
ON_A_SPACE = "SPACE_ID" in os.environ
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags; `--help` answers before anything heavy is imported."""
    parser = argparse.ArgumentParser(prog="python app.py", description=__doc__)
    parser.add_argument(
        "--host",
        default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        help="address to serve on (default: %(default)s)",
    )
    port = os.environ.get("GRADIO_SERVER_PORT")
    parser.add_argument(
        "--port",
        type=int,
        default=int(port) if port else None,
        help="port to serve on (default: the first free one from 7860)",
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    parser.add_argument("--model-root", metavar="DIR", help="also list the diffusers folders in DIR, by name")
    parser.add_argument(
        "--allow-hub",
        action="store_true",
        help="let visitors type an id of the Hugging Face hub to download (never on a Space)",
    )
    given = parser.parse_args(arguments)
    if given.allow_hub and ON_A_SPACE:
        parser.error("--allow-hub: a Space is open to anybody, so ids are not typed there; leave the flag out")
    return given


flags = parse(sys.argv[1:] if __name__ == "__main__" else [])

from studio.app import build, launch_options  # noqa: E402  the flags come first, so that --help is quick
from studio.context import Settings, Studio  # noqa: E402
from studio.services.core import InstalledCore, warm_up  # noqa: E402
from studio.services.models import use_root  # noqa: E402
from studio.services.work import prepare  # noqa: E402

if flags.model_root and (wrong := use_root(flags.model_root)):
    sys.exit(wrong)
core = InstalledCore()
local = flags.host in LOOPBACK and not ON_A_SPACE
studio = Studio.over(core, Settings(downloads=not ON_A_SPACE, allow_hub=flags.allow_hub, local=local))
demo = build(studio)


def main() -> None:
    """Serve the page until it is stopped."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warm_up(core)
    demo.launch(
        server_name=flags.host,
        server_port=flags.port,
        inbrowser=not (flags.no_browser or ON_A_SPACE),
        prevent_thread_lock=True,
        **launch_options(),
    )
    if ON_A_SPACE and os.environ.get("TRDQ_PREPARE") != "0":
        prepare(core, studio.worker)  # not before: a GPU is lent only once the page is served
    demo.block_thread()


if __name__ == "__main__":
    main()
