"""The earlier name of scripts/benchmarks/speed.py, which this runs with the same options."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parent / "benchmarks/speed.py"), run_name="__main__")
