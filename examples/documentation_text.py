"""English that every installation carries: the docstrings of the packages on this machine.

    python examples/documentation_text.py --output docstrings.jsonl

reads the Python files of a named list of packages and of the standard library, on all cores, and
writes one JSON line a docstring: {"package", "file", "split", "text"}. Nothing is imported from
those packages and nothing is downloaded. Copies and near-copies are dropped, and whole source
files go to "train", "validation" or "test", so that held-out text is from files never trained on.
"""

import argparse
import ast
import hashlib
import importlib.util
import inspect
import json
import os
import re
import signal
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

STANDARD_LIBRARY = "python"
# Package -> every other name that gives it away. All of them come with PyTorch, transformers,
# datasets, scikit-learn and matplotlib. The keys are the classes of the quickstart's task.
PACKAGES = {
    STANDARD_LIBRARY: ("cpython", "stdlib"),
    "datasets": ("dataset",),
    "fsspec": ("filesystem_spec",),
    "huggingface_hub": ("huggingface", "hugging face", "hf"),
    "matplotlib": ("plt", "mpl", "pyplot", "pylab"),
    "networkx": ("nx",),
    "numpy": ("np",),
    "pandas": ("pd",),
    "scipy": ("sp",),
    "sklearn": ("scikit-learn", "scikit learn", "scikit", "skl"),
    "sympy": (),
    "torch": ("pytorch", "torchscript", "libtorch"),
    "transformers": ("transformer",),
}
# Not documentation of the library itself, or generated.
SKIPPED_FOLDERS = {
    "__pycache__", "_vendor", "externals", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "test", "testing", "tests", "_generated", "turtledemo", "ensurepip",
}  # fmt: skip
SPLITS = (("train", 0.8), ("validation", 0.9), ("test", 1.0))
SHINGLE_WORDS = 6
MAX_WORD = 40  # longer "words" are tables, URLs and encoded data


def source_files(package: str) -> list[tuple[str, str]]:
    """(path on disk, name such as "numpy/linalg/_linalg.py") of a package's Python files.

    The order is pseudo-random, the same on every machine, so that any first part is a fair sample.
    A package that is not installed has no files.
    """
    if package == STANDARD_LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return []
        root = Path(next(iter(spec.submodule_search_locations)))
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                found.append((str(path), f"{package}/{path.relative_to(root).as_posix()}"))
    return sorted(found, key=lambda item: _digest(item[1]))


def split_of(file: str) -> str:
    """The split a source file belongs to: 80 / 10 / 10 %, decided by a hash of its name alone."""
    # Salted: `source_files` sorts by the bare hash, and a cap would else leave out the last split.
    fraction = _digest(f"split of {file}") / 2**64
    return next(split for split, bound in SPLITS if fraction < bound)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def docstrings(path: str, min_chars: int, max_chars: int) -> list[tuple[str, list[int]]]:
    """The cleaned docstrings of one file, each with the hashes of a sample of its word 6-grams.

    Files that cannot be read or parsed give none: an installation may hold templates and test
    data for other versions of Python.
    """
    try:
        source = Path(path).read_text(encoding="utf-8")
        if '"""' not in source and "'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found = []
    # Docstrings sit in modules, classes and functions, so expressions need not be walked.
    pending = [tree]
    while pending:
        node = pending.pop()
        text = ast.get_docstring(node, clean=False)
        if text is not None and len(text) >= min_chars:
            text = clean(text)[:max_chars]
            if len(text) >= min_chars:
                found.append((text, shingles(text)))
        pending.extend(
            child
            for child in reversed(node.body)
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        )
    return found


def clean(text: str) -> str:
    """Without indentation, rules of dashes, over-long words and runs of white space."""
    text = re.sub(r"[-=~^*#_.+]{4,}", " ", inspect.cleandoc(text))
    return " ".join(word for word in text.split() if len(word) <= MAX_WORD)


