"""Text to records of tokens, once, so that order and resuming are exact and cheap.

    python -m pretraining.prepare --data DIR --tokenizer tokenizer.json --output RECORDS
    python -m pretraining.prepare --data hf://allenai/c4/en --tokenizer google-t5/t5-base \\
        --output RECORDS --max_tokens 40_000_000_000
    python -m pretraining.prepare --verify RECORDS

Every source becomes a file of tokens and one of the documents' ends (records.py), over all cores.
An interrupted run goes on where it stopped: a source is finished when its .json is there. Without
validation files one document in 200, chosen by its text, is held out.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import sys
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .documents import Source, find_sources, read
from .records import MANIFEST, file_digest, read_manifest
from .tokens import TokenizerFile, open_tokenizer

HELD_OUT = 200
BATCH = 512  # documents tokenised at a time


@dataclass(frozen=True)
class _Job:
    source: Source
    number: int
    tokenizer: str
    sha256: str
    output: Path
    hold_out: bool

    @property
    def marker(self) -> Path:
        return self.output / f"{self.number:05}.json"


def prepare(
    data: str,
    tokenizer: str,
    output: str | os.PathLike,
    max_tokens: int | None = None,
    workers: int | None = None,
) -> dict:
    """Write records of `data` into the folder `output`; returns their manifest.

    Args:
        data: what `documents.find_sources` takes.
        tokenizer: what `tokens.open_tokenizer` takes.
        output: created if need be; what a former run finished in it is kept.
        max_tokens: take no further source once there are so many.
        workers: processes; None is one a core, at most one a source.

    Raises:
        ValueError: if there is no text, or if the folder holds other records, or lies in `data`.
        OSError: if the disk is full; rerun when there is space.
    """
    output, opened = Path(output), open_tokenizer(tokenizer)
    if output.resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(
            f"{output} lies inside of {data}, so that the next run would read these records as "
            "text. Choose a folder outside of it."
        )
    sources = find_sources(data)
    hold_out = all(source.split == "train" for source in sources)
    output.mkdir(parents=True, exist_ok=True)
    for left in output.glob("*.incomplete"):
        left.unlink(missing_ok=True)
    jobs = [
        _Job(source, number, str(opened.path), opened.sha256, output, hold_out)
        for number, source in enumerate(sources)
    ]
    found, total = [], 0
    with contextlib.closing(_run(jobs, workers)) as results:
        bar = tqdm(total=len(jobs), unit="file", desc="tokens", disable=None)
        for result in results:
            found.append(result)
            total += sum(part["tokens"] for part in result["splits"].values())
            bar.set_postfix_str(f"{total / 1e6:,.1f} M tokens")
            bar.update()
            if max_tokens is not None and total >= max_tokens:
                break
        bar.close()
    return _write_manifest(output, data, opened, found)


def _run(jobs, workers):
    """The results of all jobs in order; a generator, so that closing it stops the workers."""
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers == 1:
        yield from map(_prepare_one, jobs)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are parallel
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        yield from pool.map(_prepare_one, jobs)
    except GeneratorExit:
        raise  # enough tokens: what is under way is finished
    except BaseException:
        # Stopped: a source may take minutes, and a pre-empted machine has seconds. Files are whole
        # or not there, so that nothing is lost but the sources under way.
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_one(job: _Job) -> dict:
    known = {"source": job.source.name, "size": job.source.size, "tokenizer": job.sha256}
    if job.marker.is_file():
        result = json.loads(job.marker.read_text())
        if {key: result[key] for key in known} != known:
            raise ValueError(
                f"{job.marker} describes {result['source']} ({result['size']} bytes), tokenised by "
                f"{result['tokenizer'][:12]}, but now it is {known['source']} ({known['size']} "
                f"bytes) and {known['tokenizer'][:12]}. Choose another output folder."
            )
        return result
    skipped: Counter = Counter()
    splits = _tokenise(job, skipped)
    result = {**known, "splits": splits, "skipped": dict(skipped)}
    write_json(job.marker, result)
    return result


def _tokenise(job, skipped):
    """Writes the files of a source, each under a temporary name first; returns what they hold."""
    opened = open_tokenizer(job.tokenizer)
    splits = [job.source.split] + ["validation"] * job.hold_out
    writers = {split: _Writer(job.output / f"{job.number:05}-{split}", opened) for split in splits}
    texts = read(job.source, skipped)
    try:
        while batch := list(islice(texts, BATCH)):
            encodings = opened.tokenizer.encode_batch(batch, add_special_tokens=False)
            for text, encoding in zip(batch, encodings, strict=True):
                if len(encoding.ids) < 2:
                    skipped["document of fewer than two tokens"] += 1
                    continue
                held_out = job.hold_out and zlib.crc32(text.encode()) % HELD_OUT == 0
                split = "validation" if held_out else job.source.split
                writers[split].add(encoding.ids)
        return {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()


class _Writer:
    """The tokens and the documents' ends of one split of a source."""

    def __init__(self, stem: Path, opened: TokenizerFile):
        self.dtype = "<u2" if opened.size <= 1 << 16 else "<u4"
        self.paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("tokens", "ends")]
        # A worker whose parent was killed may still be writing the same source.
        self.files = [open(f"{path}.{os.getpid()}.incomplete", "wb") for path in self.paths]
        self.hashes = [hashlib.sha256() for _ in self.paths]
        self.tokens = self.documents = 0

    def add(self, ids: list[int]) -> None:
        self.tokens += len(ids)
        self.documents += 1
        arrays = (np.asarray(ids, self.dtype), np.asarray([self.tokens], "<i8"))
        for file, digest, array in zip(self.files, self.hashes, arrays, strict=True):
            file.write(array.tobytes())
            digest.update(array.tobytes())

    def finish(self) -> dict:
        for file, path in zip(self.files, self.paths, strict=True):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, path)
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "dtype": self.dtype,
            "files": {
                path.name: digest.hexdigest()
                for path, digest in zip(self.paths, self.hashes, strict=True)
            },
        }

    def close(self) -> None:
        """After an error: leave nothing half written."""
        for file in self.files:
            with contextlib.suppress(OSError):
                file.close()
            Path(file.name).unlink(missing_ok=True)


