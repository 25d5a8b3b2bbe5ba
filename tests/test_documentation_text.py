"""The docstrings of a made-up package: what is read, what is dropped, where it goes."""

import importlib
import json
import sys

import pytest

from examples import documentation_text
from examples.documentation_text import STANDARD_LIBRARY, clean, docstrings, harvest, main, split_of

SENTENCE = "Return the {} of all values that were given along the chosen axis of an array, or {}."
WORDS = "mean sum product median variance minimum maximum range count order".split()


def module(*texts):
    return "\n".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(texts))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """madeup: one docstring each in 40 files, and files that must not be read."""
    root = tmp_path / "madeup"
    (root / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    for i in range(40):
        story = " ".join(f"{WORDS[(i * 7 + k * k) % 10]}{chr(97 + i % 26)}" for k in range(20))
        text = f"Word list {chr(97 + i % 26) * 3} {chr(97 + i // 26)}: {story} and so on to the end"
        (root / f"file{i}.py").write_text(module(text))
    (root / "tests" / "test_it.py").write_text(module("A test of the package, " * 10))
    (root / "broken.py").write_text('def f(:\n    """' + "never read " * 20 + '"""\n')
    (root / "latin.py").write_bytes('"""caf\xe9 '.encode("latin-1") + b'never read " * 20"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield root
    sys.modules.pop("madeup", None)


def test_reads_whole_files_into_splits(package):
    rows = harvest(["madeup"], 10**6, workers=1, progress=False)
    assert len(rows) == 40
    assert all(row["package"] == "madeup" for row in rows)
    assert all(row["split"] == split_of(row["file"]) for row in rows)
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    assert not any("test" in row["text"] or "never" in row["text"] for row in rows)
    assert rows == harvest(["madeup"], 10**6, workers=2, progress=False)


def test_splits_have_their_shares_also_under_a_cap():
    splits = [split_of(f"some/file{i}.py") for i in range(5000)]
    assert 0.77 < splits.count("train") / 5000 < 0.83
    first = sorted((f"some/file{i}.py" for i in range(5000)), key=documentation_text._digest)[:500]
    assert 30 < sum(split_of(file) == "test" for file in first) < 75


def test_cap_ends_a_package(package):
    rows = harvest(["madeup"], 1, workers=1, progress=False)
    assert 0 < len(rows) <= 40
    whole = harvest(["madeup"], 10**6, workers=1, progress=False)
    assert rows == whole[: len(rows)]


def test_near_copies_are_dropped_across_files(package):
    text = " ".join(SENTENCE.format(word, word) for word in WORDS)
    (package / "one.py").write_text(module(text))
    (package / "two.py").write_text(module(text, text.replace("median", "middle"), "too short"))
    rows = harvest(["madeup"], 10**6, workers=1, progress=False)
    assert sum(row["text"].startswith("Return the mean") for row in rows) == 1


def test_nested_docstrings_are_cleaned_and_cut(tmp_path):
    path = tmp_path / "nested.py"
    path.write_text(
        '"""Module.\n\n    ------\n    Its text."""\n'
        'class A:\n    """Class   text."""\n    def f(self):\n        "Method text."\n'
        "    async def g(self):\n        'Coroutine, with a long text.'\n"
        "x = '''not a docstring'''\n"
    )
    found = [text for text, _ in docstrings(str(path), min_chars=5, max_chars=12)]
    assert found == ["Module. Its ", "Class text.", "Method text.", "Coroutine, w"]
    assert clean("a\n   ====\n  b " + "x" * 41 + " c") == "a b c"


def test_the_standard_library_is_there():
    files = documentation_text.source_files(STANDARD_LIBRARY)
    names = [name for _, name in files]
    assert "python/json/decoder.py" in names
    assert not any("/test/" in name or "site-packages" in name for name in names)


def test_command_line(package, tmp_path, capsys):
    output = tmp_path / "made" / "out.jsonl"
    arguments = ["--packages", "madeup", "--workers", "1", "--output", str(output)]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 40 and set(rows[0]) == {"package", "file", "split", "text"}
    assert "40 docstrings" in capsys.readouterr().out
    assert list(output.parent.iterdir()) == [output]


def test_command_line_errors(tmp_path, capsys):
    output = ["--output", str(tmp_path / "out.jsonl")]
    assert main([*output, "--packages", "no_such_package"]) == 1
    assert "None of the packages ['no_such_package'] is installed" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*output, "--package_chars", "0"])
    assert stop.value.code == 2
    assert "--package_chars (=0) must be at least 1" in capsys.readouterr().err
