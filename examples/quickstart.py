"""ConvT5 from nothing to a Hub folder in ten minutes on two CPU cores, offline.

    make quickstart                    or    python examples/quickstart.py --help

Stages, each kept in --output_dir under a name made from its settings, so that a rerun makes only
what changed and an interrupted run goes on where it stopped:

1. text        docstrings of the installed packages (documentation_text.py), or a Hub data set
2. tokenizer   Unigram with T5's special tokens and 100 sentinels
3. pretrain    in Flax, a small lightweight ConvT5 by span corruption (15 % noise, spans of 3)
4. finetune    in PyTorch, 2,000 labelled docstrings -> the package they document, names masked;
               pre-trained and not, each at the learning rate that is best on validation files;
               3 seeds
5. publish     a folder for the Hub, reloaded by remote code in a new process; table, figure, card

The numbers of the table, the figure and the card come from results.json alone.
"""

import argparse
import ctypes
import hashlib
import json
import os
import resource
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.documentation_text import PACKAGES  # noqa: E402

SMOKE = {
    "packages": ["python", "numpy", "torch"],
    "package_chars": 250_000,
    "vocab_size": 1000,
    "d_model": 32,
    "d_ff": 64,
    "dilations": [1],
    "num_heads": 2,
    "d_kv": 16,
    "inputs_length": 58,
    "batch_size": 16,
    "pretrain_steps": 30,
    "checkpoint_every": 10,
    "labels": 96,
    "validation_labels": 32,
    "test_labels": 48,
    "finetune_epochs": 1,
    "pretrained_rates": [2e-2],
    "scratch_rates": [2e-2],
    "seeds": [0, 1],
}


