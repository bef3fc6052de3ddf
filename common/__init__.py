"""What the scripts share."""

import os
import sys

# Figures go to files, so no script needs the backend that a notebook exports to the commands it starts, and
# that may not be installed here. Only the notebook's own process keeps it.
if "MPLBACKEND" in os.environ and "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"
