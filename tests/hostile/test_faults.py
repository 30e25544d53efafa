"""Faults in the six long scripts: 20 kills at random moments, full disks, damaged files (scripts/benchmarks/faults.py)."""

import json
import os
import subprocess
import sys

from conftest import ROOT


def test_kills_full_disks_and_damage_lose_nothing(tmp_path):
    command = [
        sys.executable,
        ROOT / "scripts/benchmarks/faults.py",
        "--kills",
        "20",
        "--damages",
        "1",
        "--out",
        tmp_path / "page.md",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "page.json").read_text())
    injected = {
        kind: [count["injected"] for name, count in counts.items() if name.startswith(kind)]
        for kind in ("kill -9", "full disk", "damaged")
    }
    assert len(injected["kill -9"]) == 6 and sum(injected["kill -9"]) == 20
    assert sum(injected["full disk"]) >= 12 and injected["damaged"] == [2] * 6
    for name, count in counts.items():
        assert (count["survived"], count["lost"], count["wrong"]) == (count["injected"], 0, 0), (name, count["notes"])
    assert "| **all: kill -9** | 20 | 20 | 0 | 0 |" in (tmp_path / "page.md").read_text()