# ----------------------------------------------------------------------------- arguments


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(group, name, default, help, **kwargs):
        if isinstance(default, list):
            kwargs.setdefault("nargs", "+")
            kwargs.setdefault("type", type(default[0]))
        elif default is not None:
            kwargs.setdefault("type", type(default))
        group.add_argument(f"--{name}", default=default, help=f"{help} (%(default)s)", **kwargs)

    run = parser.add_argument_group("run")
    add(run, "output_dir", "runs/quickstart", "where everything is written")
    run.add_argument("--smoke", action="store_true", help="tiny sizes: all stages in a minute")
    add(run, "threads", os.cpu_count() or 1, "CPU threads")
    add(
        run,
        "seeds",
        [0, 1, 2],
        "fine-tuning seeds; each draws its own labelled docstrings, weights and order",
    )

    text = parser.add_argument_group("text")
    add(text, "packages", list(PACKAGES), "packages read, and the classes of the task")
    add(text, "package_chars", 4_000_000, "most characters read of one package")
    add(
        text,
        "dataset_name",
        None,
        "pre-train on this Hub data set instead (needs the network); "
        "the classification task keeps the docstrings",
        type=str,
    )
    add(text, "dataset_config_name", None, "its configuration", type=str)
    add(text, "text_column", "text", "its column with the text")
    add(text, "dataset_chars", 20_000_000, "characters streamed from it")

    model = parser.add_argument_group("tokenizer and model")
    add(model, "vocab_size", 8192, "pieces, the sentinels included")
    add(model, "d_model", 128, "channels")
    add(model, "d_ff", 256, "channels inside the feed-forward sublayer")
    add(model, "num_decoder_layers", 1, "decoder layers")
    add(model, "num_heads", 4, "heads of the cross-attention")
    add(model, "d_kv", 32, "channels of a head")
    add(model, "kernel_size", 7, "taps of an encoder filter")
    add(model, "dilations", [1, 2, 4], "distances between taps, one an encoder layer")

    pretraining = parser.add_argument_group("pre-training")
    add(pretraining, "inputs_length", 128, "tokens of a corrupted row, from 141 raw ones")
    add(pretraining, "batch_size", 32, "rows of a batch")
    add(pretraining, "pretrain_steps", 1000, "optimizer steps")
    add(pretraining, "checkpoint_every", 200, "steps from one checkpoint to the next")

    task = parser.add_argument_group("fine-tuning")
    add(task, "labels", 2000, "labelled training docstrings")
    add(task, "validation_labels", 600, "docstrings that choose the learning rates")
    add(task, "test_labels", 2000, "docstrings of the test")
    add(task, "input_length", 96, "tokens read of a docstring")
    add(task, "finetune_epochs", 3, "passes over the labelled docstrings")
    add(task, "finetune_batch_size", 32, "docstrings of a batch")
    add(task, "dropout_rate", 0.1, "dropout in fine-tuning")
    add(task, "pretrained_rates", [2e-2], "learning rates tried when pre-trained")
    add(task, "scratch_rates", [1e-2, 2e-2], "learning rates tried without pre-training")

    args = parser.parse_args(arguments)
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args(arguments)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop with exit code 2 and the argument, its value and what was expected."""
    for name, value in vars(args).items():
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float) or name == "seeds":
                continue
            if number <= 0 and name != "dropout_rate":
                parser.error(f"--{name} (={number}) must be above 0.")
    if not 0 <= args.dropout_rate < 1:
        parser.error(f"--dropout_rate (={args.dropout_rate}) must be at least 0 and below 1.")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds (={args.seeds}) must be distinct numbers, 0 or above.")
    unknown = [name for name in args.packages if name not in PACKAGES]
    if unknown or len(args.packages) < 2:
        parser.error(
            f"--packages (={args.packages}) must name two or more of {', '.join(PACKAGES)}"
            f"{f'; unknown: {unknown}' if unknown else ''}."
        )
    if args.vocab_size < 500:
        parser.error(
            f"--vocab_size (={args.vocab_size}) must be at least 500: 100 are "
            "sentinels, and every character needs a piece."
        )
    if args.inputs_length < 8:
        parser.error(f"--inputs_length (={args.inputs_length}) must be at least 8 tokens.")
    if args.labels < len(args.packages):
        parser.error(
            f"--labels (={args.labels}) must be at least the number of packages, "
            f"{len(args.packages)}: one docstring of each class."
        )
    if args.dataset_name is None and args.dataset_config_name is not None:
        parser.error(
            f"--dataset_config_name (={args.dataset_config_name}) needs --dataset_name as well."
        )


# ----------------------------------------------------------------------------- stages


class Stages:
    """Finished work in `folder`, one sub-folder a stage, named after a hash of its settings."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []

    def run(self, name: str, settings: dict, make) -> Path:
        """The folder of a stage: kept from an earlier run, or made by `make(folder)`.

        A stage is made under another name and renamed at its end, so a folder of this name is
        complete. What `make` left behind when it was interrupted is there when it runs again.
        """
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        done = self.folder / f"{name}-{key}"
        group = name.split("-")[0]
        if done.is_dir():
            print(f"{name}: reusing {done}", flush=True)
            self.reused.append(name)
        else:
            unfinished = self.folder / f"{name}-{key}.part"
            print(
                f"{name}: {'going on in' if unfinished.is_dir() else 'making'} {done}", flush=True
            )
            unfinished.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            make(unfinished)
            stage = {"settings": settings, "seconds": time.perf_counter() - start}
            (unfinished / "stage.json").write_text(json.dumps(stage, indent=2) + "\n")
            unfinished.rename(done)
        stage = json.loads((done / "stage.json").read_text())
        self.seconds[group] = self.seconds.get(group, 0.0) + stage["seconds"]
        return done


def select(args: argparse.Namespace, *names: str) -> dict:
    return {name: getattr(args, name) for name in names}


# ----------------------------------------------------------------------------- the quickstart


