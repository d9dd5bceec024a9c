"""Run `vpns-hf` as `python -m vpns_hf.cli`, or on several processes by `accelerate launch -m vpns_hf.cli`."""

import sys

from .program import main

if __name__ == "__main__":
    sys.exit(main())
