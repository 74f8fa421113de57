"""data/answer_match.py in the hands of the package `evaluate`, away from the repository."""

import os
import subprocess
import sys

from helpers import ROOT

USE = """
import sys
import evaluate
path = sys.argv[1]
metric = evaluate.load(path)
metric.add_batch(predictions=["Paris"], references=[["Paris", "the city"]])
metric.add_batch(predictions=["in Rome"], references=[["Rome"]])
expected = {"em": 50.0, "f1": 100 * (1 + 2 / 3) / 2, "cover_em": 100.0}
assert metric.compute() == expected
answers = {"predictions": ["Paris", "in Rome"], "references": [["Paris", "the city"], ["Rome"]]}
assert metric.compute(**answers) == expected
both = evaluate.combine([evaluate.load(path), evaluate.load(path)])
assert len(both.compute(predictions=["x"], references=[["x"]])) == 6
assert isinstance(metric, evaluate.Metric) and path.split("/data/")[0] not in sys.path
"""


def use(folder, script):
    """Run USE in a folder that is the package's cache too."""
    offline = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", USE, str(script)], cwd=folder, text=True,
                          env=os.environ | offline, capture_output=True)


def test_loads_by_path_and_gives_the_kits_own_figures(tmp_path):
    done = use(tmp_path, ROOT / "data/answer_match.py")
    assert done.returncode == 0, done.stderr


def test_says_so_where_there_is_no_kit_around_the_script(tmp_path):
    (tmp_path / "answer_match.py").write_bytes((ROOT / "data/answer_match.py").read_bytes())
    assert "holds no plumbing/" in use(tmp_path, tmp_path / "answer_match.py").stderr
