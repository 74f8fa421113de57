"""SQuAD's EM and F1, and substring match, as a metric of Hugging Face's `evaluate`.

    import evaluate   # the package, from a folder where no evaluate.py stands
    metric = evaluate.load("PATH/TO/data/answer_match.py")
    metric.compute(predictions=["Paris"], references=[["Paris", "the city"]])

The package runs a copy of this script in its cache, and writes the path it was loaded from into a
file beside the copy: there the kit is found. The cache keeps the first path. After the repository
has moved, load the script once with download_mode="force_redownload"."""

import json
import math
import sys
from pathlib import Path

import evaluate
from datasets import Features, List, Value

ORIGIN = Path(__file__).with_suffix(".json")  # written by evaluate.load
SCRIPT = json.loads(ORIGIN.read_text())["original file path"] if ORIGIN.exists() else __file__
KIT = Path(SCRIPT).resolve().parents[1]
if not (KIT / "plumbing").is_dir():
    raise ImportError(f'{KIT} holds no plumbing/: load with download_mode="force_redownload"')
sys.path.append(str(KIT))  # last, and for one import only: evaluate.py must not hide the package
try:
    from plumbing.text import cover_em, exact_match, f1_score
finally:
    sys.path.remove(str(KIT))

METRICS = {"em": exact_match, "f1": f1_score, "cover_em": cover_em}


class AnswerMatch(evaluate.Metric):
    """Predictions are texts, references lists of accepted texts -> em, f1, cover_em in percent."""

    def _info(self):
        return evaluate.MetricInfo(
            description="EM, F1 and substring match, against the best of several answers.",
            citation="arXiv:2505.04588",
            inputs_description="predictions: list of str; references: list of lists of str",
            features=Features({"predictions": Value("string"),
                               "references": List(Value("string"))}))

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references, strict=True))
        return {name: 100 * math.fsum(metric(*pair) for pair in pairs) / len(pairs)
                for name, metric in METRICS.items()}
