"""`python -m trdq_core`: the command line."""

import sys

from trdq_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
