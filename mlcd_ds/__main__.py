"""`python -m mlcd_ds STAGE ...` and `torchrun -m mlcd_ds STAGE ...`: the same as `mlcd STAGE ...`."""

import sys

from mlcd_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
