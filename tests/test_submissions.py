"""Leaderboard files: the official sizes, and malformed files refused with their line."""

import json
import zipfile

import pytest

from evaluation import submissions
from evaluation.submissions import GLUE, SUPERGLUE, check_glue, check_squad, check_superglue, main
from evaluation.tasks import get_task

SQUAD_IDS = [f"id{i}" for i in range(30)]


def predictions(folder, files):
    """What evaluation.run would have written for the official test files."""
    for file in files.values():
        task, rows = get_task(file.task), []
        for i in range(file.rows):
            index, prediction = i, i % max(1, len(task.words))
            if task.kind == "similarity":
                prediction = i % 50 / 10
            elif task.kind == "entity":
                index, prediction = {"passage": i // 2, "query": i}, f"Ann {i}"
            elif file.labels == "nested":
                index = {"paragraph": i // 60, "question": i // 6, "answer": i}
            rows.append(json.dumps({"index": index, "prediction": prediction}))
        path = folder / file.task / f"predictions_{file.split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(rows))


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    predictions(folder, GLUE)
    arguments = ["write", "--benchmark", "glue", "--predictions", str(folder)]
    assert main([*arguments, "--output", str(folder / "glue.zip")]) == 0
    return folder / "glue.zip"


@pytest.fixture(scope="module")
def superglue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("superglue")
    predictions(folder, SUPERGLUE)
    arguments = ["write", "--benchmark", "superglue", "--predictions", str(folder)]
    assert main([*arguments, "--output", str(folder / "superglue.zip")]) == 0
    return folder / "superglue.zip"


@pytest.fixture
def squad(tmp_path):
    rows = [{"id": i, "question": "?", "context": "Ann", "answers": []} for i in SQUAD_IDS]
    (tmp_path / "dev.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    folder = tmp_path / "out" / "squad"
    folder.mkdir(parents=True)
    lines = [json.dumps({"id": i, "prediction": f"the {i} Ü"}) for i in SQUAD_IDS]
    (folder / "predictions_validation.jsonl").write_text("\n".join(lines))
    arguments = ["--predictions", str(folder.parent), "--output", str(tmp_path / "answers.json")]
    data = ["--data", str(tmp_path / "dev.jsonl")]
    assert main(["write", "--benchmark", "squad", *arguments, *data]) == 0
    return tmp_path / "answers.json"


def test_official_files_and_sizes(glue, superglue):
    with zipfile.ZipFile(glue) as archive:
        assert len(archive.namelist()) == 11
        lines = {name: archive.read(name).decode().splitlines() for name in GLUE}
    assert {name: len(rows) - 1 for name, rows in lines.items()} == {
        "AX.tsv": 1104,
        "CoLA.tsv": 1063,
        "MNLI-mm.tsv": 9847,
        "MNLI-m.tsv": 9796,
        "MRPC.tsv": 1725,
        "QNLI.tsv": 5463,
        "QQP.tsv": 390965,
        "RTE.tsv": 3000,
        "SST-2.tsv": 1821,
        "STS-B.tsv": 1379,
        "WNLI.tsv": 146,
    }
    assert lines["MNLI-m.tsv"][:3] == ["index\tprediction", "0\tentailment", "1\tneutral"]
    assert lines["STS-B.tsv"][2] == "1\t0.100"
    with zipfile.ZipFile(superglue) as archive:
        assert len(archive.namelist()) == 10
        first = {name: json.loads(archive.read(name).splitlines()[1]) for name in SUPERGLUE}
    assert first["BoolQ.jsonl"] == {"idx": 1, "label": "true"}
    assert first["WSC.jsonl"] == {"idx": 1, "label": "True"}
    assert first["COPA.jsonl"] == {"idx": 1, "label": 1}
    assert first["RTE.jsonl"] == {"idx": 1, "label": "not_entailment"}
    assert first["ReCoRD.jsonl"] == {"idx": 1, "label": "Ann 1"}


@pytest.mark.parametrize("files", [GLUE, SUPERGLUE], ids=["glue", "superglue"])
def test_sizes_are_those_of_the_task_table(files):
    for name, file in files.items():
        assert file.rows == get_task(file.task).rows[file.split], name


def changed(path, tmp_path, name, change):
    """The archive with the lines of one file changed; `change` returns the new ones."""
    target = tmp_path / path.name
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for member in source.namelist():
            content = source.read(member)
            if member == name:
                content = change(content.split(b"\n"))
                content = None if content is None else b"\n".join(content)
            if content is not None:
                archive.writestr(member, content)
    return target


def put(number, line):
    return lambda lines: [*lines[: number - 1], line, *lines[number:]]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("WNLI.tsv", put(1, b"id\tlabel"), r"WNLI.tsv, line 1: 'id\\tlabel'"),
        ("WNLI.tsv", put(5, b"3"), "WNLI.tsv, line 5: 1 columns"),
        ("WNLI.tsv", put(5, b"3\t1\t1"), "WNLI.tsv, line 5: 3 columns"),
        ("WNLI.tsv", put(5, b""), "WNLI.tsv, line 5: 1 columns"),
        ("WNLI.tsv", put(5, b"2\t1"), "WNLI.tsv, line 5: index '2', expected 3"),
        ("WNLI.tsv", put(5, b"3.0\t1"), "WNLI.tsv, line 5: index '3.0'"),
        ("WNLI.tsv", put(5, b"3\tentailment"), "WNLI.tsv, line 5: 'entailment', expected 0 or 1"),
        ("RTE.tsv", put(3, b"1\t0"), "RTE.tsv, line 3: '0', expected entailment or"),
        ("MNLI-m.tsv", put(9, b"7\tNeutral"), "MNLI-m.tsv, line 9: 'Neutral'"),
        ("STS-B.tsv", put(2, b"0\t5.1"), "STS-B.tsv, line 2: '5.1', expected a number"),
        ("STS-B.tsv", put(2, b"0\tnan"), "STS-B.tsv, line 2: 'nan'"),
        (
            "WNLI.tsv",
            lambda lines: lines[:-2] + [b""],
            "line 146: ends after 145 rows, expected 146",
        ),
        ("WNLI.tsv", lambda lines: lines[:-1] + [b"146\t0"], "line 148: ends after 147 rows"),
        ("WNLI.tsv", put(4, b"2\t\xff"), "WNLI.tsv, line 4: not UTF-8"),
        ("WNLI.tsv", lambda lines: None, "lacks WNLI.tsv"),
    ],
)
def test_malformed_glue(glue, tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        check_glue(changed(glue, tmp_path, name, change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("CB.jsonl", put(2, b"{"), "CB.jsonl, line 2: not JSON"),
        ("CB.jsonl", put(2, b""), "CB.jsonl, line 2: not JSON"),
        ("CB.jsonl", put(2, b"[1]"), "CB.jsonl, line 2: .*expected an object"),
        ("CB.jsonl", put(2, b'{"idx": 1}'), "CB.jsonl, line 2: .*expected an object"),
        ("CB.jsonl", put(2, b'{"idx": "1", "label": "neutral"}'), "line 2: idx is '1'"),
        ("CB.jsonl", put(2, b'{"idx": 250, "label": "neutral"}'), "line 2: idx is 250"),
        ("CB.jsonl", put(2, b'{"idx": 0, "label": "neutral"}'), "line 2: idx 0 was there before"),
        ("CB.jsonl", put(2, b'{"idx": 1, "label": 1}'), "line 2: label is 1"),
        ("COPA.jsonl", put(2, b'{"idx": 1, "label": true}'), "COPA.jsonl, line 2: label is True"),
        ("BoolQ.jsonl", put(2, b'{"idx": 1, "label": "True"}'), "BoolQ.jsonl, line 2: label is 'T"),
        ("WSC.jsonl", put(2, b'{"idx": 1, "label": "true"}'), "WSC.jsonl, line 2: label is 'true'"),
        ("ReCoRD.jsonl", put(3, b'{"idx": 2, "label": " "}'), "ReCoRD.jsonl, line 3: label is ' '"),
        ("MultiRC.jsonl", put(1, b'{"idx": 0}'), "MultiRC.jsonl, line 1: KeyError"),
        ("MultiRC.jsonl", lambda lines: lines[1:], "MultiRC.jsonl, line 161: ends after 9633"),
        ("CB.jsonl", lambda lines: lines[1:], "CB.jsonl, line 249: ends after 249 rows"),
        ("CB.jsonl", lambda lines: None, "lacks CB.jsonl"),
    ],
)
def test_malformed_superglue(superglue, tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        check_superglue(changed(superglue, tmp_path, name, change))


def test_archives_with_something_else(glue, tmp_path):
    with pytest.raises(ValueError, match="not a zip file"):
        (tmp_path / "a.zip").write_text("index\tprediction")
        check_glue(tmp_path / "a.zip")
    content = bytearray(glue.read_bytes())
    content[200:240] = bytes(40)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match="not a zip file that can be read"):
        check_glue(tmp_path / "a.zip")
    target = changed(glue, tmp_path, "", None)
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which is no part of it"):
        check_glue(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-2], "not JSON"),
        (lambda lines: [b"[", b'"id0"', b"]"], "line 1: expected an object"),
        (put(4, b'"id2": 7,'), "line 4: the answer is 7"),
        (put(4, b'"id2": null,'), "line 4: the answer is None"),
        (put(4, b'"id1": "x",'), "line 4: id 'id1' was there before"),
        (put(4, b'"other": "x",'), "line 4: id 'other' is no question"),
        (put(4, b'"id2": "x"'), "line 5: not JSON"),
        (put(4, b'"id2": "\xff",'), "line 4: not UTF-8"),
        (lambda lines: [*lines[:3], *lines[4:]], "line 31: ends without id 'id2'"),
        (lambda lines: [b"{}"], "line 1: ends without id 'id0'"),
    ],
)
def test_malformed_squad(squad, tmp_path, change, message):
    squad.write_bytes(b"\n".join(change(squad.read_bytes().rstrip(b"\n").split(b"\n"))))
    with pytest.raises(ValueError, match=message):
        check_squad(squad, tmp_path / "dev.jsonl")


