"""Faults in the six long scripts: 20 kills at random moments, a full disk, damaged files (scripts/benchmarks/faults.py)."""

import json
import os
import subprocess
import sys

from conftest import ROOT


def test_kills_full_disks_and_damage_lose_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/benchmarks/faults.py"), "--kills", "20", "--damages", "1", "--skip_hostile", "--out",
               str(tmp_path / "page.md")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "page.json").read_text())
    kills = {name: count for name, count in counts.items() if name.startswith("kill -9")}
    assert len(kills) == 6 and sum(count["injected"] for count in kills.values()) == 20
    assert sum(count["injected"] for name, count in counts.items() if name.startswith("full disk")) >= 12
    assert sum(count["injected"] for name, count in counts.items() if name.startswith("damaged")) == 12
    for name, count in counts.items():
        assert (count["survived"], count["lost"], count["wrong"]) == (count["injected"], 0, 0), (name, count["notes"])
    page = (tmp_path / "page.md").read_text()
    assert "| **all: kill -9** | 20 | 20 | 0 | 0 |" in page
