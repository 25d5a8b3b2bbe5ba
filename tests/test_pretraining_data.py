"""Text to records to batches: everything is read once, and what is left out is counted."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pretraining_runs as runs
import pyarrow
import pyarrow.parquet
import pytest

from pretraining import prepare as command
from pretraining import train_tokenizer
from pretraining.documents import find_sources, read
from pretraining.input_pipeline import Batches
from pretraining.prepare import prepare, verify
from pretraining.records import JoinedRows, TokenStream, is_prepared
from pretraining.settings import Settings
from pretraining.span_corruption import lengths
from pretraining.tokens import open_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = runs.make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return open_tokenizer(str(path))


@pytest.fixture(scope="module")
def records(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("records")
    prepare(str(runs.make_data(root / "text")), str(tokenizer.path), root / "records", workers=1)
    return str(root / "records")


def settings(**fields):
    return Settings(**{"batch_size": 4, "inputs_length": 32, "prefetch": 2, **fields})


def batches(records, tokenizer, places=range(4), split="train", **fields):
    return Batches(settings(**fields), tokenizer, records, split, np.array(places))


def first(batches, count):
    return [batch for _, batch in zip(range(count), batches, strict=False)]


def raw(batch, row, tokenizer):
    """The raw tokens of a row: each sentinel of the inputs replaced by what it hides."""
    hidden, tokens = {}, []
    special = range(tokenizer.first_sentinel_id - 19, tokenizer.first_sentinel_id + 1)
    for token in batch["labels"][row].tolist():
        if token in special:
            current = hidden.setdefault(token, [])
        elif token not in (-100, tokenizer.eos_token_id):
            current.append(token)
    for token in batch["input_ids"][row].tolist():
        if token not in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            tokens += hidden.get(token, [token])
    return tokens


# --- Records -------------------------------------------------------------------------------------


def test_records_hold_every_token_of_every_document(records, tokenizer):
    stream = TokenStream(records, "train")
    texts = runs.make_texts(120)[:100]
    expected = [tokenizer.tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    assert stream.read(0, len(stream)).tolist() == sum(expected, [])
    assert np.diff(stream.document_ends(), prepend=0).tolist() == [len(ids) for ids in expected]
    rows = JoinedRows(stream, 7)
    cut = [stream.read(*rows.pieces(row)[0]).tolist() for row in range(len(rows))]
    assert sum(cut, []) == sum(expected, [])[: 7 * len(rows)]


def test_processes_and_a_second_run_give_the_same_files(tmp_path, records, tokenizer):
    text = runs.make_data(tmp_path / "text")
    manifest = prepare(str(text), str(tokenizer.path), tmp_path / "records", workers=2)
    files = [name for parts in manifest["splits"].values() for p in parts for name in p["files"]]
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "records" / name).read_bytes() == (Path(records) / name).read_bytes()
    before = (tmp_path / "records" / "00000-train.tokens").stat().st_mtime_ns
    again = prepare(str(text), str(tokenizer.path), tmp_path / "records", workers=1)
    assert again == manifest
    assert (tmp_path / "records" / "00000-train.tokens").stat().st_mtime_ns == before
    assert verify(tmp_path / "records") == 6


def test_an_interrupted_preparation_goes_on(tmp_path, tokenizer, monkeypatch):
    text, output = runs.make_data(tmp_path / "text"), tmp_path / "records"
    real, calls = command._tokenise, []

    def killed(job, skipped):
        calls.append(job.number)
        if job.number == 1 and len(calls) == 2:
            raise KeyboardInterrupt
        return real(job, skipped)

    monkeypatch.setattr(command, "_tokenise", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(text), str(tokenizer.path), output, workers=1)
    assert not is_prepared(output)
    prepare(str(text), str(tokenizer.path), output, workers=1)
    assert calls == [0, 1, 1, 2]
    assert verify(output) == 6


def test_without_validation_files_documents_are_held_out_by_their_text(tmp_path, tokenizer):
    texts = runs.make_texts(2000)
    runs.write_jsonl(tmp_path / "text" / "a.jsonl", texts + texts[:500])
    runs.write_jsonl(tmp_path / "text" / "my-test.jsonl", texts)
    prepare(str(tmp_path / "text"), str(tokenizer.path), tmp_path / "records", workers=1)
    found = {}
    for split in ("train", "validation"):
        stream = TokenStream(tmp_path / "records", split)
        ends = stream.document_ends().tolist()
        starts = [0, *ends[:-1]]
        found[split] = [tuple(stream.read(*piece)) for piece in zip(starts, ends, strict=True)]
    assert len(found["train"]) + len(found["validation"]) == 2500
    assert 1 <= len(found["validation"]) <= 40
    assert not set(found["train"]) & set(found["validation"])


def test_special_tokens_in_a_text_are_text(tmp_path, tokenizer):
    """As for SentencePiece: else a page about T5 would end rows and open spans."""
    (tmp_path / "a.txt").write_text("ab </s> <pad> <extra_id_3> cd\r\n")
    prepare(str(tmp_path / "a.txt"), str(tokenizer.path), tmp_path / "records", workers=1)
    streams = [TokenStream(tmp_path / "records", split) for split in ("train", "validation")]
    (stream,) = [stream for stream in streams if len(stream)]
    found = stream.read(0, len(stream)).tolist()
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    special |= {tokenizer.first_sentinel_id - i for i in range(tokenizer.num_sentinels)}
    assert len(found) > 5 and not special & set(found)


def test_a_line_of_plain_text_is_the_document_that_json_has(tmp_path, tokenizer):
    texts = runs.make_texts(5)
    runs.write_jsonl(tmp_path / "json" / "a.jsonl", texts)
    (tmp_path / "a.txt").write_bytes("".join(f"{text}\r\n" for text in texts).encode())
    found = [
        list(read(source, Counter()))
        for name in ("json", "a.txt")
        for source in find_sources(str(tmp_path / name))
    ]
    assert found == [texts, texts]


def test_folders_name_the_split_as_files_do(tmp_path):
    for name in ("train/a.jsonl", "validation/a.jsonl", "test/a.jsonl", "latest/a.jsonl"):
        runs.write_jsonl(tmp_path / name, ["x"])
    found = {source.name: source.split for source in find_sources(str(tmp_path))}
    held_out = {"validation/a.jsonl": "validation"}
    assert found == {"latest/a.jsonl": "train", "train/a.jsonl": "train", **held_out}


def test_records_do_not_become_text(tmp_path, tokenizer):
    text = runs.make_data(tmp_path / "text")
    with pytest.raises(ValueError, match="lies inside of .*Choose a folder outside"):
        prepare(str(text), str(tokenizer.path), text / "records")


def test_stopped_workers_do_not_finish_their_sources(tmp_path, tokenizer):
    """A pre-empted machine has seconds, a file of C4 takes minutes."""
    text = tmp_path / "text"
    for name in "ab":
        runs.write_jsonl(text / f"{name}.jsonl", runs.make_texts(60_000))
    command = [sys.executable, "-m", "pretraining.prepare", "--data", str(text), "--workers", "2"]
    command += ["--tokenizer", str(tokenizer.path), "--output", str(tmp_path / "records")]
    process = subprocess.Popen(command, cwd=runs.ROOT)
    while not list(tmp_path.glob("records/*.incomplete")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert not list(tmp_path.glob("records/0*.json"))


def test_every_kind_of_file_is_read(tmp_path, tokenizer):
    texts, folder = runs.make_texts(40), tmp_path / "text"
    runs.write_jsonl(folder / "a.json.gz", texts[:10])
    runs.write_jsonl(folder / "b.jsonl", texts[10:20])
    table = pyarrow.table({"text": texts[20:30], "url": [""] * 10})
    pyarrow.parquet.write_table(table, folder / "sub.parquet")
    (folder / "d.txt").write_text("\n".join(texts[30:]) + "\n")
    (folder / "notes.md").write_text("not read")
    prepare(str(folder), str(tokenizer.path), tmp_path / "records", workers=1)
    streams = [TokenStream(tmp_path / "records", split) for split in ("train", "validation")]
    assert sum(len(stream.document_ends()) for stream in streams) == 40


def test_what_cannot_be_read_is_counted_and_the_rest_goes_on(tmp_path, tokenizer, capsys):
    folder, texts = tmp_path / "text", runs.make_texts(200)
    runs.write_jsonl(folder / "good.jsonl", texts[:50])
    runs.write_jsonl(folder / "torn.json.gz", texts[50:])
    whole = (folder / "torn.json.gz").read_bytes()
    (folder / "torn.json.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "no.json.gz").write_bytes(b"not gzip at all")
    (folder / "no.parquet").write_bytes(b"PAR1 nor this")
    lines = [b'{"text": "\xff\xfe"}', b"{", b"[1]", b'{"body": "x"}', b'{"text": "  "}']
    lines += [b'{"text": "ab \\ud800 cd"}', b"[" * 200_000]
    (folder / "nothing.txt.gz").write_bytes(b"")
    strings = [pyarrow.py_buffer(b) for b in (b"\0\0\0\0\3\0\0\0\6\0\0\0", b"ab\xffcde")]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, *strings])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), folder / "bytes.parquet")
    lines += [b'{"text": "abc"}', json.dumps({"text": "a " * 5_000_001}).encode()]
    lines += [json.dumps({"text": text}).encode() for text in texts[:3]]
    (folder / "odd.jsonl").write_bytes(b"\n".join(lines))
    manifest = prepare(str(folder), str(tokenizer.path), tmp_path / "records", workers=1)
    skipped = manifest["skipped"]
    assert skipped["odd.jsonl"] == {
        "line that is not UTF-8": 1,
        "line that is not a JSON object": 3,
        "document with half a character (a lone surrogate)": 1,
        "no text in the column 'text'": 1,
        "empty document": 1,
        "document of fewer than two tokens": 1,
        "document of more than 10,000,000 characters": 1,
    }
    assert skipped["nothing.txt.gz"] == {"file of no bytes": 1}
    assert skipped["bytes.parquet"]["document that is not UTF-8"] == 1
    for name in ("torn.json.gz", "no.json.gz", "no.parquet"):
        ((reason, count),) = skipped[name].items()
        assert reason.startswith("damaged file, read up to its fault") and count == 1
    documents = sum(p["documents"] for parts in manifest["splits"].values() for p in parts)
    assert documents >= 50 + 3 + 10  # half of the torn file was whole
    assert "torn.json.gz: left out 1 x damaged file" in capsys.readouterr().err


# --- Batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_has_every_row_once_and_gives_back_its_text(records, tokenizer, packing):
    made = batches(records, tokenizer, packing=packing)
    count = len(made.rows)
    found = first(made, -(-2 * count // 4))
    rows = np.concatenate([batch["rows"] for batch in found])
    for epoch in (rows[:count], rows[count : 2 * count]):
        assert sorted(epoch.tolist()) == list(range(count))
    assert rows[:count].tolist() != rows[count : 2 * count].tolist()
    for batch in found[:5]:
        assert all(array.dtype == np.int32 for array in batch.values())
        for at, row in enumerate(batch["rows"].tolist()):
            pieces = [made.stream.read(*piece).tolist() for piece in made.rows.pieces(row)]
            if packing:
                for number, piece in enumerate(pieces, 1):
                    part = {
                        "input_ids": batch["input_ids"][[at]][batch["segment_ids"][[at]] == number],
                        "labels": batch["labels"][[at]][
                            batch["decoder_segment_ids"][[at]] == number
                        ],
                    }
                    part = {name: array[None] for name, array in part.items()}
                    assert raw(part, 0, tokenizer) == piece
                    sizes = (part["input_ids"].shape[1], part["labels"].shape[1])
                    assert sizes == lengths(len(piece))
            else:
                assert raw(batch, at, tokenizer) == pieces[0]


def test_packed_rows_hold_whole_documents_or_even_parts(records, tokenizer):
    made = batches(records, tokenizer, packing=True)
    ends = set(made.stream.document_ends().tolist())
    pieces = [piece for row in range(len(made.rows)) for piece in made.rows.pieces(row)]
    assert pieces[0][0] == 0 and pieces[-1][1] == len(made.stream)
    assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False))
    assert ends <= {stop for _, stop in pieces}
    assert max(stop - start for start, stop in pieces) <= made.settings.raw_length
    assert any(len(made.rows.pieces(row)) > 1 for row in range(len(made.rows)))


@pytest.mark.parametrize("packing", [False, True])
def test_hosts_share_a_batch_whatever_their_number(records, tokenizer, packing):
    whole = first(batches(records, tokenizer, packing=packing), 3)
    for places in ([0, 1], [2, 3], [1], [0, 2, 3]):
        part = first(batches(records, tokenizer, places, packing=packing), 3)
        for one, other in zip(whole, part, strict=True):
            for name in one:
                assert np.array_equal(one[name][places], other[name])


def test_the_state_takes_up_any_batch(records, tokenizer):
    made = batches(records, tokenizer)
    data = iter(made)
    for _ in range(5):
        next(data)
    state = json.loads(json.dumps(data.get_state()))
    expected = first(data, 4)
    again = iter(batches(records, tokenizer))
    again.set_state(state)
    for one, other in zip(expected, first(again, 4), strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_seed_epoch_and_split_give_other_noise(records, tokenizer):
    one, same, other = (first(batches(records, tokenizer, seed=s), 1)[0] for s in (1, 1, 2))
    assert np.array_equal(one["input_ids"], same["input_ids"])
    assert not np.array_equal(one["rows"], other["rows"])
    made = batches(records, tokenizer)
    count = len(made.rows)
    found = first(made, -(-2 * count // 4))
    seen = {}
    for batch in found:
        for row, ids in zip(batch["rows"].tolist(), batch["input_ids"].tolist(), strict=True):
            seen.setdefault(row, []).append(ids)
    twice = [pair for pair in seen.values() if len(pair) >= 2]
    assert sum(pair[0] != pair[1] for pair in twice) > 0.9 * len(twice)


def test_validation_is_the_same_each_time_and_ends(records, tokenizer):
    made = batches(records, tokenizer, split="validation", eval_batches=3)
    found, again = list(made), list(made)
    assert 1 <= len(found) <= 3
    for one, other in zip(found, again, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    wide = batches(records, tokenizer, range(64), split="validation", batch_size=64)
    assert len(list(wide)) == 1  # fewer rows than a batch: repeated to fill it


def test_lengths_are_t5s(tmp_path, tokenizer):
    for inputs, targets, raw_length in ((512, 114, 568), (1024, 229, 1137)):
        found = Settings(inputs_length=inputs)
        assert (found.targets_length, found.raw_length) == (targets, raw_length)


def test_the_command_says_what_it_wrote_and_checks_it(tmp_path, tokenizer, capsys):
    text = runs.make_data(tmp_path / "text")
    output = tmp_path / "records"
    arguments = ["--data", text, "--tokenizer", tokenizer.path, "--output", output]
    assert command.main([str(a) for a in [*arguments, "--workers", 1, "--max_tokens", 10]]) == 0
    assert "train: 60 documents" in capsys.readouterr().out  # the second file was not needed
    assert command.main(["--verify", str(output)]) == 0
    path = output / "00000-train.tokens"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match="00000-train.tokens is missing, or is not what was"):
        command.main(["--verify", str(output)])


def test_a_full_disk_is_named_and_finished_files_are_kept(tmp_path, tokenizer):
    """A limit on file sizes stands in for the disk."""
    text = tmp_path / "text"
    runs.write_jsonl(text / "a.jsonl", runs.make_texts(10))
    runs.write_jsonl(text / "b.jsonl", runs.make_texts(3000))
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from pretraining.prepare import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--data", text, "--tokenizer", tokenizer.path, "--output", tmp_path / "records"]
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--workers", "1"],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "File too large. Make space and rerun" in run.stderr, run.stderr
    names = {path.name for path in (tmp_path / "records").iterdir()}
    assert "00000.json" in names and not any("incomplete" in name for name in names), names
    prepare(str(text), str(tokenizer.path), tmp_path / "records", workers=1)


# --- A tokenizer of one's own --------------------------------------------------------------------


def test_a_tokenizer_is_trained_on_the_text_and_serves_a_run(tmp_path, capsys):
    text, path = runs.make_data(tmp_path / "text"), tmp_path / "made" / "tokenizer.json"
    arguments = ["--data", str(text), "--output", str(path), "--vocab_size", "200"]
    assert train_tokenizer.main(arguments) == 0
    made = open_tokenizer(str(path))
    assert (made.pad_token_id, made.eos_token_id, made.num_sentinels) == (0, 1, 100)
    assert made.size <= 200 and made.first_sentinel_id == made.size - 1
    assert f"a model has {made.vocab_size:,}" in capsys.readouterr().out
    sentence = runs.make_texts(1)[0]
    ids = made.tokenizer.encode(sentence).ids
    assert ids[-1] == made.eos_token_id and 2 not in ids
    assert made.tokenizer.decode(ids) == sentence
    prepare(str(text), str(path), tmp_path / "records", workers=1)
    (tmp_path / "empty").mkdir()
    runs.write_jsonl(tmp_path / "empty" / "a.jsonl", [])
    for wrong, message in (
        (arguments, "exists. Pass --overwrite"),
        ([*arguments, "--overwrite", "--vocab_size", "100"], "vocab_size=100: expected at least"),
        ([*arguments, "--overwrite", "--data", "none"], "there is no such file or folder"),
        ([*arguments, "--overwrite", "--documents", "0"], "--documents must be 1 or more"),
        ([*arguments, "--overwrite", "--data", str(tmp_path / "empty")], "There is no text"),
    ):
        with pytest.raises(SystemExit):
            train_tokenizer.main(wrong)
        assert message in capsys.readouterr().err
    assert open_tokenizer(str(path)).sha256 == made.sha256


def test_a_frequent_word_of_one_character_is_one_token():
    texts = ["the cat ( x _ 1 ) ; the dog ( x _ 2 ) sees (them) 1st"] * 50
    made = train_tokenizer.train_tokenizer(texts, 160)
    assert made.get_vocab_size() <= 160 and made.token_to_id("<extra_id_0>") == (
        made.get_vocab_size() - 1
    )
    tokens = made.encode("( x _ 1 ) ; ( x _ 2 )", add_special_tokens=False).tokens
    assert tokens == "▁( ▁x ▁_ ▁1 ▁) ▁; ▁( ▁x ▁_ ▁2 ▁)".split()
    assert made.encode("(them) 1st").tokens[0] == "▁("
    # Characters of their own need places of their own.
    far = "".join(chr(0x4E00 + i) for i in range(300))
    texts = [" ".join(far[i:] + far[:i]) for i in range(0, 300, 10)]
    assert train_tokenizer.train_tokenizer(texts, 600).get_vocab_size() <= 600
    with pytest.raises(ValueError, match=r"vocab_size=200: .* 30[12] different characters"):
        train_tokenizer.train_tokenizer(texts, 200)
    texts = ["the cat ( x _ 1 ) ; the dog ( x _ 2 ) sees (them) 1st"] * 50
    # As many as there is room for: the sentinels and special tokens come first.
    assert train_tokenizer.train_tokenizer(texts, 130).get_vocab_size() <= 130


def test_the_sample_is_fair_to_all_sources_and_the_same_every_time(tmp_path):
    for name, count in (("a", 50), ("b", 3)):
        runs.write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{i}" for i in range(count)])
    found = list(train_tokenizer.sample(str(tmp_path), 10))
    assert [name[0] for name in found] == ["a"] * 5 + ["b"] * 3
    assert found == list(train_tokenizer.sample(str(tmp_path), 10))
    assert found[:5] != [f"a{i}" for i in range(5)]
