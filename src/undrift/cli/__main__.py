"""``python -m undrift.cli``."""

import sys

from undrift.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
