"""The earlier name of scripts/benchmarks/detector.py, which this runs with the same options."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parent / "benchmarks/detector.py"), run_name="__main__")
