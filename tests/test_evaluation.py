"""`python -m evaluation.run`: exact label scores, predictions, results files, their readers."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from task_files import save_tiny_model, write_jsonl, write_task
from tolerances import LABEL_SCORES
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from evaluation.answers import batches, check_method, check_words, from_scores, from_text
from evaluation.data import load
from evaluation.metrics import INVALID
from evaluation.prediction import predict, score_candidates
from evaluation.results import (
    data_set,
    eval_results,
    model_index,
    read_results,
    summarise,
    this_command,
    write_json,
)
from evaluation.run import main
from evaluation.tasks import TASKS, custom_task, get_task
from modeling_convt5 import (
    ConvT5ForConditionalGeneration,
    ConvT5ForQuestionAnswering,
    ConvT5ForSequenceClassification,
)


def texts_of(*names, folder):
    """Every input and target of tasks, for the tokenizer."""
    texts = []
    for name in names:
        task = get_task(name)
        texts += task.words
        for rows in load(task, write_task(folder / name, name)).rows.values():
            texts += [task.input_text(row) for row in rows]
            texts += [str(row["label"]) for row in rows]
    return texts


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    torch.manual_seed(0)
    texts = texts_of("sst2", "mnli", "record", "multirc", "squad", "cogs", "stsb", folder=files)
    return save_tiny_model(tmp_path_factory.mktemp("model"), texts)


@pytest.fixture(scope="module")
def model(folder):
    return ConvT5ForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def alone(model, tokenizer, text, candidate):
    """log p(candidate | text) from a pass of its own, with labels as in training."""
    inputs = tokenizer(text, return_tensors="pt")
    labels = tokenizer(text_target=candidate, return_tensors="pt")["input_ids"]
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        output = model(**{name: inputs[name] for name in names}, labels=labels)
    return -float(output.loss) * labels.shape[1]


@pytest.mark.parametrize("kind", ["convt5", "t5"])
def test_label_scores_equal_those_of_passes_of_their_own(kind, model, tokenizer):
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
        config = T5Config(vocab_size=len(tokenizer), **sizes)
        config.decoder_start_token_id = 0
        model = T5ForConditionalGeneration(config).eval()
    texts = ["the good film", "the bad day good warm poor film", "sad"]
    candidates = [["positive", "negative"], ["positive", "Ann ate Bob", "Oslo"], ["the film"]]
    with torch.no_grad():
        found = score_candidates(model, tokenizer, texts, candidates, batch_size=2)
    for text, words, scores in zip(texts, candidates, found, strict=True):
        expected = [alone(model, tokenizer, text, word) for word in words]
        np.testing.assert_allclose(scores, expected, atol=LABEL_SCORES, rtol=0)


def test_the_result_does_not_depend_on_the_batch(model, tokenizer, files):
    rows = load(get_task("mnli"), files / "mnli").rows["train"]
    found = [predict(get_task("mnli"), model, tokenizer, rows, batch_size=size) for size in (1, 7)]
    for one, other in zip(*found, strict=True):
        assert one["prediction"] == other["prediction"]
        np.testing.assert_allclose(one["scores"], other["scores"], atol=LABEL_SCORES, rtol=0)
        assert sum(one["scores"]) == pytest.approx(1)


def test_prediction_leaves_the_model_in_training(model, tokenizer, files):
    rows = load(get_task("sst2"), files / "sst2").rows["train"]
    model.train()
    try:
        predict(get_task("sst2"), model, tokenizer, rows)
        assert model.training
    finally:
        model.eval()


def test_batches_hold_every_row_once():
    sizes = [3, 1, 9, 2, 2, 4]
    found = batches(["x" * i for i in range(6)], sizes, most=5, rows=2)
    assert sorted(i for batch in found for i in batch) == list(range(6))
    for batch in found:
        assert len(batch) == 1 or (len(batch) <= 2 and sum(sizes[i] for i in batch) <= 5)
    assert batches([], [], 5, 2) == []


def test_label_words_that_a_model_cannot_tell_apart_are_refused(tokenizer):
    good, far = (custom_task([a, "negative"], "text", "label") for a in ("positive", "好"))
    check_words(good, "generate", tokenizer)
    check_words(far, "score", tokenizer)
    with pytest.raises(ValueError, match="'好' has characters that the tokenizer lacks"):
        check_words(far, "generate", tokenizer)
    alike = custom_task(["好", "坏"], "text", "label")
    with pytest.raises(ValueError, match="'好' and '坏' are the same tokens"):
        check_words(alike, "score", tokenizer)
    assert check_words(alike, "head", tokenizer) == []
    (note,) = check_words(replace(alike, name="sst2"), "score", tokenizer)
    assert "are the same tokens" in note


def test_generated_words_are_read_as_they_are_written():
    task = custom_task(["Good", "good", "very  good", "Bad"], "text", "label")
    texts = ["Good", "good", "very good", "bad", "GOOD", "none"]
    assert [from_text(task, text) for text in texts] == [0, 1, 2, 3, INVALID, INVALID]


def test_a_diverged_model_is_named():
    with pytest.raises(ValueError, match="computes NaN"):
        from_scores(custom_task(["a", "b"], "text", "label"), ["a", "b"], np.array([np.nan, 0]))


def test_methods_are_checked():
    assert check_method(get_task("sst2"), None) == "score"
    assert check_method(get_task("cogs"), None) == "generate"
    with pytest.raises(ValueError, match="method='head' does not answer task 'cogs'.*generate"):
        check_method(get_task("cogs"), "head")


def run(folder, files, output, *tasks, more=()):
    arguments = ["--model", str(folder), "--tasks", *tasks, "--data_dir", str(files)]
    return main([*arguments, "--output_dir", str(output), *more])


def test_several_tasks(folder, files, tmp_path, capsys):
    tasks = ("sst2", "mnli", "record", "multirc", "squad", "stsb")
    assert run(folder, files, tmp_path, *tasks) == 0
    records = read_results(tmp_path / "results.json")
    assert [record["task"] for record in records] == list(tasks)
    for record in records:
        task = get_task(record["task"])
        assert set(task.metrics) <= set(record["metrics"])
        assert set(record["confidence_95"]) >= set(task.metrics)
        for low, high in record["confidence_95"].values():
            assert low <= high
        assert record["evaluated_on"] == "validation"  # hidden test labels
        for split, count in record["rows"].items():
            lines = (tmp_path / task.name / f"predictions_{split}.jsonl").read_text().splitlines()
            assert len(lines) == count
        assert json.loads((tmp_path / task.name / "results.json").read_text()) == record
    printed = capsys.readouterr().out
    assert "sst2: accuracy" in printed and "officially 67349" in printed
    assert "validation_mismatched_accuracy" in records[1]["metrics"]
    assert "command" in records[0] and records[0]["rows"]["test"] == 12


def test_predictions_of_sst2(folder, files, tmp_path):
    assert run(folder, files, tmp_path, "sst2") == 0
    (record,) = read_results(tmp_path / "results.json")
    lines = (tmp_path / "sst2" / "predictions_validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    right = np.mean([row["prediction"] == row["target"] for row in rows])
    assert record["metrics"]["accuracy"] == {"mean": right, "std": 0.0, "per_seed": [right]}
    for row in rows:
        assert row["label_word"] == get_task("sst2").words[row["prediction"]]


def test_generation_by_type(folder, files, tmp_path):
    more = ["--splits", "test", "gen", "--max_rows", "4"]
    assert run(folder, files, tmp_path, "cogs", more=more) == 0
    (record,) = read_results(tmp_path / "results.json")
    assert set(record["metrics"]) == {
        "exact_match",
        "gen_exact_match",
        "gen_exact_match/cp_recursion",
        "gen_exact_match/prim_to_subj_proper",
    }
    assert record["rows"] == {"test": 4, "gen": 4}
    assert "at most 4 rows of each split evaluated" in record["notes"]


@pytest.mark.parametrize(
    ("task", "cls", "fields"),
    [
        ("sst2", ConvT5ForSequenceClassification, {"num_labels": 2}),
        ("stsb", ConvT5ForSequenceClassification, {"num_labels": 1}),
        ("squad", ConvT5ForQuestionAnswering, {}),
    ],
)
def test_heads(task, cls, fields, files, tmp_path):
    texts = texts_of(task, folder=files)
    save_tiny_model(tmp_path / "model", texts, cls, **fields)
    assert run(tmp_path / "model", files, tmp_path / "out", task) == 0
    (record,) = read_results(tmp_path / "out" / "results.json")
    assert record["method"] == "head"
    if task == "squad":  # an answer is a span of the context
        context = load(get_task(task), files / task).rows["validation"][0]["context"]
        lines = (tmp_path / "out" / task / "predictions_validation.jsonl").read_text()
        assert json.loads(lines.splitlines()[0])["prediction"] in context


def test_custom_files_take_the_models_label_words(tmp_path):
    rows = [{"review": "good", "mood": "up"}, {"review": "bad", "mood": "down"}]
    write_jsonl(tmp_path / "test.jsonl", rows)
    fields = {"id2label": {0: "down", 1: "up"}, "label2id": {"down": 0, "up": 1}}
    save_tiny_model(tmp_path / "model", ["good bad up down"], **fields)
    arguments = ["--model", str(tmp_path / "model"), "--tasks", "custom", "--output_dir"]
    columns = ["--text_column", "review", "--label_column", "mood"]
    files = ["--test_file", str(tmp_path / "test.jsonl")]
    assert main([*arguments, str(tmp_path / "out"), *files, *columns]) == 0
    (record,) = read_results(tmp_path / "out" / "results.json")
    assert record["rows"] == {"test": 2}
    assert main([*arguments, str(tmp_path / "out")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "sst2", "--splits", "gen"], "splits=['gen'] are not there"),
        (["--tasks", "cogs", "--method", "score"], "method='score' does not answer task 'cogs'"),
        (["--tasks", "imdb"], "holds no file of task 'imdb'"),
        (["--tasks", "sst2", "--test_file", "a.tsv"], "are of --tasks custom"),
    ],
)
def test_refusals_exit_with_2(folder, files, tmp_path, capsys, arguments, message):
    more = ["--model", str(folder), "--data_dir", str(files), "--output_dir", str(tmp_path)]
    assert main([*arguments, *more]) == 2
    assert message in capsys.readouterr().err


def test_fine_tunings_results_are_not_overwritten(folder, files, tmp_path, capsys):
    write_json(tmp_path / "results.json", a_record(command="python examples/finetune.py"))
    arguments = ["--model", str(folder), "--data_dir", str(files), "--tasks", "sst2"]
    assert main([*arguments, "--output_dir", str(tmp_path)]) == 2
    assert "holds the results of `python examples/finetune.py`" in capsys.readouterr().err


def test_commands_are_recorded_without_tokens(monkeypatch):
    words = ["finetune.py", "--hub_token", "hf_1", "--token=hf_2", "--model", "a b"]
    monkeypatch.setattr("sys.argv", words)
    command = this_command()
    assert "hf_" not in command
    assert command.endswith(" --hub_token '***' '--token=***' --model 'a b'")


def test_as_a_module(folder, files, tmp_path):
    command = [sys.executable, "-m", "evaluation.run", "--model", str(folder), "--tasks", "sst2"]
    more = ["--data_dir", str(files), "--output_dir", str(tmp_path), "--max_rows", "2"]
    done = subprocess.run([*command, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (record,) = read_results(tmp_path / "results.json")
    assert record["command"].startswith("python -m evaluation.run --model ")


def a_record(**fields):
    metrics = summarise([{"accuracy": 0.5}, {"accuracy": 0.75}])
    record = {"task": "sst2", "model": "m", "metrics": metrics, "rows": {"test": 4}, "command": "c"}
    return {**record, **fields}


def test_summary_of_seeds():
    assert summarise([{"a": 0.5}, {"a": 0.75}])["a"] == {
        "mean": 0.625,
        "std": pytest.approx(0.1767766952966369),
        "per_seed": [0.5, 0.75],
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": None}, "has no 'task' of type str"),
        ({"rows": 3}, "has no 'rows' of type dict"),
        ({"metrics": {"accuracy": 0.5}}, "expected mean, std and per_seed"),
        ({"metrics": {"a": {"mean": 0.9, "std": 0, "per_seed": [0.5]}}}, "not typed by hand"),
        ({"metrics": {"a": {"mean": 0.5, "std": 0.1, "per_seed": [0.5]}}}, "not typed by hand"),
        ({"metrics": {"a": {"mean": 0.5, "std": 0, "per_seed": 5}}}, "expected mean, std and per"),
        ({"task": "../x"}, "expected letters, digits"),
        ({"evaluated_on": ["test"]}, "expected a split"),
        ({"metrics": {"a": {"mean": float("nan"), "std": 0, "per_seed": [1]}}}, "finite numbers"),
    ],
)
def test_results_files_are_checked(tmp_path, fields, message):
    write_json(tmp_path / "results.json", a_record(**fields))
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "results.json")


def test_leaderboard_files_from_the_results_file():
    record = a_record(evaluated_on="validation")
    (path, text), *_ = eval_results([record], date="2026-01-01").items()
    assert path == ".eval_results/sst2.yaml"
    assert yaml.safe_load(text) == [
        {
            "dataset": {"id": "nyu-mll/glue", "task_id": "sst2"},
            "value": 0.625,
            "date": "2026-01-01",
            "notes": "accuracy, 2 seed(s), validation rows",
        }
    ]
    (entry,) = model_index([record])
    assert (entry.dataset_type, entry.dataset_config) == ("nyu-mll/glue", "sst2")
    assert (entry.metric_type, entry.metric_value) == ("accuracy", 0.625)
    assert entry.dataset_split == "validation"
    assert all(len(data_set(name)) == 3 for name in (*TASKS, "custom"))
