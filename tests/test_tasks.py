"""The task table and the readers of its files: official layouts, encodings, and clear refusals."""

import json
import os
from pathlib import Path

import pytest
from task_files import WRITERS, write_csv, write_jsonl, write_lines, write_task, write_tsv

from evaluation.data import count_duplicates, is_labelled, load, read_file, read_label
from evaluation.splits import load_task
from evaluation.tasks import ANSWERED_BY, PAPER, TASKS, TREC_FINE, custom_task, get_task

REAL = os.environ.get("CONVT5_TEST_DATA")
CONTRACT = (
    "civil_comments wiki_toxicity imdb sst2 sentiment140 trec trec_fine ag_news cogs mnli squad"
)
GLUE = "cola sst2 mrpc stsb qqp mnli qnli rte wnli ax"
SUPERGLUE = "boolq cb copa multirc record rte wic wsc axb axg"


def test_every_task_is_there():
    assert set(f"{CONTRACT} {GLUE} {SUPERGLUE}".split()) == set(TASKS) == set(WRITERS)
    assert {task.name for task in PAPER} == set(CONTRACT.split())
    assert len(TREC_FINE) == 50 and len(set(TREC_FINE)) == 50
    with pytest.raises(ValueError, match="task='sst' is not known.*sst2"):
        get_task("sst")


@pytest.mark.parametrize("name", TASKS)
def test_official_files(name, tmp_path):
    task = get_task(name)
    data = load(task, write_task(tmp_path, name))
    assert set(data.rows) == set(task.rows)
    for split, rows in data.rows.items():
        assert rows
        for row in rows:
            text = task.input_text(row)
            assert "{" not in text and len(text) > 8
            if row["label"] is not None:
                target = task.target_text(row)
                assert target and (not task.words or target in task.words)
                candidates = task.candidates(row)
                assert candidates is None or target in candidates
        if "test" not in split or name not in f"{GLUE} {SUPERGLUE}".split():
            assert is_labelled(rows), split
    # Official sizes are not met by a fixture: each split's is reported.
    assert sum("officially" in note for note in data.notes) == len(task.rows)


@pytest.mark.parametrize("name", TASKS)
def test_the_table_is_whole(name):
    task = get_task(name)
    assert task.hub is None if name == "cogs" else len(task.hub) == 3
    assert name in ANSWERED_BY or "train" in task.rows
    assert len(set(task.words)) == len(task.words)
    for column in task.columns:
        assert f"{{{column}}}" in task.template


def _rows(task, path):
    notes = []
    return read_file(get_task(task), path, notes), notes


def test_civil_comments_threshold(tmp_path):
    shares = (0.0, 0.49, 0.5, 1.0)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "toxicity": share} for share in shares])
    rows, _ = _rows("civil_comments", tmp_path / "a.jsonl")
    assert [row["label"] for row in rows] == [0, 0, 1, 1]


def test_rows_that_count_for_nothing_are_left_out(tmp_path):
    rows = [("x", 0), ("y", -1), ("z", 1)]
    write_csv(tmp_path / "a.csv", rows, ["comment_text", "toxic"])
    rows, notes = _rows("wiki_toxicity", tmp_path / "a.csv")
    assert [row["label"] for row in rows] == [0, 1]
    assert notes == ["a.csv: 1 rows without a label left out"]


def test_sentiment140_encodings(tmp_path):
    write_csv(tmp_path / "a.csv", [(0, "x"), (4, "y"), (2, "z"), ("polarity", "tweet"), (4, "w")])
    rows, notes = _rows("sentiment140", tmp_path / "a.csv")
    assert [row["label"] for row in rows] == [0, 1, 1]
    assert notes == ["a.csv: 2 rows without one of the task's classes left out"]
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "label": label} for label in (0, 1)])
    assert [row["label"] for row in _rows("sentiment140", tmp_path / "b.jsonl")[0]] == [0, 1]


