"""Faults in the six long scripts: two kills of each, full disks, damaged files (scripts/benchmarks/faults.py)."""

import json


def test_kills_full_disks_and_damage_lose_nothing(fork, tmp_path):
    done = fork("scripts/benchmarks/faults.py", "--kills", 12, "--damages", 1, "--out", tmp_path / "page.md")
    assert done.code == 0, done.out + done.err
    counts = json.loads((tmp_path / "page.json").read_text())
    injected = {
        kind: [count["injected"] for name, count in counts.items() if name.startswith(kind)]
        for kind in ("kill -9", "full disk", "damaged")
    }
    assert len(injected["kill -9"]) == 6 and sum(injected["kill -9"]) == 12
    assert sum(injected["full disk"]) >= 12 and injected["damaged"] == [2] * 6
    for name, count in counts.items():
        assert (count["survived"], count["lost"], count["wrong"]) == (count["injected"], 0, 0), (name, count["notes"])
    assert "| **all: kill -9** | 12 | 12 | 0 | 0 |" in (tmp_path / "page.md").read_text()
