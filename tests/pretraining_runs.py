"""What the tests of pre-training share: made-up text, a tokenizer, and runs in processes.

Processes are forked from a server that has imported everything and touched no device, so that a run
costs its compilation only, and can be killed for real.
"""

import atexit
import gzip
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import jax
from tokenizers import Tokenizer, models, pre_tokenizers, processors

# Runs of the same model share their compilation, within this process and with those it starts.
_COMPILED = tempfile.mkdtemp(prefix="convt5-compiled-")
atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
for _name, _value in {
    "jax_compilation_cache_dir": _COMPILED,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "pretraining" / "configs" / "tiny_cpu.py")
# Some three thousand parameters.
MODEL = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 2, "num_layers": 1, "dropout_rate": 0.1}
FAST = {
    "batch_size": 4,
    "inputs_length": 32,
    "log_every": 1,
    "eval_every": 4,
    "checkpoint_every": 3,
    "eval_batches": 2,
    "log_rows": True,
    "dropout": True,
    "model_overrides": MODEL,
}
# Fields of a record that depend on the clock.
TIMES = ("seconds_per_step", "tokens_per_second", "flops_utilisation")


def words(count: int = 60) -> list[str]:
    rng = random.Random(0)
    return sorted({"".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(count)})


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng, known = random.Random(seed), words()
    return [" ".join(rng.choices(known, k=rng.randint(5, 60))) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text, "url": "", "timestamp": ""}) + "\n")


def make_tokenizer(path: Path, sentinels: int = 20) -> Path:
    """A word a token, T5's special tokens, sentinels that count down."""
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    extra = [f"<extra_id_{i}>" for i in range(sentinels - 1, -1, -1)]
    tokenizer.add_special_tokens([*special, *extra])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def make_data(folder: Path, count: int = 120) -> Path:
    """Two files to train on and one held out, named and made as C4's."""
    texts = make_texts(count)
    write_jsonl(folder / "c4-train.00000.json.gz", texts[: count // 2])
    write_jsonl(folder / "c4-train.00001.json.gz", texts[count // 2 : count - 20])
    write_jsonl(folder / "c4-validation.00000.json.gz", texts[count - 20 :])
    return folder


def arguments(workdir: Path, options: list[str] | None = None, **overrides) -> list[str]:
    """The command line of a fast run."""
    fields = {**FAST, **overrides}
    pairs = [f"{name}={value!r}" for name, value in fields.items()]
    return [
        *("--config", CONFIG, "--workdir", str(workdir)),
        *(options or []),
        *("--override", *pairs),
    ]


def _run(arguments, log, environment):
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from pretraining.main import main

    sys.exit(main(arguments))


_CONTEXT = None


def launch(arguments: list[str], log: Path, **environment: str):
    """A started process that runs `pretraining.main`; output goes to the end of `log`."""
    global _CONTEXT
    if _CONTEXT is None:
        _CONTEXT = multiprocessing.get_context("forkserver")
        _CONTEXT.set_forkserver_preload(["pretraining.train"])
    process = _CONTEXT.Process(target=_run, args=(arguments, str(log), environment))
    process.start()
    return process


def run(arguments: list[str], log: Path, **environment: str) -> int:
    """The exit code of a run to its end."""
    process = launch(arguments, log, **environment)
    process.join()
    return process.exitcode


def records(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Records without what the clock says; every line must be whole."""
    path = workdir / name
    if not path.exists():
        return []
    text = path.read_text()
    assert text == "" or text.endswith("\n"), f"torn: {text[-80:]!r}"
    found = [json.loads(line) for line in text.splitlines()]
    keys = [(record["step"], record.get("split")) for record in found]
    assert len(set(keys)) == len(keys), "doubled"
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found]


def final_state(workdir: Path, step: int) -> dict:
    """{name: array} of a checkpoint, and its place in the data under "run"."""
    import numpy as np
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
        # As NumPy arrays, whatever devices wrote them.
        shapes = checkpointer.metadata(folder / "state").item_metadata.tree
        arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
        found = checkpointer.restore(folder / "state", arrays)
    leaves = jax.tree_util.tree_flatten_with_path(found)[0]
    return {
        **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves},
        "run": json.loads((folder / "run" / "metadata").read_text()),
    }