def shingles(text: str) -> list[int]:
    """Hashes of every word 6-gram (digits and case ignored) that is a multiple of 4."""
    words = re.findall(r"[a-z]+", text.lower())
    grams = (
        zlib.crc32(" ".join(words[i : i + SHINGLE_WORDS]).encode())
        for i in range(max(1, len(words) - SHINGLE_WORDS + 1))
    )
    sample = list(grams)
    return [gram for gram in sample if gram % 4 == 0] or sample[:1]


def harvest(
    packages: list[str],
    package_chars: int,
    min_chars: int = 80,
    max_chars: int = 2000,
    workers: int | None = None,
    progress: bool = True,
) -> list[dict[str, str]]:
    """Distinct docstrings of the packages, file by file.

    Args:
        packages: import names; `STANDARD_LIBRARY` stands for the standard library.
        package_chars: once a package has given this many characters, its other files are left.
        min_chars: shorter docstrings are left out.
        max_chars: longer ones are cut.
        workers: processes, by default one a core.
        progress: show a bar.

    Returns:
        Rows {"package", "file", "split", "text"}. A docstring is dropped when more than half of
        its sampled 6-grams were seen before, in whatever package or split.

    Raises:
        ValueError: if none of the packages is installed.
    """
    rows, seen, texts = [], set(), set()
    files = {package: source_files(package) for package in packages}
    if not any(files.values()):
        raise ValueError(f"None of the packages {packages} is installed: nothing to read.")
    fresh = get_context("spawn")  # a fork would copy locks that the caller's threads may hold
    with (
        ProcessPoolExecutor(workers or os.cpu_count(), fresh, _leave_interrupts) as pool,
        tqdm(total=len(packages), desc="reading docstrings", unit="package", disable=not progress)
        as bar,
    ):  # fmt: skip
        for package in packages:
            bar.set_postfix_str(package)
            taken, position = 0, 0
            while taken < package_chars and position < len(files[package]):
                chunk = files[package][position : position + 128]
                position += len(chunk)
                arguments = [path for path, _ in chunk]
                sizes = [min_chars] * len(chunk), [max_chars] * len(chunk)
                parsed = pool.map(docstrings, arguments, *sizes, chunksize=8)
                for (_, file), found in zip(chunk, parsed, strict=True):
                    for text, grams in found:
                        known = sum(gram in seen for gram in grams)
                        seen.update(grams)
                        if text in texts or 2 * known > len(grams):
                            continue
                        texts.add(text)
                        taken += len(text)
                        split = split_of(file)
                        row = {"package": package, "file": file, "split": split, "text": text}
                        rows.append(row)
            bar.update()
    return rows


def _leave_interrupts():
    """Ctrl-C is for the parent, which stops the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--output", required=True, help="the JSON Lines file to write")
    add("--packages", nargs="+", default=list(PACKAGES), metavar="NAME",
        help=f"import names; {STANDARD_LIBRARY!r} is the standard library (default: %(default)s)")
    add("--package_chars", type=int, default=4_000_000, help="cap a package (%(default)s)")
    add("--min_chars", type=int, default=80, help="shorter ones are left out (%(default)s)")
    add("--max_chars", type=int, default=2000, help="longer ones are cut (%(default)s)")
    add("--workers", type=int, default=None, help="processes (default: one a core)")
    # fmt: on
    args = parser.parse_args(arguments)
    for name in ("package_chars", "min_chars", "max_chars", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} (={value}) must be at least 1.")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        rows = harvest(
            args.packages, args.package_chars, args.min_chars, args.max_chars, args.workers
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(output.name + ".part")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    unfinished.replace(output)
    counts = Counter(row["split"] for row in rows)
    parts = ", ".join(f"{counts[split]:,} {split}" for split, _ in SPLITS)
    print(f"{output}: {len(rows):,} docstrings ({parts}), "
          f"{sum(len(row['text']) for row in rows) / 1e6:.1f} million characters")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
