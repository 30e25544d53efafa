"""Tables and their figures: the paper's as data, ours with k of n, three formats, and jobs that are done once."""

import csv
import io
import json
import statistics
from dataclasses import replace

from des.tables.build import Cell, Table, paper_figures
from des.tables.jobs import Job, JobRecords
from des.utils.errors import UserError
from des.utils.stats import proportion, stratified

import pytest
from conftest import ROOT

FIGURES = paper_figures(ROOT / "scripts/paper_tables.csv")


def numbers(table: str, method: str, *columns: str) -> list[float]:
    return [float(FIGURES[table][method][column]) for column in columns]


def test_the_papers_figures_agree_with_each_other():
    """Sums, means and deviations that the paper prints beside their parts; GLoCE's deviation in T5 is off in the paper itself."""
    for row in FIGURES["T1"].values():
        assert sum(int(value) for column, value in row.items() if column not in ("total", "FID", "CLIP")) == int(row["total"])
    sets = {"T2": 4, "T5": 6, "T6": 5, "T7": 5}
    for method, row in FIGURES["T9"].items():
        agrees = float(row["avg"]) == pytest.approx(
            statistics.fmean([float(value) for value in list(row.values())[:4]]), abs=0.02
        )
        assert agrees == (method != "negative prompt"), method  # whose average is the original model's, in the paper itself
    for table, count in sets.items():
        for method, row in FIGURES[table].items():
            parts = [float(value) for value in list(row.values())[:count]]
            assert float(row["avg"]) == pytest.approx(statistics.fmean(parts), abs=0.02), (table, method)
            agrees = float(row["std"]) == pytest.approx(statistics.stdev(parts), abs=0.05)
            assert agrees == ((table, method) != ("T5", "GLoCE")), (table, method)
    for table, count in {"T3": 4, "T4": 4}.items():
        for method, row in FIGURES[table].items():
            parts = [float(value) for value in list(row.values())[:count]]
            assert float(row["avg"]) == pytest.approx(statistics.fmean(parts), abs=0.02), (table, method)


def test_one_model_has_one_figure_in_all_tables():
    assert numbers("T15", "alpha 200", "ASR", "FID", "CLIP") == numbers("T17", "all three", "ASR", "FID", "CLIP")
    assert numbers("T19", "lambda 0.3", "ASR", "FID", "CLIP") == numbers("T17", "all three", "ASR", "FID", "CLIP")
    assert numbers("T2", "DES", "avg") == numbers("T15", "alpha 200", "ASR") == numbers("T10", "DES", "ASR")
    assert numbers("T1", "DES", "FID", "CLIP") == numbers("T15", "alpha 200", "FID", "CLIP")
    assert numbers("T16", "alpha 200", "avg", "FID", "CLIP") == numbers("T5", "DES", "avg", "FID", "CLIP")
    assert numbers("T16_style", "alpha 200", "ASR", "FID") == numbers("T5_style", "DES", "UDA", "FID")
    assert numbers("T9", "DES", "Sneaky", "avg", "FID") == numbers("T2", "DES", "Sneaky", "avg") + numbers("T1", "DES", "FID")
    assert len(FIGURES["T15"]) == 10 and len(FIGURES["T19"]) == 7 and len(FIGURES["T2"]) == 14


@pytest.fixture
def table():
    paper = {"SPM": {"Sneaky": "33.06", "avg": "65.26"}, "DES": {"Sneaky": "0", "avg": "0.52"}}
    made = Table("T2", "100% of it_all", ["Sneaky", "avg", "FID"], paper, notes=["a & b"])
    made.ours["DES"] = {"Sneaky": Cell.share(proportion(3, 124)), "avg": Cell(1.5), "FID": Cell(missing="not run")}
    made.ours["new | one"] = {"Sneaky": Cell(7, digits=0)}
    return made


def test_markdown_sets_ours_below_the_papers(table):
    lines = table.markdown().splitlines()
    assert lines[2] == "|  | Sneaky | avg | FID |"
    assert lines[4:8] == [
        "| SPM, paper | 33.06 | 65.26 |  |", "| DES, paper | 0 | 0.52 |  |", "| **DES, ours** | 2.42 (3/124) [0.8, 6.9] | 1.50 | not run |",
        "| **new &#124; one, ours** | 7 |  |  |",
    ]  # fmt: skip
    assert lines[-1] == "- a & b"


def test_csv_and_latex_hold_the_same(table):
    rows = {(row["method"], row["column"]): row for row in csv.DictReader(io.StringIO(table.csv()))}
    share = rows["DES", "Sneaky"]
    assert (share["paper"], share["k"], share["n"]) == ("0", "3", "124") and float(share["ours"]) == pytest.approx(300 / 124)
    assert float(share["low"]) < float(share["ours"]) < float(share["high"])
    assert rows["SPM", "avg"]["ours"] == "" and ("SPM", "FID") not in rows
    latex = table.latex()
    assert r"\toprule" in latex and r"DES, ours & 2.42 (3/124) [0.8, 6.9] & 1.50 & not run \\" in latex and r"a \& b" in latex
    assert latex.count(r"\\") == 1 + 4