def test_sentiment140_official_csv_is_latin1(tmp_path):
    rows = load(get_task("sentiment140"), write_task(tmp_path, "sentiment140")).rows["train"]
    assert rows[0]["text"].startswith("café, ")


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("a.csv", (1, 2, 3, 4), [0, 1, 2, 3]),
        ("b.csv", (0, 3), [0, 3]),
        ("a.csv", (3, 2), [2, 1]),  # official numbering although 4 does not occur
        ("b.jsonl", (0, 3), [0, 3]),
        ("b.jsonl", (1, 3), [1, 3]),
        ("b.jsonl", (1, 4), [0, 3]),
        ("b.jsonl", ("World", "Sci/Tech"), [0, 3]),
    ],
)
def test_ag_news_numbering(tmp_path, name, labels, expected):
    if name.endswith("csv"):
        write_csv(tmp_path / name, [(label, "Up", "and so on") for label in labels])
    else:
        write_jsonl(tmp_path / name, [{"text": "t", "label": label} for label in labels])
    rows, _ = _rows("ag_news", tmp_path / name)
    assert [row["label"] for row in rows] == expected
    if name == "a.csv":
        assert rows[0]["text"] == "Up and so on"


def test_ag_news_kaggle_header(tmp_path):
    header = ["Class Index", "Title", "Description"]
    write_csv(tmp_path / "a.csv", [(3, "Up", "Shares, and"), (1, "x", "y")], header)
    rows, _ = _rows("ag_news", tmp_path / "a.csv")
    assert rows[0] == {"text": "Up Shares, and", "label": 2}


@pytest.mark.parametrize("ending", ["tsv", "csv", "txt", "label"])
def test_trec_raw_lines(tmp_path, ending):
    write_lines(tmp_path / f"a.{ending}", ["DESC:manner How, did it ?", "NUM:date When ?"])
    coarse, _ = _rows("trec", tmp_path / f"a.{ending}")
    fine, _ = _rows("trec_fine", tmp_path / f"a.{ending}")
    assert [row["label"] for row in coarse] == [2, 5]
    assert [TREC_FINE[row["label"]] for row in fine] == ["DESC:manner", "NUM:date"]
    assert coarse[0]["text"] == "How, did it ?"


def test_trec_columns(tmp_path):
    rows = [{"text": "How ?", "coarse_label": 2, "fine_label": 26}, {"text": "?", "label": "HUM"}]
    write_jsonl(tmp_path / "a.jsonl", rows[:1])
    assert _rows("trec", tmp_path / "a.jsonl")[0][0]["label"] == 2
    assert TREC_FINE[_rows("trec_fine", tmp_path / "a.jsonl")[0][0]["label"]] == "DESC:manner"
    write_jsonl(tmp_path / "b.jsonl", rows[1:])
    assert _rows("trec", tmp_path / "b.jsonl")[0][0]["label"] == 3


def test_words_numbers_and_truth_values():
    assert read_label(get_task("mnli"), "Neutral") == 1
    assert read_label(get_task("mnli"), "2") == 2
    assert read_label(get_task("mnli"), -1) is None
    assert read_label(get_task("boolq"), True) == 1
    assert read_label(get_task("boolq"), "false") == 0
    assert read_label(get_task("stsb"), "3.25") == 3.25
    assert read_label(get_task("imdb"), "pos") == 1
    assert read_label(get_task("sst2"), 1.0) == 1
    assert read_label(get_task("sentiment140"), 4.0) == 1
    assert read_label(get_task("ag_news"), "3.0", shift=1) == 2
    assert read_label(get_task("sst2"), float("nan")) is None
    with pytest.raises(ValueError, match="label inf is none of"):
        read_label(get_task("sst2"), float("inf"))
    mine = custom_task(["Pos", "neg", "pos", "3.0"], "text", "label")
    assert [read_label(mine, word) for word in ("pos", "Pos", "NEG", 3.0)] == [2, 0, 1, 3]


