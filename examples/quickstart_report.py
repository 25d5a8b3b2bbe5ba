"""What the quickstart tells: table, figure and model card, all from results.json.

python examples/quickstart_report.py FOLDER renders them anew from FOLDER/results.json.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

NAMES = {
    "pretrained": "ConvT5, pre-trained",
    "scratch": "ConvT5, not pre-trained",
    "tfidf": "TF-IDF + logistic regression, same part of the text",
    "tfidf_whole": "TF-IDF + logistic regression, whole docstring",
    "majority": "majority class",
}


def table(results: dict) -> str:
    """Test scores as a Markdown table, mean ± standard deviation over the seeds."""
    width = max(map(len, NAMES.values()))
    lines = [
        f"| {'test files':<{width}} | accuracy     | macro-F1     |",
        f"|{'-' * (width + 2)}|--------------|--------------|",
    ]
    for key, name in NAMES.items():
        cells = [_percent(results["metrics"][key][metric]) for metric in ("accuracy", "macro_f1")]
        lines.append(f"| {name:<{width}} | {cells[0]:<12} | {cells[1]:<12} |")
    return "\n".join(lines)


def _percent(found: dict) -> str:
    return f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f} %"


def verdict(results: dict) -> str:
    """Who is ahead, and by how much: computed, whichever way it turned out."""
    return " ".join(
        _compare(results, "pretrained", other) for other in ("scratch", "tfidf", "tfidf_whole")
    )


def _compare(results: dict, one: str, other: str) -> str:
    a, b = (results["metrics"][key]["accuracy"] for key in (one, other))
    gain, spread = a["mean"] - b["mean"], max(a["std"], b["std"])
    first, second = (one, other) if gain >= 0 else (other, one)
    size = "more than" if abs(gain) > spread else "within"
    return (
        f"{NAMES[first]} is ahead of {NAMES[second]} by {100 * abs(gain):.1f} points of accuracy, "
        f"{size} the larger standard deviation over seeds ({100 * spread:.1f})."
    )


def figure(results: dict, path: Path) -> None:
    """The loss curve, and the accuracies with a standard deviation over the seeds."""
    plot, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    steps, losses = zip(*results["pretraining"]["history"], strict=True)
    left.plot(steps, losses, label="training")
    left.plot(
        steps[-1], results["pretraining"]["validation_loss"], "o", label="validation files, end"
    )
    left.set(xlabel="step", ylabel="loss (nats per target token)", title="Span corruption")
    left.legend()
    found = [results["metrics"][key]["accuracy"] for key in NAMES]
    right.barh(
        [name.replace(", ", ",\n") for name in NAMES.values()],
        [100 * row["mean"] for row in found],
        xerr=[100 * row["std"] for row in found],
        capsize=4,
    )
    right.invert_yaxis()
    right.set(xlabel="accuracy on test files (%)", title="Which package is documented?")
    plot.savefig(path, dpi=120)
    plt.close(plot)


def card(results: dict) -> str:
    """README.md of the Hub folder."""
    settings, pretraining, rows = results["settings"], results["pretraining"], results["rows"]
    seconds, example, filled = results["seconds"], results["example"], results["filled"]
    corpus = settings["dataset_name"]
    text = (
        f"the Hub data set `{corpus}` (column `{settings['text_column']}`)"
        if corpus
        else "docstrings of installed Python packages (" + ", ".join(settings["packages"]) + ")"
    )
    minutes = {name: value / 60 for name, value in seconds.items()}
    hardware = results["hardware"]
    return f"""---
library_name: transformers
language: en
license: apache-2.0
pipeline_tag: text-classification
tags: [convt5, convolution, span-corruption]
---

# {results["model"]}

A small ConvT5 ({pretraining["parameters"] / 1e6:.2f} million parameters): T5 whose self-attention
is replaced by lightweight convolutions. It was pre-trained by span corruption on
{pretraining["tokens"] / 1e6:.1f} million tokens and fine-tuned to name the Python package that a
docstring documents. It is the outcome of the project's quickstart and shows the method at a size
that two CPU cores train in minutes; it is no competitive model.

## Usage

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

