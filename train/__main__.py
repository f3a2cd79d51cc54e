"""``python -m train``; the commands are in `train.command_line`."""

import sys

from train.command_line import main

if __name__ == "__main__":
    sys.exit(main())