@pytest.mark.parametrize("name", ["squad", "record", "multirc"])
def test_the_hubs_flat_layout(tmp_path, name):
    row = {
        "squad": {
            "id": "1",
            "question": "Who?",
            "context": "Ann ran.",
            "answers": {"text": ["Ann"], "answer_start": [0]},
        },
        "record": {
            "query": "@placeholder ran",
            "passage": "Ann ran",
            "entities": ["Ann", "Bob"],
            "answers": ["Ann"],
            "idx": {"passage": 0, "query": 1},
        },
        "multirc": {
            "paragraph": "Ann ran",
            "question": "Who?",
            "answer": "Ann",
            "label": 1,
            "idx": {"paragraph": 0, "question": 0, "answer": 0},
        },
    }[name]
    write_jsonl(tmp_path / "a.jsonl", [row])
    (found,), _ = _rows(name, tmp_path / "a.jsonl")
    assert get_task(name).target_text(found) in ("Ann", "True")


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "json"])
def test_formats(tmp_path, kind, ending):
    text, path = 'a "quoted" text, with a comma\u2028and more', tmp_path / f"train.{kind}{ending}"
    rows = [{"sentence": text, "label": 1}, {"sentence": "b", "label": 0}]
    if kind == "csv":
        write_csv(tmp_path / "plain.csv", [row.values() for row in rows], ["sentence", "label"])
        write_lines(path, (tmp_path / "plain.csv").read_text("utf-8").strip("\n").split("\n"))
    elif kind == "tsv":
        write_lines(path, ["sentence\tlabel", f"{text}\t1", "b\t0"])
    elif kind == "jsonl":
        write_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])
    else:
        write_lines(path, [json.dumps(rows, indent=1)])
    found, _ = _rows("sst2", path)
    assert found == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "sentence\tlabel\nx\t1\ny\n", "line 3 has 1 columns, expected 2"),
        ("a.tsv", "sentence\tlabel\nx\t7\n", "line 2: label '7' is none of task 'sst2'"),
        ("a.tsv", "words\tclass\nx\t1\n", "names none of sentence"),
        ("a.tsv", "sentence\nx\n", None),
        ("a.csv", "label,other\n1,2\n", "names none of sentence"),
        ("a.jsonl", '{"sentence": "x", "label": 1}\n{"sentence"\n', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is .*expected an object"),
        ("a.jsonl", '{"label": 1}\n', "line 1 has no column 'sentence'"),
        ("a.jsonl", '{"sentence": null, "label": 1}\n', "line 1: its 'sentence' is empty"),
        ("a.tsv", "sentence\tlabel\tlabel\nx\t1\t0\n", "its header names 'label' twice"),
        ("a.tsv.gz", "sentence\tlabel\nx\t1\n", "is damaged, or not a .gz file"),
        ("a.json", '{"data": 3,\n"x": 4}', "holds neither a list"),
        ("a.xml", "<x/>", "of no known format"),
        (
            "a.jsonl",
            '{"sentence": "\\ud800", "label": 1}\n',
            "line 1: 'sentence' holds half a char",
        ),
        ("a.jsonl", '{"sentence": "x", "Sentence": "y"}\n', "line 1 has 'sentence' twice"),
        ("a.jsonl", '{"sentence": NaN, "label": 1}\n', "line 1: its 'sentence' is empty"),
        ("a.tsv", "sentence\tlabel\n", "holds no rows"),
        ("a.parquet", "PAR1", "is damaged, or no parquet file"),
    ],
)
def test_refusals_name_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    if message is None:  # no label column: hidden labels
        assert _rows("sst2", tmp_path / name)[0] == [{"sentence": "x", "label": None}]
        return
    with pytest.raises(ValueError, match=message) as caught:
        _rows("sst2", tmp_path / name)
    assert name in str(caught.value)


def test_cut_archives_are_refused(tmp_path):
    write_lines(tmp_path / "train.tsv.gz", ["sentence\tlabel", "x\t1"])
    whole = (tmp_path / "train.tsv.gz").read_bytes()
    (tmp_path / "train.tsv.gz").write_bytes(whole[:-6])
    with pytest.raises(ValueError, match="train.tsv.gz is damaged"):
        _rows("sst2", tmp_path / "train.tsv.gz")
    (tmp_path / "TRAIN.TSV.GZ").write_bytes(whole)
    assert _rows("sst2", tmp_path / "TRAIN.TSV.GZ")[0] == [{"sentence": "x", "label": 1}]