name = "your-name/{results["model"]}"
revision = "main"  # put the hash of a commit here: remote code should never change unseen
options = {{"revision": revision, "trust_remote_code": True}}
tokenizer = AutoTokenizer.from_pretrained(name, **options)
model = AutoModelForSeq2SeqLM.from_pretrained(name, code_revision=revision, **options)

text = "from <extra_id_0> import: Return the mean of the array elements along an axis."
inputs = tokenizer(text, truncation=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=12)[0], skip_special_tokens=True))
```

Package names are to be replaced by `package` in the text, as in training. A test docstring:

> {example["text"]}

Prediction: {example["prediction"]}; truth: {example["label"]}.

## Intended use and limits

For learning how ConvT5 is trained, saved and loaded. It knows {len(results["classes"])} classes
({", ".join(results["classes"])}) and always names one of them, right or wrong, for any text. It
reads the first {settings["input_length"]} tokens. It has seen English technical prose only; do not
use it for decisions about people or in products.

## Training data and procedure

- Text: {text}; near-copies removed; source files split 80 / 10 / 10 % into training, validation
  and test. Nothing from validation or test files was trained on. Pre-training reads the training
  docstrings as they are, package names included; fine-tuning and evaluation mask the names.
- Tokenizer: Unigram, {settings["vocab_size"]:,} pieces including 100 sentinels.
- Model: d_model {settings["d_model"]}, d_ff {settings["d_ff"]}; {len(settings["dilations"])}
  encoder layers of {settings["kernel_size"]} taps at distances {settings["dilations"]},
  {settings["num_decoder_layers"]} decoder layers with cross-attention.
- Pre-training: T5's span corruption, 15 % noise, spans of 3 tokens on average; rows of
  {settings["inputs_length"]} tokens, {settings["batch_size"]} rows a batch,
  {pretraining["steps"]:,} steps ({pretraining["tokens"] / pretraining["corpus_tokens"]:.1f} passes
  over the text); loss on validation files {pretraining["validation_loss"]:.3f}.
- Fine-tuning: {rows["train"]:,} labelled docstrings, {settings["finetune_epochs"]} epochs; the
  learning rate ({results["metrics"]["pretrained"]["learning_rate"]:g} pre-trained,
  {results["metrics"]["scratch"]["learning_rate"]:g} not) was chosen on {rows["validation"]:,}
  validation docstrings, from {settings["pretrained_rates"]} and {settings["scratch_rates"]}.
- Time: text {minutes["text"]:.1f}, tokenizer {minutes["tokenizer"]:.1f}, pre-training
  {minutes["pretrain"]:.1f}, all fine-tuning {minutes["finetune"]:.1f} minutes on
  {hardware["threads"]} threads ({hardware["machine"]}, PyTorch {hardware["torch"]}); peak memory
  {results["peak_memory_mb"] / 1024:.1f} GB.

Filled spans of a held-out text, by the model after pre-training:

    input   {filled["input"]}
    hidden  {filled["hidden"]}
    filled  {filled["filled"]}

## Evaluation

{rows["test"]:,} docstrings from test files; mean ± standard deviation over seeds
{settings["seeds"]}, each of which draws its own labelled docstrings, initial weights and order.

{table(results)}

{verdict(results)}

![Loss curve and accuracies](results.png)

All numbers stem from `results.json`, which this command wrote: `{results["command"]}`.
Reloaded by remote code in a new process, {results["reload"]["identical"]} of
{results["reload"]["compared"]} predictions were identical.

## Citation

```bibtex
@inproceedings{{tay2021pretrained,
  title     = {{Are Pre-trained Convolutions Better than Pre-trained Transformers?}},
  author    = {{Tay, Yi and Dehghani, Mostafa and Gupta, Jai and Bahri, Dara and
               Aribandi, Vamsi and Qin, Zhen and Metzler, Donald}},
  booktitle = {{Proceedings of ACL}},
  year      = {{2021}},
  url       = {{https://arxiv.org/abs/2105.03322}}
}}
```
"""


def write(folder: Path, results: dict) -> None:
    """results.png and README.md of the folder."""
    figure(results, folder / "results.png")
    (folder / "README.md").write_text(card(results), encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(folder, json.loads((folder / "results.json").read_text(encoding="utf-8")))
