"""The stages of the quickstart that make something: text, tokenizer, models and baselines.

Each `make_…` writes into the folder it is given. Shapes: B batch, L length.
"""

import inspect
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import load_dataset
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from tqdm import tqdm
from transformers import (
    Adafactor,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from examples.documentation_text import PACKAGES
from modeling_convt5 import ConvT5Config, ConvT5ForConditionalGeneration
from pretraining.collator import SpanCorruptionCollator
from pretraining.span_corruption import raw_length_for
from pretraining.train_tokenizer import SENTINELS, train_tokenizer

MASK_WORD = "package"  # stands for every package name in the classification texts
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class QuickstartError(RuntimeError):
    """Something that the user can mend; the message says what."""


def write_json(path: Path, value) -> None:
    """Written under another name, then renamed: a reader never sees half a file."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read_jsonl(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def prepare(threads: int) -> None:
    """Threads of PyTorch, and silence from what has nothing to say to the user."""
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def hardware(threads: int) -> dict:
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def make_text(args: Namespace, folder: Path) -> None:
    """docstrings.jsonl, by a process of its own, which needs no PyTorch."""
    command = [sys.executable, str(HERE / "documentation_text.py")]
    command += ["--output", str(folder / "docstrings.jsonl"), "--packages", *args.packages]
    command += ["--package_chars", str(args.package_chars)]
    finish(command, "Reading docstrings")


def finish(command: list[str], what: str, cwd: Path | None = None) -> None:
    """Run a command to its end, its output shown; Ctrl-C there is Ctrl-C here.

    Raises:
        QuickstartError: if it fails.
    """
    code = subprocess.run(command, cwd=cwd).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        raise QuickstartError(f"{what} failed with exit code {code}, see above.")


def make_hub_text(args: Namespace, folder: Path) -> None:
    """text.jsonl: the first documents of a Hub data set; one in fifty is held out."""
    name = " ".join(filter(None, [args.dataset_name, args.dataset_config_name]))
    try:
        stream = load_dataset(
            args.dataset_name, args.dataset_config_name, split="train", streaming=True
        )
        rows, chars = [], 0
        with tqdm(total=args.dataset_chars, desc=f"streaming {name}", unit="char") as bar:
            for i, example in enumerate(stream):
                text = " ".join(str(example[args.text_column]).split())
                rows.append({"split": "validation" if i % 50 == 0 else "train", "text": text})
                chars += len(text)
                bar.update(len(text))
                if chars >= args.dataset_chars:
                    break
    except KeyError as error:
        raise QuickstartError(
            f"--text_column (={args.text_column}) is not a column of {name}, which has "
            f"{', '.join(example)}."
        ) from error
    except Exception as error:  # the network, the name, the configuration: datasets says which
        raise QuickstartError(
            f"--dataset_name (={args.dataset_name}): expected a data set that `datasets` can "
            f"stream, and a network connection. It says: {error}"
        ) from error
    write_jsonl(folder / "text.jsonl", rows)


def make_tokenizer(args: Namespace, texts: list[str], folder: Path) -> None:
    """A Unigram tokenizer with T5's ids, saved for transformers."""
    sample = random.Random(0).sample(texts, min(len(texts), 8000))
    tokenizer = train_tokenizer(sample, args.vocab_size)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[f"<extra_id_{i}>" for i in range(SENTINELS)],
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )
    save_tokenizer(fast, folder)


