"""Fine-tune on a task: `python examples/finetune.py --task sst2 --model DIR --output_dir O`.

Any argument of transformers' Seq2SeqTrainingArguments works as well, and so does a YAML or JSON
file as the first argument, which later arguments override. Runs under `accelerate launch`. The
same command again goes on where it was stopped.

Writes O/results.json, O/curve.png, O/model (of the seed that is best on the validation rows) and
O/seed_N (predictions, checkpoints). With --push_to_hub true --hub_model_id owner/name that model
and these numbers are published at the end. Exit code 0, 2 for a wrong argument or file, 1 where the
Hub failed.
"""

import copy
import dataclasses
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import (
    Adafactor,
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.answers import check_method, check_words
from evaluation.metrics import compute
from evaluation.prediction import encode_contexts, predict, span_positions
from evaluation.results import (
    check_at_least,
    claim_folder,
    evaluate_splits,
    main_split,
    make_record,
    plot_curves,
    write_json,
)
from evaluation.splits import Arrangement, arrange, fingerprint, load_task
from evaluation.tasks import TASKS, Task
from modeling_convt5 import PRESETS, ConvT5Config

EVALUATIONS = 10  # in a training, unless --eval_steps says otherwise
HEADS = {"answers": AutoModelForQuestionAnswering}
# What may differ between a run and its continuation.
FREE = {
    "seeds",
    "output_dir",
    "disable_tqdm",
    "logging_steps",
    "local_rank",
    "logging_dir",
    "run_name",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_token",
}


# Arguments of Trainer that would do nothing here.
REPLACED = {
    "seed": "use --seeds",
    "data_seed": "use --seeds",
    "save_steps": "use --eval_steps, after which a checkpoint is written",
    "metric_for_best_model": "the task's first metric decides",
    "resume_from_checkpoint": "the same command again goes on by itself",
    "predict_with_generate": "use --method generate",
    "generation_num_beams": "use --num_beams",
    "generation_max_length": "the task says how long a target is",
    "label_smoothing_factor": "the loss is the model's own",
    "do_predict": "the test rows are answered at the end",
}


@dataclass
class TaskArguments:
    """What is learned, from which rows, and how it is answered."""

    task: str = field(metadata={"help": f"{', '.join(sorted(TASKS))}, or custom"})
    model: str = field(metadata={"help": "a folder, owner/name, or a preset for a new model"})
    tokenizer: str | None = field(default=None, metadata={"help": "the model's own by default"})
    revision: str | None = field(default=None, metadata={"help": "the commit on the Hub"})
    trust_remote_code: bool = False
    config_overrides: list[str] = field(
        default_factory=list, metadata={"help": "name=JSON of fields, such as dropout_rate=0.1"}
    )
    data_dir: str | None = field(default=None, metadata={"help": "the task's files; else the Hub"})
    train_file: str | None = field(default=None, metadata={"help": "of task custom"})
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    method: str | None = field(default=None, metadata={"help": "score, generate or head"})
    seeds: list[int] = field(default_factory=lambda: [0])
    patience: int = field(default=5, metadata={"help": "evaluations without a gain before the end"})
    lora_rank: int | None = field(default=None, metadata={"help": "train LoRA adapters (PEFT)"})
    max_input_length: int = field(default=512, metadata={"help": "tokens"})
    max_train_rows: int | None = None
    max_validation_rows: int | None = field(default=2000, metadata={"help": "0: all"})
    max_test_rows: int | None = None
    num_beams: int = 1


@dataclass
class TrainArguments(Seq2SeqTrainingArguments):
    """transformers' own, with the paper's defaults: Adafactor at a constant learning rate."""

    optim: str = "adafactor"
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "constant"
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    report_to: str = "none"
    logging_steps: float = 10
    save_total_limit: int | None = 1
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False


class Collator:
    """Rows to tensors: inputs (B, L), and labels as the method wants them."""

    def __init__(self, task: Task, tokenizer, method: str, max_input_length: int):
        self.task, self.tokenizer, self.method = task, tokenizer, method
        self.max_input_length = max_input_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        task = self.task
        if task.kind == "answers" and self.method == "head":
            inputs = encode_contexts(self.tokenizer, rows, self.max_input_length)
            starts, ends = span_positions(inputs, rows)
            values = {"start_positions": starts, "end_positions": ends}
            values |= {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return {name: torch.tensor(value) for name, value in values.items()}
        inputs = self._tokens([task.input_text(row) for row in rows], self.max_input_length)
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if self.method == "head":
            dtype = torch.float32 if task.kind == "similarity" else torch.int64
            batch["labels"] = torch.tensor([row["label"] for row in rows], dtype=dtype)
        else:
            texts = [task.target_text(row) for row in rows]
            targets = self._tokens(texts, task.target_length)
            hidden = targets["attention_mask"] == 0
            batch["labels"] = targets["input_ids"].masked_fill(hidden, -100)
        return batch

    def _tokens(self, texts, length):
        options = {"truncation": True, "max_length": length, "padding": True}
        return self.tokenizer(texts, return_tensors="pt", **options)


class TaskTrainer(Seq2SeqTrainer):
    """Trainer whose evaluation answers rows as `evaluation.run` does."""

    def __init__(self, task: Task, answer_options: dict, selection: list[dict], **kwargs):
        super().__init__(eval_dataset=selection, **kwargs)
        self.task, self.answer_options = task, answer_options

    def create_optimizer(self, model=None):
        """T5's Adafactor, whose steps scale with the parameters; others are Trainer's."""
        if self.args.optim == "adafactor" and self.optimizer is None:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            options = {"scale_parameter": True, "relative_step": False, "warmup_init": False}
            self.optimizer = Adafactor(parameters, lr=self.args.learning_rate, **options)
        return super().create_optimizer(model)

    def answer(self, rows: list[dict]) -> list[dict]:
        """An answer to each row; several processes share the work."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        rank, world = self.args.process_index, self.args.world_size
        part = predict(
            self.task, model, self.processing_class, rows[rank::world], **self.answer_options
        )
        found: list[dict] = [{}] * len(rows)
        numbers = range(rank, len(rows), world)
        for i, answer in gather_object(list(zip(numbers, part, strict=True))):
            found[i] = answer
        return found

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **kwargs):
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        predictions = [answer["prediction"] for answer in self.answer(rows)]
        found = compute(self.task, rows, predictions)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def make_model(args: TaskArguments, task: Task, method: str, tokenizer):
    """The model to train: a saved one, or a new one of a preset."""
    fields = dict(_override(text) for text in args.config_overrides)
    if task.kind == "classification":
        fields["id2label"] = dict(enumerate(task.words))
        fields["label2id"] = {word: i for i, word in enumerate(task.words)}
    auto = AutoModelForSeq2SeqLM
    if method == "head":
        auto = HEADS.get(task.kind, AutoModelForSequenceClassification)
        if task.kind == "similarity":
            fields |= {"num_labels": 1, "problem_type": "regression"}
    if args.model in PRESETS:
        config = ConvT5Config.from_preset(args.model, **{"vocab_size": len(tokenizer), **fields})
        model = auto.from_config(config)
    else:
        options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
        config = AutoConfig.from_pretrained(args.model, **options, **fields)
        model = auto.from_pretrained(args.model, config=config, dtype=torch.float32, **options)
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(
                r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear"
            ),
        )
    return model


def _override(text):
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"config_overrides={text!r}: write name=value, the value in JSON.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def make_tokenizer(args: TaskArguments):
    if args.tokenizer is None and args.model in PRESETS:
        raise ValueError(
            f"model={args.model!r} is a preset, which has no tokenizer: pass --tokenizer, a folder "
            "or owner/name."
        )
    options = {"trust_remote_code": args.trust_remote_code}
    if args.tokenizer is None:
        options["revision"] = args.revision
    return AutoTokenizer.from_pretrained(args.tokenizer or args.model, **options)


def with_lengths(args: TaskArguments, training: TrainArguments, task: Task, rows, tokenizer):
    """The training rows; with their tokens where Trainer is to group them by length."""
    strategy = getattr(training, "train_sampling_strategy", None)  # since transformers 5
    if strategy != "group_by_length" and not getattr(training, "group_by_length", False):
        return rows
    texts = [task.input_text(row) for row in rows]
    tokens = tokenizer(texts, truncation=True, max_length=args.max_input_length).input_ids
    return [{**row, "input_ids": ids} for row, ids in zip(rows, tokens, strict=True)]


def arguments_of_seed(training: TrainArguments, seed: int, rows: int, metric: str, folder: Path):
    """The training arguments of one seed: its folder, and when it evaluates and saves."""
    training = copy.copy(training)
    training.output_dir, training.seed, training.data_seed = str(folder), seed, seed
    training.push_to_hub = False  # once, at the end: `push`
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    steps = training.max_steps
    if steps <= 0:
        steps = math.ceil(math.ceil(rows / batch) * training.num_train_epochs)
    every = training.eval_steps or max(1, steps // EVALUATIONS)
    every = math.ceil(every * steps) if every < 1 else int(every)  # a share of the steps
    training.eval_steps = min(steps, every)
    training.save_steps = training.eval_steps
    training.eval_strategy, training.save_strategy = IntervalStrategy.STEPS, SaveStrategy.STEPS
    training.load_best_model_at_end = training.greater_is_better = True
    training.metric_for_best_model = f"eval_{metric}"
    training.restore_callback_states_from_checkpoint = True  # how long no gain was seen
    return training


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; torn ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in reversed(found):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            return str(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def run_seed(
    args: TaskArguments,
    training: TrainArguments,
    task: Task,
    method: str,
    rows: Arrangement,
    seed: int,
) -> dict:
    """Train and evaluate one seed, or take up what an earlier run of it left.

    Returns:
        `metrics` of the final splits, their `intervals`, the `validation` score, and `history`.
    """
    folder = Path(training.output_dir) / f"seed_{seed}"
    finished = folder / "metrics.json"
    if finished.is_file():
        return json.loads(finished.read_text("utf-8"))
    tokenizer = make_tokenizer(args)
    set_seed(seed)
    model = make_model(args, task, method, tokenizer)
    arguments = arguments_of_seed(
        training, seed, len(rows.train), task.metrics[0], folder / "checkpoints"
    )
    trainer = TaskTrainer(
        task,
        {
            "method": method,
            "max_input_length": args.max_input_length,
            "batch_size": training.per_device_eval_batch_size,
            "num_beams": args.num_beams,
        },
        rows.selection,
        model=model,
        args=arguments,
        train_dataset=with_lengths(args, training, task, rows.train, tokenizer),
        data_collator=Collator(task, tokenizer, method, args.max_input_length),
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(args.patience)],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
    main_process = trainer.is_world_process_zero()
    # Every process answers its share; the first one keeps the predictions.
    metrics, intervals = evaluate_splits(
        task, rows.final, trainer.answer, folder if main_process else None
    )
    result = {
        "metrics": metrics,
        "intervals": intervals,
        "validation": trainer.state.best_metric,
        "steps": trainer.state.global_step,
        "history": trainer.state.log_history,
    }
    if main_process:
        save_model(trainer, folder / "model")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        write_json(finished, result)
    trainer.accelerator.wait_for_everyone()
    return result


def save_model(trainer: TaskTrainer, folder: Path) -> None:
    """The model, its adapters merged, and its tokenizer: a folder that can be published."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)


def finetune(args: TaskArguments, training: TrainArguments) -> dict:
    """All seeds; returns the record that is written to results.json."""
    files = (args.train_file, args.validation_file, args.test_file)
    task, data = load_task(args.task, args.data_dir, files, args.text_column, args.label_column)
    method = check_method(task, args.method)
    rows = arrange(
        task, data, args.max_train_rows, args.max_validation_rows or None, args.max_test_rows
    )
    data.notes += check_words(task, method, make_tokenizer(args))
    if args.model not in PRESETS:  # a mistyped name is found before the folder is taken
        AutoConfig.from_pretrained(
            args.model, revision=args.revision, trust_remote_code=args.trust_remote_code
        )
    main_process = training.process_index == 0
    ours = {"rows_sha256": fingerprint(task, rows)}
    ours |= {**dataclasses.asdict(args), **training.to_sanitized_dict()}
    ours = {key: value for key, value in ours.items() if key not in FREE}
    claim_folder(Path(training.output_dir), ours, main_process)
    for note in data.notes if main_process else ():
        print(f"{task.name}: {note}", flush=True)
    results = {seed: run_seed(args, training, task, method, rows, seed) for seed in args.seeds}
    main = main_split(rows.final)
    record = make_record(
        task.name,
        args.model,
        [
            {**result["metrics"], f"validation_{task.metrics[0]}": result["validation"]}
            if main != "validation"
            else result["metrics"]
            for result in results.values()
        ],
        {"train": rows.train, "validation": rows.selection, **rows.final},
        evaluated_on=main,
        method=method,
        seeds=list(results),
        confidence_95={seed: result["intervals"] for seed, result in results.items()},
        steps=[result["steps"] for result in results.values()],
        input=task.template,
        notes=data.notes,
    )
    if main_process:
        output = Path(training.output_dir)
        best = max(results, key=lambda seed: results[seed]["validation"])
        shutil.copytree(output / f"seed_{best}" / "model", output / "model", dirs_exist_ok=True)
        curves = {f"seed {seed}": result["history"] for seed, result in results.items()}
        plot_curves(curves, f"eval_{task.metrics[0]}", output / "curve.png")
        write_json(output / "results.json", record)
        for name, metric in record["metrics"].items():
            print(f"{task.name}: {name} {metric['mean']:.4f} ± {metric['std']:.4f}")
    return record


def parse(argv: list[str]) -> tuple[TaskArguments, TrainArguments]:
    """Arguments, those of a YAML or JSON file first.

    Raises:
        ValueError: if the file cannot be read.
    """
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        import yaml  # reads JSON as well

        try:
            fields = yaml.safe_load(Path(argv[0]).read_text("utf-8"))
            items = [(f"--{name}", value) for name, value in fields.items()]
        except (OSError, yaml.YAMLError, AttributeError) as error:
            raise ValueError(f"{argv[0]} is no file of `name: value`: {error}.") from None
        given: list[str] = []
        for name, value in items:
            given += [name, *map(str, value if isinstance(value, list) else [value])]
        argv = [*given, *argv[1:]]
    return HfArgumentParser((TaskArguments, TrainArguments)).parse_args_into_dataclasses(argv)


def check_replaced(training: TrainArguments) -> None:
    """Refuse Trainer's arguments in whose place this program has its own.

    Raises:
        ValueError: naming the argument and what to use.
    """
    fields = TrainArguments.__dataclass_fields__
    for name, instead in REPLACED.items():
        if name in fields and getattr(training, name) != fields[name].default:
            raise ValueError(f"--{name} has no effect here: {instead}.")


def check_numbers(args: TaskArguments, training: TrainArguments) -> None:
    """Refuse numbers with which nothing could be trained.

    Raises:
        ValueError: naming the argument.
    """
    check_at_least(1, patience=args.patience, lora_rank=args.lora_rank, num_beams=args.num_beams)
    check_at_least(1, max_input_length=args.max_input_length)
    check_at_least(1, gradient_accumulation_steps=training.gradient_accumulation_steps)
    check_at_least(0, learning_rate=training.learning_rate)
    if training.max_steps <= 0 and not training.num_train_epochs > 0:
        raise ValueError(
            f"--num_train_epochs {training.num_train_epochs}: expected more than 0, or --max_steps."
        )


def push(args: TaskArguments, training: TrainArguments) -> int:
    """Publish O/model with its card and numbers (model_cards.publish); returns the exit code."""
    from model_cards import publish

    if training.hub_token:
        os.environ["HF_TOKEN"] = training.hub_token
    output = Path(training.output_dir)
    arguments = ["--checkpoint", output / "model", "--results", output / "results.json"]
    arguments += ["--repo_id", training.hub_model_id]
    arguments += ["--origin", f"fine-tuned on {args.task}, from {args.model}"]
    arguments += ["--private"] if training.hub_private_repo else []
    return publish.main([str(argument) for argument in arguments])


def main(argv: list[str] | None = None) -> int:
    try:
        args, training = parse(sys.argv[1:] if argv is None else argv)
        check_replaced(training)
        check_numbers(args, training)
        if training.push_to_hub and "/" not in (training.hub_model_id or ""):
            raise ValueError(
                f"hub_model_id={training.hub_model_id!r}: --push_to_hub needs owner/name there."
            )
        finetune(args, training)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if training.push_to_hub and training.process_index == 0:
        return push(args, training)
    return 0


if __name__ == "__main__":
    sys.exit(main())
