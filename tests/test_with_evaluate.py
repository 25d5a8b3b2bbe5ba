"""The metrics against `evaluate`, whose modules come as Spaces from a loopback Hub."""

import inspect
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hub_server import HubServer, Repo
from task_files import save_tiny_model, write_task
from test_metrics import WORDS, by_the_book, f1_by_the_book
from tolerances import METRIC

from evaluation import with_evaluate
from evaluation.tasks import get_task

pytest.importorskip("evaluate", reason="evaluate is not installed")

NUMBERS = '{"predictions": Value("float64"), "references": Value("float64")}'
CLASSES = '{"predictions": Value("int32"), "references": Value("int32")}'
TEXTS = '{"predictions": Value("string"), "references": Value("string")}'
ANSWERS = """{
    "predictions": {"id": Value("string"), "prediction_text": Value("string")},
    "references": {
        "id": Value("string"),
        "answers": {"text": [Value("string")], "answer_start": [Value("int32")]},
    },
}"""
# As the Hub's own: scikit-learn, SciPy, and SQuAD's definitions, behind the library's interface.
MODULE = """
import re
import string
import evaluate
import numpy
import scipy.stats
import sklearn.metrics
from datasets import Features, Value

{helpers}
class Module(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="d", citation="c", inputs_description="i", features=Features({features})
        )

    def _compute(self, predictions, references, **options):
        return {result}
"""
SQUAD = """{
            "f1": 100 * numpy.mean([
                max(f1_by_the_book(a, p["prediction_text"]) for a in r["answers"]["text"])
                for p, r in zip(predictions, references)
            ]),
            "exact_match": 100 * numpy.mean([
                by_the_book(p["prediction_text"]) in map(by_the_book, r["answers"]["text"])
                for p, r in zip(predictions, references)
            ]),
        }"""
RESULTS = {
    "accuracy": (CLASSES, '{"accuracy": sklearn.metrics.accuracy_score(references, predictions)}'),
    "f1": (CLASSES, '{"f1": sklearn.metrics.f1_score(references, predictions, **options)}'),
    "matthews_correlation": (
        CLASSES,
        '{"matthews_correlation": sklearn.metrics.matthews_corrcoef(references, predictions)}',
    ),
    "pearsonr": (NUMBERS, '{"pearsonr": scipy.stats.pearsonr(references, predictions)[0]}'),
    "spearmanr": (NUMBERS, '{"spearmanr": scipy.stats.spearmanr(references, predictions)[0]}'),
    "exact_match": (
        TEXTS,
        '{"exact_match": numpy.mean([p == r for p, r in zip(predictions, references)])}',
    ),
    "squad": (ANSWERS, SQUAD),
}
HELPERS = inspect.getsource(by_the_book) + "\n" + inspect.getsource(f1_by_the_book)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The variables with which a process finds the modules on a loopback Hub."""
    with HubServer(user="evaluate-metric") as hub:
        for name, (features, result) in RESULTS.items():
            code = MODULE.format(helpers=HELPERS, features=features, result=result)
            repo = Repo(f"evaluate-metric/{name}", "space", private=False)
            repo.add("module", {f"{name}.py": code.encode()}, None, "main")
            hub.repos["space", repo.name] = repo
        kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        yield {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("home"))}


CHECK = """
import json, sys
from evaluation import metrics, with_evaluate
from evaluation.tasks import get_task
for name, rows, predictions in json.load(open(sys.argv[1])):
    task = get_task(name)
    with_evaluate.check(task, rows, predictions)
    ours, theirs = (m.compute(task, rows, predictions) for m in (metrics, with_evaluate))
    print(json.dumps([name, {key: [ours[key], theirs[key]] for key in theirs}]))
"""


def made(generator, kind, size):
    """Random rows and predictions of a kind of task."""
    if kind == "classes":
        targets, predictions = generator.integers(0, 2, (2, size)).tolist()
        return [{"label": label} for label in targets], predictions
    if kind == "similarity":
        targets = np.round(generator.random(size) * 5, 1)
        predictions = np.round(targets + generator.normal(size=size), 1)
        return [{"label": label} for label in targets.tolist()], predictions.tolist()
    texts = [" ".join(generator.choice(WORDS, 3)) + " cat" for _ in range(3 * size)]
    if kind == "text":
        return [{"label": text} for text in texts[:size]], texts[:1] * size
    answers = [{"answers": texts[3 * i : 3 * i + 3]} for i in range(size)]
    return answers, [row["answers"][i % 3].upper() + " the!" for i, row in enumerate(answers)]


def test_equal_on_random_inputs(environment, tmp_path):
    generator, cases = np.random.default_rng(0), []
    kinds = {"sst2": "classes", "mrpc": "classes", "cola": "classes", "cb": "classes"}
    kinds |= {"stsb": "similarity", "cogs": "text", "squad": "answers"}
    for name, kind in kinds.items():
        for size in (2, 7, 200):
            rows, predictions = made(generator, kind, size)
            cases.append([name, rows, predictions])
    cases.append(["mrpc", [{"label": 0}, {"label": 1}, {"label": 1}], [-1, 1, -1]])  # no label word
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(tmp_path / "cases.json")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(cases)
    for name, found in lines:
        assert set(found) == set(get_task(name).metrics), name
        for key, (ours, theirs) in found.items():
            assert abs(ours - theirs) <= METRIC, (name, key)


def test_an_evaluation_is_checked(environment, tmp_path):
    write_task(tmp_path / "data", "sst2")
    model = save_tiny_model(tmp_path / "model", ["good bad negative positive the film day meal"])
    command = [sys.executable, "-m", "evaluation.run", "--model", str(model), "--tasks", "sst2"]
    command += ["--data_dir", str(tmp_path / "data"), "--check_with_evaluate", "--output_dir"]
    done = subprocess.run(
        [*command, str(tmp_path / "out")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["checked_with_evaluate"]
    nowhere = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    nowhere |= {name: str(tmp_path / "new") for name in ("HF_HOME", "HF_MODULES_CACHE")}
    failed = subprocess.run(
        [*command, str(tmp_path / "none")], env=nowhere, capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert "cannot load its module 'accuracy'" in failed.stderr.splitlines()[-1]


def test_a_difference_is_an_error(monkeypatch):
    monkeypatch.setattr(with_evaluate, "compute", lambda *_: {"accuracy": 0.25})
    with pytest.raises(ValueError, match="sst2: accuracy is 0.5 here, but 0.25 by `evaluate`"):
        with_evaluate.check(get_task("sst2"), [{"label": 0}, {"label": 1}], [0, 0])
