"""Fine-tune on a task in Flax: `python examples/finetune_flax.py --task sst2 --model DIR …`.

The same tasks, files and results as examples/finetune.py, without PyTorch: Adafactor at a constant
learning rate, the parameters that are best on the validation rows are kept. A finished seed is not
trained again; one that was stopped starts over. Exit code 0, or 2 for a wrong argument or file.
"""

import argparse
import functools
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.answers import (
    batches,
    check_method,
    check_words,
    from_scores,
    from_text,
    longest_target,
)
from evaluation.metrics import compute
from evaluation.results import (
    check_at_least,
    claim_folder,
    evaluate_splits,
    main_split,
    make_record,
    plot_curves,
    write_json,
)
from evaluation.splits import AT_MOST, Arrangement, arrange, fingerprint, load_task
from evaluation.tasks import TASKS, Task
from modeling_convt5 import PRESETS, ConvT5Config, FlaxConvT5ForConditionalGeneration

EVALUATIONS = 10  # in a training, unless --eval_steps says otherwise
FREE = {"seeds", "output_dir", "quiet"}  # what may differ between a run and its continuation
MULTIPLE = 32  # lengths are rounded up to it, so that few shapes are compiled


def tokens(tokenizer, texts: list[str], max_length: int, multiple: int = MULTIPLE):
    """ids and mask (B, L) of texts, L a multiple of `multiple`."""
    inputs = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        padding=True,
        pad_to_multiple_of=multiple,
        return_tensors="np",
    )
    return jnp.asarray(inputs["input_ids"]), jnp.asarray(inputs["attention_mask"])


def make_batch(task: Task, tokenizer, rows: list[dict], max_input_length: int) -> dict:
    """Inputs (B, L) and labels (B, M), -100 for padding."""
    ids, mask = tokens(tokenizer, [task.input_text(row) for row in rows], max_input_length)
    targets = [task.target_text(row) for row in rows]
    labels, there = tokens(tokenizer, targets, task.target_length, 8)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": jnp.where(there > 0, labels, -100),
    }


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(graphdef, optimizer, state, memory, batch, dropout_rng):
    """One update; returns the parameters, the optimizer's memory and the loss."""

    def loss(state):
        return nnx.merge(graphdef, state)(**batch, dropout_rng=dropout_rng).loss

    value, gradients = jax.value_and_grad(loss)(state)
    updates, memory = optimizer.update(gradients, memory, state)
    return optax.apply_updates(state, updates), memory, value


