"""Fine-tunings that make up a table: what is missing is run, several processes at a time."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path

from tqdm import tqdm

from benchmarks.benchmark_convolution import processor, write

ROOT = Path(__file__).resolve().parents[1]
READING = "\n## Reading\n"
PATHS = ("data_dir", "text", "task_dir", "snli", "tokenizer", "work_dir", "output_dir")


def run_cells(commands: dict[Path, list[str]], workers: int) -> dict[Path, dict]:
    """Run each command whose folder has no results.json yet; returns the records in those files.

    Args:
        commands: the folder of each, and the arguments of python (without --output_dir).
        workers: how many run at once, each on its share of the cores. What a command prints goes
            to FOLDER.log.

    Raises:
        RuntimeError: with the end of its log, for the first command that fails (what others had
            finished is kept), and for a folder that holds the results of another command.
    """
    missing = {f: c for f, c in commands.items() if not (f / "results.json").is_file()}
    for folder in commands.keys() - missing.keys():
        _record(folder, commands[folder])
    bar = tqdm(total=len(commands), initial=len(commands) - len(missing), unit="cell", disable=None)
    threads = max(1, _cores() // workers)
    pool = ThreadPoolExecutor(workers)
    try:
        running = [pool.submit(_run, f, command, threads) for f, command in missing.items()]
        for job in as_completed(running):
            job.result()
            bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return {folder: _record(folder, command) for folder, command in commands.items()}


def _cores():
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _record(folder, command):
    record = json.loads((folder / "results.json").read_text())
    expected = shlex.join(["python", *command, "--output_dir", str(folder)])
    if record["command"] != expected:
        raise RuntimeError(
            f"{folder} holds the results of another command. Remove it, or choose another "
            f"--work_dir.\nthere:    {record['command']}\nexpected: {expected}"
        )
    return record


def _run(folder, command, threads):
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, *command, "--output_dir", str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    if code:
        end = log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"{folder.name} ended with exit code {code}; the end of {log}:\n{end}")


def said(module: str, arguments: list[str], args: argparse.Namespace) -> str:
    """The command of a page: a path of this machine is replaced by its argument's name."""
    command = shlex.join(["python", "-m", f"benchmarks.{module}", *arguments])
    for name in PATHS:
        if path := getattr(args, name, None):
            command = command.replace(str(path), name.upper())
    return command


def results_path(folder: Path, kind: str) -> Path:
    """FOLDER/KIND_<hardware>_<date>.json."""
    slug = "-".join(processor().lower().split()[:2])
    return folder / f"{kind}_{slug}_{date.today()}.json"


def write_results(path: Path, results: dict, page: str) -> None:
    """The results as JSON, and the page beside them and on standard output.

    What someone wrote under the heading "Reading" of a page that is there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(results, indent=1) + "\n")
    old = path.with_suffix(".md")
    _, heading, reading = old.read_text("utf-8").partition(READING) if old.exists() else ("",) * 3
    write(old, page + heading + reading)
    print(page)


def options(fields: dict) -> Iterable[str]:
    """A dictionary as arguments of a command."""
    for name, value in fields.items():
        yield f"--{name}"
        yield from map(str, value if isinstance(value, (list, tuple, range)) else [value])
