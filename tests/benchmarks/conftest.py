"""Where the scripts lie; last, as one of them is called like a package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