def test_broken_lines_of_the_official_qqp_are_left_out(tmp_path):
    header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
    write_tsv(
        tmp_path / "train.tsv", [(1, 2, 3, "a", "b", 0), (4, 5, 6), (7, 8, 9, "c", "d", 1)], header
    )
    rows, notes = _rows("qqp", tmp_path / "train.tsv")
    assert [row["label"] for row in rows] == [0, 1]
    assert "line 3 has 3 columns, expected 6" in notes[0]


def test_jigsaws_labels_are_found_in_their_own_file(tmp_path):
    columns = ["id", "comment_text"]
    write_csv(tmp_path / "train.csv", [("a", "x", 1)], [*columns, "toxic"])
    write_csv(tmp_path / "test.csv", [("b", "one,\ntwo"), ("c", "y"), ("d", "z")], columns)
    labels = [("d", 1), ("c", -1), ("b", 0)]
    write_csv(tmp_path / "test_labels.csv", labels, ["id", "toxic"])
    data = load(get_task("wiki_toxicity"), tmp_path)
    assert [(row["text"], row["label"]) for row in data.rows["test"]] == [
        ("one,\ntwo", 0),
        ("z", 1),
    ]
    assert any("1 rows without a label left out" in note for note in data.notes)


def test_an_empty_answer_is_a_hidden_one(tmp_path):
    write_csv(tmp_path / "a.csv", [("q", "c", "")], ["question", "context", "answers"])
    assert _rows("squad", tmp_path / "a.csv")[0][0]["label"] is None


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        _rows("sst2", tmp_path / "train.tsv")


def test_folders_without_the_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no file of task 'sst2'.*validation"):
        load(get_task("sst2"), tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        load(get_task("sst2"), tmp_path / "missing")
    for name in ("train.tsv", "train.csv"):
        write_lines(tmp_path / name, ["sentence\tlabel", "x\t1"])
    with pytest.raises(ValueError, match=r"train\.csv and train\.tsv"):
        load(get_task("sst2"), tmp_path)
    with pytest.raises(ValueError, match="'cogs' has no data set on the Hub: pass --data_dir"):
        load(get_task("cogs"))


def test_a_folder_of_tasks(tmp_path):
    write_task(tmp_path / "sst2", "sst2")
    assert load(get_task("sst2"), tmp_path).rows["train"]


def test_duplicates_are_counted():
    rows = {
        "train": [{"sentence": "a  b"}, {"sentence": "c"}],
        "test": [{"sentence": "a b "}, {"sentence": "d"}],
    }
    expected = ["test: 1 of 2 inputs are also training inputs"]
    assert count_duplicates(get_task("sst2"), rows) == expected


def test_custom_columns(tmp_path):
    write_tsv(tmp_path / "a.tsv", [("x", "Up"), ("y", "Down")], ["Review", "Trend"])
    task = custom_task(["Down", "Up"], "Review", "Trend")
    assert [row["label"] for row in read_file(task, tmp_path / "a.tsv", [])] == [1, 0]


def custom(tmp_path, labels, test=()):
    """Task `custom` and its rows, from files with these labels as JSON has them."""
    files = []
    for name, some in (("train", labels), ("test", test)):
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [{"text": f"{name} {i}", "label": label} for i, label in enumerate(some)],
        )
        files.append(str(tmp_path / f"{name}.jsonl") if some else None)
    return load_task("custom", None, (files[0], None, files[1]))


def test_ones_own_numbers_are_compared_as_numbers(tmp_path):
    task, data = custom(tmp_path, [10, 9.0, "1"], ["1.0", 10, 9])
    assert task.words == ("1", "9", "10")
    assert [row["label"] for row in data.rows["test"]] == [0, 2, 1]
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: label 0 is none of .* 1, 2, 3"):
        custom(tmp_path, [1, 2, 3], [0, 1])
    task, data = custom(tmp_path, ["007", "7", "1.10", "1.1"], ["1.10", "007"])  # names, not sizes
    assert [task.words[row["label"]] for row in data.rows["test"]] == ["1.10", "007"]
    _, data = custom(tmp_path, [-1.0, 0.0, 1.0], [-1, 0, 1])
    assert [row["label"] for row in data.rows["test"]] == [0, 1, 2]