def test_missing_predictions_name_the_command(tmp_path, capsys):
    arguments = ["--predictions", str(tmp_path), "--output", str(tmp_path / "glue.zip")]
    assert main(["write", "--benchmark", "glue", *arguments]) == 2
    assert "python -m evaluation.run --tasks ax" in capsys.readouterr().err
    assert main(["check", "--benchmark", "glue", str(tmp_path / "none.zip")]) == 2


@pytest.mark.parametrize("line", ["3", "{}", '{"index": "x", "prediction": 0}', "{"])
def test_damaged_predictions_name_their_line(tmp_path, line):
    path = tmp_path / "ax" / "predictions_test.jsonl"
    path.parent.mkdir()
    path.write_text('{"index": 0, "prediction": 0}\n' + line)
    with pytest.raises(ValueError, match=r"predictions_test\.jsonl, line 2 is no prediction"):
        submissions.read_predictions(tmp_path, "ax", "test")
    path.write_text('{"index": 0, "prediction": 3}\n')
    with pytest.raises(
        ValueError, match="ax, test, index 0: prediction 3 is none of the 3 classes"
    ):
        submissions.write_glue(tmp_path, tmp_path / "glue.zip")


def test_the_place_to_write_to_is_checked_first(tmp_path, capsys):
    for output, message in ((tmp_path / "none" / "a.zip", "is not there"), (tmp_path, "a folder")):
        with pytest.raises(SystemExit):
            main(["write", "--benchmark", "glue", "--predictions", "x", "--output", str(output)])
        assert message in capsys.readouterr().err