def save_tokenizer(tokenizer, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    # transformers 5 renamed the class and still reads the old name; 4 knows only that one.
    path = folder / "tokenizer_config.json"
    write_json(path, {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"})


def make_pretrained(args: Namespace, config: dict, tokenizer: Path, texts: dict, folder: Path):
    """A model pre-trained in Flax, and pretraining.json with its losses.

    The command that a TPU pod runs (pretraining/main.py), here in a process of its own: PyTorch and
    JAX each have the processors and the memory to themselves. Rerun, it goes on from its last
    checkpoint.

    Args:
        args: the command line.
        config: fields of `ConvT5Config`.
        tokenizer: the folder that `make_tokenizer` wrote.
        texts: "train" and "validation" texts.
        folder: where the model, in convt5-pretrained, and until the end the run go.
    """
    run, model = folder / "run", folder / "convt5-pretrained"
    (run / "text").mkdir(parents=True, exist_ok=True)
    for split, found in texts.items():
        write_jsonl(run / "text" / f"{split}.jsonl", ({"text": text} for text in found))
    overrides = {
        "data_dir": run / "text",
        "tokenizer": tokenizer / "tokenizer.json",
        "model_overrides": config,
        "train_steps": args.pretrain_steps,
        "batch_size": args.batch_size,
        "inputs_length": args.inputs_length,
        "warmup_steps": 2_000,  # the paper's Adafactor, 1 / sqrt(max(step, warmup_steps))
        "log_every": max(1, args.pretrain_steps // 50),
        "eval_every": args.pretrain_steps,
        "eval_batches": 16,
        "checkpoint_every": args.checkpoint_every,
    }
    command = [sys.executable, "-m", "pretraining.main", "--workdir", str(run)]
    command += ["--config", str(ROOT / "pretraining" / "configs" / "tiny_cpu.py")]
    command += ["--export", str(model), "--override"]
    command += [f"{name}={value}" for name, value in overrides.items()]
    finish(command, "Pre-training", cwd=ROOT)
    records = read_jsonl(run / "metrics.jsonl")
    losses = {
        split: [row for row in records if row["split"] == split] for split in ("train", "eval")
    }
    settings = json.loads((model / "config.json").read_text())
    manifest = json.loads((run / "records" / "manifest.json").read_text())
    # At the first record nothing but the compilation was timed.
    speeds = [row["seconds_per_step"] for row in losses["train"] if "seconds_per_step" in row]
    row_tokens = args.batch_size * raw_length_for(args.inputs_length)[0]
    result = {
        "steps": args.pretrain_steps,
        "tokens": args.pretrain_steps * row_tokens,
        "corpus_tokens": sum(part["tokens"] for part in manifest["splits"]["train"]),
        "tokens_per_second": row_tokens / statistics.median(speeds),
        "history": [[row["step"], row["loss"]] for row in losses["train"]],
        "validation_loss": losses["eval"][-1]["loss"],
        "parameters": ConvT5ForConditionalGeneration(ConvT5Config(**settings)).num_parameters(),
    }
    write_json(folder / "pretraining.json", result)
    shutil.rmtree(run)


class LossBar(ProgressCallback):
    """Trainer's progress bar with the loss at its end instead of a line for every log."""

    def __init__(self, label: str):
        super().__init__()
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(self.label)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")


def train(
    label: str,
    model,
    rows,
    collator,
    folder: Path,
    learning_rate: float,
    **arguments,
) -> tuple[Trainer, bool]:
    """Run Trainer to its end, from the last whole checkpoint where there is one.

    Adafactor, as T5 was trained, with a linear schedule: an update is scaled by the size of the
    parameter it changes, so one learning rate serves the embeddings, which T5 draws with standard
    deviation 1, and the matrices, whose entries are ten times smaller. AdamW, with one rate for
    both, learns too little from so few steps.

    Returns:
        The trainer, and whether it went on from a checkpoint.
    """
    optimizer = Adafactor(
        model.parameters(), lr=learning_rate, scale_parameter=True, relative_step=False
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
            seed=0,
            **arguments,
        ),
        train_dataset=rows,
        data_collator=collator,
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LossBar(label))
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        print(f"{label}: going on from {checkpoint.name}", flush=True)
    # "medium" lets CPUs with bfloat16 instructions use them inside float32 matrix products (1.5
    # times as fast here); others compute as before. What is published is computed in float32.
    torch.set_float32_matmul_precision("medium")
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    finally:
        torch.set_float32_matmul_precision("highest")
    return trainer, checkpoint is not None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose last file, trainer_state.json, was written to its end."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in reversed(found):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            return checkpoint
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return None


def mask_names(text: str) -> str:
    """The text with every name of every package replaced by `MASK_WORD`."""
    return NAMES.sub(MASK_WORD, text)


def _names_pattern() -> re.Pattern:
    names = sorted({name for key, more in PACKAGES.items() for name in (key, *more)}, key=len)
    long = [re.escape(name) for name in reversed(names) if len(name) >= 5]
    short = [re.escape(name) for name in reversed(names) if len(name) < 5]
    # Long names also inside words (PyTorch, HuggingFaceModel), short ones (np, hf) only alone.
    return re.compile(f"{'|'.join(long)}|(?<![a-zA-Z])(?:{'|'.join(short)})(?![a-zA-Z])", re.I)


NAMES = _names_pattern()


def labelled_texts(rows: list[dict], split: str, count: int, seed: int) -> list[dict]:
    """About `count` masked docstrings of one split, as even over the packages as it has them.

    Returns:
        Rows {"text", "label"}.
    """
    generator = random.Random(seed)
    groups = defaultdict(list)
    for row in rows:
        if row["split"] == split:
            groups[row["package"]].append(row["text"])
    for package in sorted(groups):
        generator.shuffle(groups[package])
    share = -(-count // max(1, len(groups)))
    chosen = [
        {"text": mask_names(text), "label": package}
        for package in sorted(groups)
        for text in groups[package][:share]
    ]
    generator.shuffle(chosen)
    return chosen[:count]


def held_out(run: Path) -> tuple[list[dict], int]:
    """The test docstrings of the finished quickstart in the folder `run`, and its input length."""
    settings = json.loads((run / "hub" / "results.json").read_text())["settings"]
    for stage in run.glob("text-*/stage.json"):
        read = json.loads(stage.read_text())["settings"]
        if all(settings[name] == value for name, value in read.items()):
            break
    rows = read_jsonl(stage.parent / "docstrings.jsonl")
    return labelled_texts(rows, "test", settings["test_labels"], 0), settings["input_length"]


class TextToLabel:
    """The task as text to text, in the form of span corruption.

    Input: `from <extra_id_0> import: TEXT </s>`; target: `<extra_id_0> LABEL <extra_id_1> </s>`.
    """

    prompt = "from <extra_id_0> import: "

    def __init__(self, tokenizer, length: int):
        self.tokenizer, self.length = tokenizer, length

    def tokenize(self, rows: list[dict], **kwargs):
        texts = [self.prompt + row["text"] for row in rows]
        return self.tokenizer(texts, truncation=True, max_length=self.length, **kwargs)

    def examples(self, rows: list[dict]) -> list[dict]:
        """Rows for `DataCollatorForSeq2Seq`."""
        inputs = self.tokenize(rows)
        targets = self.tokenizer([f"<extra_id_0> {row['label']} <extra_id_1>" for row in rows])
        return [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
            for ids, labels in zip(inputs["input_ids"], targets["input_ids"], strict=True)
        ]

    def texts_read(self, rows: list[dict]) -> list[str]:
        """The part of each text that the model reads, for a baseline that reads no more."""
        offsets = self.tokenize(rows, return_offsets_mapping=True)["offset_mapping"]
        ends = [max(end for _, end in row) - len(self.prompt) for row in offsets]
        return [row["text"][:end] for row, end in zip(rows, ends, strict=True)]

    def predict(self, model, rows: list[dict]) -> list[str]:
        """The label generated for each text; texts of like length share a batch."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["text"]))
        texts = [self.prompt + rows[i]["text"] for i in order]
        self.tokenizer.model_max_length = self.length
        found = dict(zip(order, predict_in_order(model, self.tokenizer, texts), strict=True))
        return [found[i].strip() for i in range(len(rows))]


def scores(rows: list[dict], predictions: list[str]) -> dict[str, float]:
    truth = [row["label"] for row in rows]
    macro = f1_score(
        truth, predictions, labels=sorted(set(truth)), average="macro", zero_division=0
    )
    return {"accuracy": accuracy_score(truth, predictions), "macro_f1": float(macro)}


def make_finetuned(args, model, tokenizer, data: dict, rate: float, seed: int, label: str, folder):
    """One fine-tuned model with its scores on the validation and the test files."""
    task = TextToLabel(tokenizer, args.input_length)
    steps = args.finetune_epochs * -(-len(data["train"]) // args.finetune_batch_size)
    torch.manual_seed(seed)
    train(
        label,
        model,
        task.examples(data["train"]),
        DataCollatorForSeq2Seq(tokenizer),
        folder / "checkpoints",
        rate,
        max_steps=steps,
        per_device_train_batch_size=args.finetune_batch_size,
        warmup_steps=max(1, steps // 10),
        logging_steps=10,
        save_strategy="no",
        data_seed=seed,
    )
    result = {"learning_rate": rate, "seed": seed}
    for split in ("validation", "test"):
        result[split] = scores(data[split], task.predict(model, data[split]))
    model.save_pretrained(folder)
    write_json(folder / "scores.json", result)


def baselines(task: TextToLabel, data: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Test scores of the majority class and of TF-IDF + logistic regression.

    TF-IDF once reads the same part of each docstring as the model, once all of it; its
    regularisation is chosen on the validation docstrings.
    """
    labels = {split: [row["label"] for row in rows] for split, rows in data.items()}
    read = {split: task.texts_read(rows) for split, rows in data.items()}
    whole = {split: [row["text"] for row in rows] for split, rows in data.items()}
    majority = DummyClassifier().fit(read["train"], labels["train"])
    found = {"majority": scores(data["test"], list(majority.predict(read["test"])))}
    for name, texts in (("tfidf", read), ("tfidf_whole", whole)):
        candidates = [
            make_pipeline(
                TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=strength, max_iter=1000)
            ).fit(texts["train"], labels["train"])
            for strength in (1.0, 10.0, 100.0)
        ]
        best = max(candidates, key=lambda it: it.score(texts["validation"], labels["validation"]))
        found[name] = scores(data["test"], list(best.predict(texts["test"])))
    return found


@torch.no_grad()
def fill_spans(model, tokenizer, text: str, raw_length: int = 48) -> dict[str, str]:
    """Hide spans of a held-out text as in pre-training, and let the model fill them."""
    tokens = np.array(tokenizer(text)["input_ids"][:raw_length])
    collator = SpanCorruptionCollator(tokenizer.convert_tokens_to_ids("<extra_id_0>"))
    batch = collator([{"input_ids": tokens}])
    ids = model.eval().generate(batch["input_ids"], num_beams=4, max_new_tokens=32)

    def decode(ids):
        return tokenizer.decode([i for i in ids.tolist() if i not in tokenizer_ends]).strip()

    tokenizer_ends = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    return {
        "input": decode(batch["input_ids"][0]),
        "hidden": decode(batch["labels"][0]),
        "filled": decode(ids[0]),
    }


def new_model(pretrained: Path, dropout_rate: float, seed: int, fresh: bool):
    """The model to fine-tune: pre-trained, or of the same shape with fresh weights."""
    torch.manual_seed(seed)
    if fresh:
        config = ConvT5Config.from_pretrained(pretrained, dropout_rate=dropout_rate)
        return ConvT5ForConditionalGeneration(config)
    return ConvT5ForConditionalGeneration.from_pretrained(pretrained, dropout_rate=dropout_rate)


def predict_in_order(model, tokenizer, texts, batch_size=64):
    """What a user types. It runs here, and in a process that has never seen the package."""
    predictions = []
    for i in range(0, len(texts), batch_size):
        batch = texts[i : i + batch_size]
        inputs = tokenizer(batch, truncation=True, padding=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12)
        predictions += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return predictions


RELOAD = f"""
import json, sys
sys.modules["modeling_convt5"] = None  # importing it fails, installed or not
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

{inspect.getsource(predict_in_order)}

folder, texts, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
texts = json.load(open(texts, encoding="utf-8"))
json.dump(predict_in_order(model, tokenizer, texts), open(output, "w", encoding="utf-8"))
"""


def predict_in_new_process(folder: Path, texts: list[str]) -> list[str]:
    """Predictions of the saved folder by remote code, offline, where the package is not there."""
    with tempfile.TemporaryDirectory() as temporary:
        inputs, output = Path(temporary, "texts.json"), Path(temporary, "predictions.json")
        write_json(inputs, texts)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(Path(temporary, "home")),
            "PYTHONPATH": "",
        }
        environment.pop("HF_MODULES_CACHE", None)
        command = [sys.executable, "-c", RELOAD, str(folder.resolve()), str(inputs), str(output)]
        done = subprocess.run(
            command, env=environment, cwd=temporary, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise QuickstartError(f"Reloading {folder} in a new process failed:\n{done.stderr}")
        return json.loads(output.read_text(encoding="utf-8"))