def run(args: argparse.Namespace) -> dict:
    """All stages; returns what results.json holds."""
    # Seconds of imports, so after the arguments were found right.
    from transformers import AutoTokenizer

    from examples import quickstart_report as report
    from examples import quickstart_training as training

    start = time.perf_counter()
    training.prepare(args.threads)
    stages = Stages(Path(args.output_dir))

    settings = select(args, "packages", "package_chars")
    docstrings = stages.run("text", settings, lambda it: training.make_text(args, it))
    rows = training.read_jsonl(docstrings / "docstrings.jsonl")
    corpus, corpus_rows = docstrings, rows
    if args.dataset_name is not None:
        settings = select(
            args, "dataset_name", "dataset_config_name", "text_column", "dataset_chars"
        )
        corpus = stages.run("hub_text", settings, lambda it: training.make_hub_text(args, it))
        corpus_rows = training.read_jsonl(corpus / "text.jsonl")
    texts = {
        split: [row["text"] for row in corpus_rows if row["split"] == split]
        for split in ("train", "validation")
    }

    settings = {"corpus": corpus.name, **select(args, "vocab_size")}
    folder = stages.run(
        "tokenizer", settings, lambda it: training.make_tokenizer(args, texts["train"], it)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)

    config = model_fields(args)
    settings = {"tokenizer": folder.name, **config} | select(
        args, "inputs_length", "batch_size", "pretrain_steps"
    )
    pretrained = stages.run(
        "pretrain",
        settings,
        lambda it: training.make_pretrained(args, config, folder.absolute(), texts, it.absolute()),
    )
    runs = finetune_all(args, stages, training, rows, tokenizer, pretrained)
    return publish(args, stages, training, report, rows, tokenizer, pretrained, runs, start)


def model_fields(args: argparse.Namespace) -> dict:
    """The fields of `ConvT5Config` that the command line sets."""
    return {
        **select(args, "d_model", "d_ff", "num_decoder_layers", "num_heads", "d_kv"),
        "encoder_mixers": "lightweight",
        "decoder_mixers": "lightweight",
        "encoder_kernel_size": args.kernel_size,
        "encoder_dilation": args.dilations,
        "num_layers": len(args.dilations),
        "num_filters": None,  # one a channel; the preset that these are set on has fewer
    }


def labelled_data(args, training, rows: list[dict], seed: int) -> dict[str, list[dict]]:
    """Training docstrings drawn by the seed; validation and test are the same for every seed."""
    return {
        "train": training.labelled_texts(rows, "train", args.labels, seed),
        "validation": training.labelled_texts(rows, "validation", args.validation_labels, 0),
        "test": training.labelled_texts(rows, "test", args.test_labels, 0),
    }


def finetune_all(args, stages, training, rows, tokenizer, pretrained: Path) -> dict:
    """Both models over all seeds, each at the learning rate best on validation with one seed.

    Returns:
        {"pretrained" | "scratch": [folder of each seed]}.
    """
    common = select(args, "labels", "validation_labels", "test_labels", "input_length")
    common |= select(args, "finetune_epochs", "finetune_batch_size", "dropout_rate")

    def finetune(kind: str, rate: float, seed: int) -> Path:
        settings = {"kind": kind, "rate": rate, "seed": seed, "from": pretrained.name, **common}

        def make(folder: Path) -> None:
            start = pretrained / "convt5-pretrained"
            model = training.new_model(start, args.dropout_rate, seed, kind == "scratch")
            data = labelled_data(args, training, rows, seed)
            label = f"fine-tuning, {kind}, rate {rate:g}, seed {seed}"
            training.make_finetuned(args, model, tokenizer, data, rate, seed, label, folder)

        return stages.run(f"finetune-{kind}-{rate:g}-seed{seed}", settings, make)

    runs = {}
    for kind, rates in (("pretrained", args.pretrained_rates), ("scratch", args.scratch_rates)):
        first = {rate: finetune(kind, rate, args.seeds[0]) for rate in rates}
        best = max(rates, key=lambda rate: read_scores(first[rate])["validation"]["accuracy"])
        print(f"{kind}: learning rate {best:g} is best on the validation files", flush=True)
        runs[kind] = [first[best]] + [finetune(kind, best, seed) for seed in args.seeds[1:]]
    return runs


def read_scores(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text())


