"""SQuAD's EM and F1, and substring match, as a metric of Hugging Face's `evaluate`.

    import evaluate   # the package, from a folder where no evaluate.py stands
    metric = evaluate.load("PATH/TO/data/answer_match.py")
    metric.compute(predictions=["Paris"], references=[["Paris", "the city"]])
"""

import sys
from pathlib import Path

import evaluate
from datasets import Features, List, Value

KIT = Path(__file__).resolve().parents[1]