def test_a_mean_of_equal_sets_keeps_its_counts():
    equal = Cell.mean([Cell.share(proportion(3, 100)), Cell.share(proportion(0, 100))])
    assert (equal.value, equal.k, equal.n) == (1.5, 3, 200) and equal.low < 1.5 < equal.high
    assert equal == Cell.share(proportion(3, 200))
    unequal = Cell.mean([Cell.share(proportion(3, 100)), Cell.share(proportion(0, 50))])
    assert unequal.value == 1.5 and unequal.k is None
    assert (unequal.low, unequal.high) == pytest.approx([100 * each for each in stratified([(3, 100), (0, 50)])[1:]])
    assert str(unequal) == f"1.50 [{unequal.low:.1f}, {unequal.high:.1f}]"
    assert Cell.mean([Cell(1.5), unequal]).low is None  # the first has no number of images


def test_a_mean_over_a_missing_cell_is_missing():
    cells = [Cell(1.0), Cell(missing="not run: no list"), Cell(2.0)]
    assert str(Cell.mean(cells)) == str(Cell.spread(cells)) == "not run: no list"
    assert Cell.mean([Cell(1.0), Cell(2.0)]).value == 1.5
    assert Cell.spread([Cell(1.0), Cell(2.0)]).value == pytest.approx(0.5**0.5)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job whose script copies a file and logs each run."""
    script = tmp_path / "copy.py"
    script.write_text(
        "import pathlib, sys\nsource, target = map(pathlib.Path, sys.argv[1:])\n"
        "with (target.parent / 'runs').open('a') as runs: runs.write('x')\n"
        "if source.read_text() == 'bad': sys.exit('error: a bad file')\n"
        "if source.read_text() != 'lazy': target.write_text(source.read_text())\n"
    )
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("one")
    return Job("copy it", str(script), (str(source), str(target)), (source,), (target,), images=2)


def test_a_job_is_done_once_and_again_when_anything_changed(tmp_path, job):
    runs, records = tmp_path / "runs", JobRecords(tmp_path / "jobs")
    assert records.record(job) is None and records.seconds_per("images") is None
    for change, count in ((None, 1), (None, 1), ("in.txt", 2), ("out.txt", 3), (None, 3)):
        if change:
            (tmp_path / change).write_text(f"changed for run {count}")
        JobRecords(tmp_path / "jobs").run(job)
        assert runs.read_text() == "x" * count
        assert (tmp_path / "out.txt").read_text() == (tmp_path / "in.txt").read_text()
    assert records.seconds_per("images") > 0
    (tmp_path / "out.txt").unlink()
    assert records.record(job) is None
    (tmp_path / "jobs/copy-it.json").write_text("{")
    records.run(job)
    assert json.loads((tmp_path / "jobs/copy-it.json").read_text())["images"] == 2


def test_another_device_of_the_same_kind_is_no_other_job(tmp_path, job, monkeypatch):
    monkeypatch.setattr("des.tables.jobs.run_script", lambda *_: job.outputs[0].write_text("made"))
    job.inputs[0].write_text("one")
    for option in ("--device", "--devices"):
        first, same, other = (replace(job, argv=(option, device, "a:1")) for device in ("cuda:0", "cuda:1", "cpu"))
        JobRecords(tmp_path).run(first)
        assert JobRecords(tmp_path).record(same) and not JobRecords(tmp_path).record(other)
        assert not JobRecords(tmp_path).record(replace(first, argv=(option, "cuda:0", "a:2")))


def test_what_reads_the_output_of_a_job_that_is_left_is_left_too(tmp_path, job):
    further = Job(
        "copy on", job.script, (str(job.outputs[0]), str(tmp_path / "last.txt")), job.outputs, (tmp_path / "last.txt",)
    )
    records = JobRecords(tmp_path / "jobs")
    assert records.left([job, further]) == [job, further]
    records.run(job)
    assert records.left([job, further]) == [further]
    records.run(further)
    assert records.left([job, further]) == []
    job.inputs[0].write_text("another")
    assert records.left([job, further]) == [job, further]


@pytest.mark.parametrize(("content", "message"), [("bad", "a bad file"), ("lazy", "missing")])
def test_a_job_that_fails_leaves_no_record(tmp_path, job, content, message):
    (tmp_path / "in.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        JobRecords(tmp_path / "jobs").run(job)
    assert not (tmp_path / "jobs").exists() or not list((tmp_path / "jobs").iterdir())
