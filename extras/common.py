"""What a script here imports as `common` when it is started by its file (`python extras/gradcam.py`): the
folder of that name beside extras/."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # as `python -m extras.gradcam` has it
del sys.modules["common"]  # this file
__import__("common")