@functools.partial(jax.jit, static_argnums=0)
def candidate_scores(graphdef, state, ids, mask, owner, labels):
    """log p of labels (N, M), -100 for padding, after the texts (B, L) that `owner` (N,) names."""
    model = nnx.merge(graphdef, state)
    states = model.encode(ids, mask).last_hidden_state[owner]
    logits = model(encoder_outputs=(states,), attention_mask=mask[owner], labels=labels).logits
    shares = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(shares, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(labels >= 0, chosen, 0).sum(-1)


def answer(task, method, tokenizer, graphdef, state, rows, args) -> list[dict]:
    """An answer to each row, as `evaluation.prediction.predict` gives it."""
    texts, found = [task.input_text(row) for row in rows], [{}] * len(rows)
    candidates = [task.candidates(row) if method == "score" else [""] for row in rows]
    model = nnx.merge(graphdef, state)
    length = longest_target(task, tokenizer, rows) if method == "generate" else 0
    for some in batches(texts, [len(c) for c in candidates], 512, args.batch_size):
        ids, mask = tokens(tokenizer, [texts[i] for i in some], args.max_input_length)
        if method == "generate":
            written = np.asarray(model.generate(ids, mask, max_new_tokens=length, num_beams=1))
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            for i, text in zip(some, tokenizer.batch_decode(written, **options), strict=True):
                found[i] = {"prediction": from_text(task, text.strip()), "text": text.strip()}
            continue
        counts = [len(candidates[i]) for i in some]
        owner = jnp.asarray(np.repeat(np.arange(len(some)), counts))
        words = [word for i in some for word in candidates[i]]
        labels, there = tokens(tokenizer, words, task.target_length, 8)
        labels = jnp.where(there > 0, labels, -100)
        scores = candidate_scores(graphdef, state, ids, mask, owner, labels)
        parts = np.split(np.asarray(scores, np.float64), np.cumsum(counts)[:-1])
        for i, part in zip(some, parts, strict=True):
            found[i] = from_scores(task, candidates[i], part)
    return found


def make_model(args: argparse.Namespace, task: Task, tokenizer, seed: int):
    """The model to train: a saved one, or a new one of a preset."""
    fields = {}
    if task.kind == "classification":
        fields["id2label"] = dict(enumerate(task.words))
        fields["label2id"] = {word: i for i, word in enumerate(task.words)}
    if args.dropout_rate is not None:
        fields["dropout_rate"] = args.dropout_rate
    dtypes = {"param_dtype": jnp.float32, "dtype": jnp.bfloat16 if args.bf16 else jnp.float32}
    if args.model in PRESETS:
        config = ConvT5Config.from_preset(args.model, vocab_size=len(tokenizer), **fields)
        return FlaxConvT5ForConditionalGeneration(config, rngs=nnx.Rngs(seed), **dtypes)
    return FlaxConvT5ForConditionalGeneration.from_pretrained(
        args.model, revision=args.revision, **dtypes, **fields
    )


def train(args, task: Task, method: str, rows: Arrangement, tokenizer, seed: int):
    """Train one seed; returns the best model, its validation score and the history."""
    model = make_model(args, task, tokenizer, seed)
    graphdef, state = nnx.split(model)
    optimizer = optax.adafactor(args.learning_rate, decay_rate=0.8, momentum=None)
    memory = optimizer.init(state)
    per_epoch = -(-len(rows.train) // args.batch_size)
    steps = args.max_steps or per_epoch * args.num_train_epochs
    every = args.eval_steps or max(1, steps // EVALUATIONS)
    best, best_state, history, waited, order = -np.inf, None, [], 0, []
    for step in tqdm(range(1, steps + 1), desc=f"seed {seed}", disable=args.quiet):
        while len(order) < args.batch_size:
            epoch = np.random.default_rng([seed, step]).permutation(len(rows.train))
            order = [*order, *epoch]
        chosen, order = order[: args.batch_size], order[args.batch_size :]
        batch = make_batch(task, tokenizer, [rows.train[i] for i in chosen], args.max_input_length)
        dropout_rng = jax.random.fold_in(jax.random.key(seed), step)
        state, memory, loss = train_step(graphdef, optimizer, state, memory, batch, dropout_rng)
        history.append({"step": step, "loss": float(loss)})
        if step % every == 0 or step == steps:
            answers = answer(task, method, tokenizer, graphdef, state, rows.selection, args)
            predictions = [found["prediction"] for found in answers]
            score = compute(task, rows.selection, predictions)[task.metrics[0]]
            history.append({"step": step, f"eval_{task.metrics[0]}": score})
            waited += 1
            if score > best:
                # Copied: the next step takes the parameters' memory for its own.
                best, best_state, waited = score, jax.tree.map(jnp.copy, state), 0
            if waited >= args.patience:
                break
    nnx.update(model, best_state)
    return model, float(best), history


def make_tokenizer(args: argparse.Namespace):
    """The one that is named, or the model's own."""
    revision = None if args.tokenizer else args.revision
    return AutoTokenizer.from_pretrained(args.tokenizer or args.model, revision=revision)


def run_seed(args, task: Task, method: str, rows: Arrangement, seed: int) -> dict:
    """Train and evaluate one seed, unless an earlier run has finished it."""
    folder = Path(args.output_dir) / f"seed_{seed}"
    finished = folder / "metrics.json"
    if finished.is_file():
        return json.loads(finished.read_text("utf-8"))
    tokenizer = make_tokenizer(args)
    model, best, history = train(args, task, method, rows, tokenizer, seed)
    graphdef, state = nnx.split(model)
    metrics, intervals = evaluate_splits(
        task,
        rows.final,
        lambda some: answer(task, method, tokenizer, graphdef, state, some, args),
        folder,
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    result = {"metrics": metrics, "intervals": intervals, "validation": best, "history": history}
    write_json(finished, result)
    return result


def finetune(args: argparse.Namespace) -> dict:
    """All seeds; returns the record that is written to results.json."""
    check_at_least(1, num_train_epochs=args.num_train_epochs, max_steps=args.max_steps)
    check_at_least(1, batch_size=args.batch_size, max_input_length=args.max_input_length)
    check_at_least(1, eval_steps=args.eval_steps, patience=args.patience)
    check_at_least(0, learning_rate=args.learning_rate, dropout_rate=args.dropout_rate)
    if args.model in PRESETS and not args.tokenizer:
        raise ValueError(
            f"model={args.model!r} is a preset, which has no tokenizer: pass --tokenizer."
        )
    files = (args.train_file, args.validation_file, args.test_file)
    task, data = load_task(args.task, args.data_dir, files, args.text_column, args.label_column)
    method = check_method(task, args.method)
    rows = arrange(
        task, data, args.max_train_rows, args.max_validation_rows or None, args.max_test_rows
    )
    data.notes += check_words(task, method, make_tokenizer(args))
    ours = {key: value for key, value in vars(args).items() if key not in FREE}
    ours |= {"framework": "flax", "rows_sha256": fingerprint(task, rows)}
    claim_folder(Path(args.output_dir), ours)
    for note in data.notes:
        print(f"{task.name}: {note}", flush=True)
    results = {seed: run_seed(args, task, method, rows, seed) for seed in args.seeds}
    record = make_record(
        task.name,
        args.model,
        [result["metrics"] for result in results.values()],
        {"train": rows.train, "validation": rows.selection, **rows.final},
        evaluated_on=main_split(rows.final),
        framework="flax",
        method=method,
        seeds=list(results),
        confidence_95={seed: result["intervals"] for seed, result in results.items()},
        validation=[result["validation"] for result in results.values()],
        input=task.template,
        notes=data.notes,
    )
    output = Path(args.output_dir)
    best = max(results, key=lambda seed: results[seed]["validation"])
    shutil.copytree(output / f"seed_{best}" / "model", output / "model", dirs_exist_ok=True)
    curves = {f"seed {seed}": result["history"] for seed, result in results.items()}
    plot_curves(curves, f"eval_{task.metrics[0]}", output / "curve.png")
    write_json(output / "results.json", record)
    for name, metric in record["metrics"].items():
        print(f"{task.name}: {name} {metric['mean']:.4f} ± {metric['std']:.4f}")
    return record


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=[*TASKS, "custom"])
    parser.add_argument("--model", required=True, help="a folder, owner/name, or a preset")
    parser.add_argument("--tokenizer", help="the model's own by default")
    parser.add_argument("--revision", help="the commit on the Hub")
    parser.add_argument("--data_dir", help="the task's files; else the Hub")
    parser.add_argument("--train_file", help="of task custom")
    parser.add_argument("--validation_file")
    parser.add_argument("--test_file")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--method", choices=("score", "generate"), help="the task's own by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--max_steps", type=int, help="instead of --num_train_epochs")
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--eval_steps", type=int, help=f"{EVALUATIONS} evaluations by default")
    parser.add_argument("--patience", type=int, default=5, help="evaluations without a gain")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--dropout_rate", type=float, help="the model's own by default")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--max_input_length", type=int, default=512, help="tokens")
    parser.add_argument("--max_train_rows", type=int)
    parser.add_argument("--max_validation_rows", type=int, default=AT_MOST)
    parser.add_argument("--max_test_rows", type=int)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    try:
        finetune(parse(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