def _write_manifest(output, data, opened, found):
    skipped = {result["source"]: result["skipped"] for result in found if result["skipped"]}
    manifest = {
        "data": data,
        "tokenizer_sha256": opened.sha256,
        "tokenizer_size": opened.size,
        "splits": {
            split: [r["splits"][split] for r in found if split in r["splits"]]
            for split in ("train", "validation")
        },
        "skipped": skipped,
    }
    if not any(part["tokens"] for part in manifest["splits"]["train"]):
        raise ValueError(
            f"data_dir={data!r} gave no tokens. Left out: {json.dumps(skipped) or 'nothing'}."
        )
    write_json(output / MANIFEST, manifest)
    for name, reasons in skipped.items():
        for reason, count in reasons.items():
            print(f"{name}: left out {count} x {reason}", file=sys.stderr)
    return manifest


def write_json(path: Path, value) -> None:
    """Under a temporary name first: the file is whole or not there."""
    temporary = path.with_name(f"{path.name}.incomplete")
    with open(temporary, "w") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def verify(folder: str | os.PathLike) -> int:
    """Compares every file with its checksum; returns how many there are.

    Raises:
        ValueError: naming the first file that is missing or changed.
    """
    parts = [part for split in read_manifest(folder)["splits"].values() for part in split]
    files = {name: digest for part in parts for name, digest in part["files"].items()}
    for name, expected in tqdm(files.items(), unit="file", desc="checksums", disable=None):
        path = Path(folder) / name
        if not path.is_file() or file_digest(path) != expected:
            raise ValueError(
                f"{path} is missing, or is not what was written. Remove {name.split('-')[0]}.json "
                "beside it and prepare the records again: only that source is made anew."
            )
    return len(files)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretraining.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="file, folder, or hf://owner/name/configuration")
    parser.add_argument("--tokenizer", help="tokenizer.json, its folder, or a Hub repository")
    parser.add_argument("--output", help="folder for the records")
    parser.add_argument("--max_tokens", type=int, help="stop after the source that reaches it")
    parser.add_argument("--workers", type=int, help="processes (one a core)")
    parser.add_argument("--verify", metavar="RECORDS", help="only compare the checksums")
    args = parser.parse_args(arguments)
    if args.verify:
        print(f"{verify(args.verify)} files are as they were written.")
        return 0
    for name in ("data", "tokenizer", "output"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is missing.")
    try:
        manifest = prepare(args.data, args.tokenizer, args.output, args.max_tokens, args.workers)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise SystemExit(
            f"{args.output}: {error.strerror}. Make space and rerun the same command: finished "
            "sources are kept."
        ) from error
    for split, parts in manifest["splits"].items():
        documents, tokens = (sum(part[key] for part in parts) for key in ("documents", "tokens"))
        print(f"{split}: {documents:,} documents, {tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
