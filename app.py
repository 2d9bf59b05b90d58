"""TR-DQ Studio in the browser: `python app.py`. Hugging Face Spaces starts the same file."""

from __future__ import annotations

import argparse
import logging
import os
import sys

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


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
    return parser.parse_args(arguments)


flags = parse(sys.argv[1:] if __name__ == "__main__" else [])

from studio.app import build, launch_options  # noqa: E402  the flags come first, so that --help is quick
from studio.services.core import InstalledCore, warm_up  # noqa: E402

core = InstalledCore()
demo = build(core)


def main() -> None:
    """Serve the page until it is stopped."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warm_up(core)
    on_a_space = "SPACE_ID" in os.environ
    demo.launch(
        server_name=flags.host,
        server_port=flags.port,
        inbrowser=not (flags.no_browser or on_a_space),
        **launch_options(),
    )


if __name__ == "__main__":
    main()