def test_a_file_is_replaced_only_when_asked_and_only_by_a_good_one(tmp_path, capsys):
    (tmp_path / "glue.zip").write_text("mine")
    arguments = ["--predictions", str(tmp_path), "--output", str(tmp_path / "glue.zip")]
    with pytest.raises(SystemExit):
        main(["write", "--benchmark", "glue", *arguments])
    assert "glue.zip exists. Pass --overwrite" in capsys.readouterr().err
    (tmp_path / "squad").mkdir()
    lines = [{"index": 0, "id": "q1", "prediction": "a\u2028b"}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "squad" / "predictions_validation.jsonl").write_text(text, "utf-8")

    def data(*ids):
        qas = [
            {"id": i, "question": "q", "answers": [{"text": "a", "answer_start": 0}]} for i in ids
        ]
        articles = [{"title": "t", "paragraphs": [{"context": "a", "qas": qas}]}]
        (tmp_path / "dev.json").write_text(json.dumps({"version": "1.1", "data": articles}))

    arguments = ["write", "--benchmark", "squad", "--predictions", str(tmp_path), "--data"]
    arguments += [str(tmp_path / "dev.json"), "--output", str(tmp_path / "squad.json")]
    data("q1")
    assert main(arguments) == 0
    good = (tmp_path / "squad.json").read_text("utf-8")
    assert json.loads(good) == {"q1": "a\u2028b"}
    data("q1", "q2")
    assert main([*arguments, "--overwrite"]) == 2
    assert "squad.json, line" in capsys.readouterr().err
    assert (tmp_path / "squad.json").read_text("utf-8") == good
    assert not list(tmp_path.glob(".squad*"))


def test_many_faults_are_cut_short(glue, tmp_path):
    wrong = changed(glue, tmp_path, "QQP.tsv", lambda lines: [line + b"x" for line in lines])
    with pytest.raises(ValueError) as caught:
        check_glue(wrong)
    assert str(caught.value).count("\n") == submissions.SHOWN