def test_missing_labels_of_ones_own_file_are_left_out(tmp_path):
    task, data = custom(tmp_path, ["a", float("nan"), "b", "NaN", None], ["b", "a"])
    assert task.words == ("a", "b") and len(data.rows["train"]) == 2
    assert "train: 3 rows without a label left out" in data.notes
    write_jsonl(tmp_path / "test.jsonl", [{"text": "x", "gold": "a"}])
    files = (str(tmp_path / "train.jsonl"), None, str(tmp_path / "test.jsonl"))
    with pytest.raises(ValueError, match=r"line 1 has no label: its columns are text, gold"):
        load_task("custom", None, files)
    write_jsonl(tmp_path / "test.jsonl", [{"text": "train 0", "label": "a"}])
    notes = load_task("custom", None, files)[1].notes
    assert "test: 1 of 1 inputs are also training inputs" in notes


def test_a_split_whose_labels_have_another_name_is_told(tmp_path):
    write_tsv(tmp_path / "test.tsv", [("x", 1)], ["sentence", "gold"])
    _, notes = _rows("sst2", tmp_path / "test.tsv")
    (note,) = notes
    assert "columns are sentence, gold; a label would be called label or sentiment" in note


def test_questions_without_an_answer_are_left_out(tmp_path):
    rows = [
        {"question": "?", "context": "Ann", "answers": {"text": texts, "answer_start": []}}
        for texts in (["Ann"], [])
    ]
    write_jsonl(tmp_path / "dev.jsonl", rows)
    found, notes = _rows("squad", tmp_path / "dev.jsonl")
    assert len(found) == 1 and "1 rows without a label left out" in notes[0]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("squad", {"paragraphs": [{"context": "c"}]}),
        ("squad", {"question": "?", "context": "c", "answers": {"answer_start": [4]}}),
        ("squad", {"question": "?", "context": "c", "answers": {"text": "d"}}),
        ("squad", {"question": "?", "context": "c", "answers": 5}),
        ("multirc", {"idx": 0, "passage": {"text": "t", "questions": ["q"]}}),
        ("record", {"idx": 0, "passage": {"text": "t", "entities": []}}),
        ("record", {"passage": "t", "query": "q", "entities": [], "answers": ["a"]}),
        ("wsc", {"text": "t", "target": "x"}),
    ],
)
def test_rows_nested_in_another_way_are_named(tmp_path, name, row):
    write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1"):
        _rows(name, tmp_path / "a.jsonl")


def test_numbers_of_trecs_older_copies_are_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "?", "label-coarse": "DESC"}])
    assert _rows("trec", tmp_path / "a.jsonl")[0][0]["label"] == 2
    write_jsonl(tmp_path / "a.jsonl", [{"text": "?", "label-coarse": 0}])
    with pytest.raises(ValueError, match="line 1: the label 0 is a number of an older copy"):
        _rows("trec", tmp_path / "a.jsonl")


@pytest.mark.skipif(not REAL, reason="CONVT5_TEST_DATA names no folder of real data sets")
def test_real_files():
    sizes = {"sst2": (67349, 872, 1821), "cogs": (24155, 3000, 3000), "imdb": (25000, 25000)}
    for name, expected in sizes.items():
        data = load(get_task(name), Path(REAL) / name)
        found = tuple(len(data.rows[s]) for s in ("train", "validation", "test") if s in data.rows)
        assert found == expected
        assert not any("officially" in note for note in data.notes)
    assert len(load(get_task("sentiment140"), Path(REAL) / "s140").rows["test"]) == 359
    squad = read_file(get_task("squad"), Path(REAL) / "xquad" / "xquad.en.json", [])
    assert len(squad) == 1190
    for row in squad:
        start = row["answer_starts"][0]
        assert row["context"][start : start + len(row["answers"][0])] == row["answers"][0]
