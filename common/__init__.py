"""What the scripts share."""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - pip installs all the rest for it
    print("error: these scripts need Python 3.11 or later", file=sys.stderr)
    sys.exit(2)

# Figures go to files, so no script needs the backend that a notebook exports to the commands it starts, and
# that may not be installed here. Only the notebook's own process keeps it.
if "MPLBACKEND" in os.environ and "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"