def summary(values: list[float]) -> dict:
    """Mean, sample standard deviation (0 for a single seed) and the values."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "per_seed": values}


def publish(args, stages, training, report, rows, tokenizer, pretrained, runs, start) -> dict:
    """The Hub folder with its results, and the check that it reloads by remote code."""
    from transformers import AutoModelForSeq2SeqLM

    per_seed = {kind: [read_scores(folder)["test"] for folder in runs[kind]] for kind in runs}
    task = training.TextToLabel(tokenizer, args.input_length)
    for seed in args.seeds:
        data = labelled_data(args, training, rows, seed)
        for name, found in training.baselines(task, data).items():
            per_seed.setdefault(name, []).append(found)
    metrics = {
        name: {metric: summary([row[metric] for row in found]) for metric in found[0]}
        for name, found in per_seed.items()
    }
    for kind in runs:
        metrics[kind]["learning_rate"] = read_scores(runs[kind][0])["learning_rate"]

    hub = Path(args.output_dir, "hub")
    unfinished = hub.with_name("hub.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    model = AutoModelForSeq2SeqLM.from_pretrained(runs["pretrained"][0])
    model.save_pretrained(unfinished)
    tokenizer.model_max_length = args.input_length  # what `truncation=True` cuts to
    training.save_tokenizer(tokenizer, unfinished)
    sample = data["test"][:256]
    texts = [task.prompt + row["text"] for row in sample]
    print("publish: reloading in a new process, by remote code, offline", flush=True)
    here, there = training.predict_in_order(model, tokenizer, texts), None
    there = training.predict_in_new_process(unfinished, texts)
    held_out = [row["text"] for row in rows if row["split"] == "test"]
    results = {
        "task": "documentation_package",
        "model": "convt5-quickstart",
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "classes": sorted({row["label"] for row in data["train"]}),
        "rows": {split: len(found) for split, found in data.items()},
        "metrics": metrics,
        "pretraining": json.loads((pretrained / "pretraining.json").read_text()),
        "reload": {"compared": len(texts), "identical": sum(map(str.__eq__, here, there))},
        "example": {"text": sample[0]["text"][:200], "prediction": here[0],
                    "label": sample[0]["label"]},
        "filled": training.fill_spans(
            AutoModelForSeq2SeqLM.from_pretrained(pretrained / "convt5-pretrained"),
            tokenizer,
            held_out[0],
        ),
        "settings": {key: value for key, value in vars(args).items() if key != "output_dir"},
        "seconds": {**stages.seconds, "this_run": time.perf_counter() - start},
        "reused": stages.reused,
        "peak_memory_mb": peak_memory_mb(),
        "hardware": training.hardware(args.threads),
    }  # fmt: skip
    training.write_json(unfinished / "results.json", results)
    report.write(unfinished, results)
    shutil.rmtree(hub, ignore_errors=True)
    unfinished.rename(hub)
    print("\n" + report.table(results) + "\n\n" + report.verdict(results))
    print(f"\nMasked     {results['filled']['input']}\nFilled     {results['filled']['filled']}")
    print(f"\n{hub}: model, tokenizer, code, README.md, results.json, results.png")
    print(f"{pretrained / 'convt5-pretrained'}: the pre-trained model, for a task of your own")
    if results["reload"]["identical"] < results["reload"]["compared"]:
        raise training.QuickstartError(
            f"The reloaded model predicts differently: {results['reload']}."
        )
    return results


def peak_memory_mb() -> float:
    """Largest resident memory of this process plus that of its largest child."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return sum(resource.getrusage(who).ru_maxrss for who in both) / unit


def keep_freed_memory() -> None:
    """Large blocks that are freed stay with the process, where glibc is the allocator.

    It would hand them back, and the system would clear each page again: a sixth of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    # Before PyTorch is loaded: threads that wait should not spin, or a second program on the same
    # cores slows this one down several times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's large blocks in large pages
    keep_freed_memory()
    if args.dataset_name is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        run(args)
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Finished stages and checkpoints are kept in "
            f"{args.output_dir}; the same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    except RuntimeError as error:
        if type(error).__name__ != "QuickstartError":
            raise
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
