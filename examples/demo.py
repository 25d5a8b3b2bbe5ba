"""A page to try checkpoints on: `python examples/demo.py --models runs/quickstart/hub`.

Pick a checkpoint, type a text, see the probability of each label or what the model writes, and the
filters with which its encoder read the text: by layer, and by token where a dynamic convolution
predicts them. The page is served on this machine alone. Needs Gradio: `pip install gradio`.
"""

import argparse
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import modeling_convt5  # noqa: E402, F401 - registers the family
from evaluation import prediction  # noqa: E402
from evaluation.tasks import TASKS  # noqa: E402
from examples.filters import draw  # noqa: E402

AS_IT_IS = "the text as it is"
MOST_TOKENS = 512  # of a text; a longer one is cut
DRAWN_TOKENS = 60  # of a text, in the picture of its filters


@lru_cache(maxsize=2)
def load(name: str, trust_remote_code: bool = False):
    """(model, tokenizer, method) of a folder or a repository."""
    model, tokenizer, method = prediction.load_model(name, trust_remote_code=trust_remote_code)
    if not hasattr(model.get_encoder().layers[0], "mixer"):
        raise ValueError(f"{name} is a {type(model).__name__}, expected a ConvT5.")
    return model, tokenizer, method


def known_labels(config) -> list[str]:
    """The words a checkpoint was taught to answer with; none if it was not told."""
    labels = [str(label) for label in (config.id2label or {}).values()]
    return [] if all(label.startswith("LABEL_") for label in labels) else labels


def template(task: str, text: str) -> str:
    """The text as the task shows it to a model; `task` may be AS_IT_IS."""
    return text if task == AS_IT_IS else TASKS[task].input_text(dict.fromkeys(columns(task), text))


def columns(task: str) -> list[str]:
    return list(TASKS[task].columns)


def respond(
    name: str, task: str, text: str, labels: str = "", trust_remote_code: bool = False
) -> tuple[dict[str, float] | None, str, Figure]:
    """What a checkpoint answers.

    Args:
        name: a folder or a repository.
        task: a key of `TASKS` with one text, or AS_IT_IS.
        text: what was typed.
        labels: the words to choose from, between commas; "" is what the checkpoint knows.

    Returns:
        The probability of each label, which sum to 1, or None if there are none to choose from;
        the text that the model writes ("" for one with a head); a picture of its filters.

    Raises:
        ValueError: for an empty text, and for a model that answers neither way.
        OSError: if there is no such checkpoint.
    """
    if not text.strip():
        raise ValueError("The text is empty: type a sentence first.")
    if not (name or "").strip():
        raise ValueError("No checkpoint is chosen: give a folder, or owner/name on the Hub.")
    model, tokenizer, method = load(name, trust_remote_code)
    if type(model).__name__.endswith("ForQuestionAnswering"):
        raise ValueError(
            f"{name} points at answers in a second text, which this page has no place for: use "
            'pipeline("question-answering"), or a checkpoint that labels or writes.'
        )
    read = template(task, text)
    words = [word.strip() for word in labels.split(",") if word.strip()]
    words = words or known_labels(model.config)
    probabilities, written = None, ""
    with prediction.evaluating(model):
        if method == "head":
            scores = prediction.classify(model, tokenizer, [read], MOST_TOKENS)[0]
            words = [str(model.config.id2label[i]) for i in range(len(scores))]
        else:
            written = prediction.generate(model, tokenizer, [read], MOST_TOKENS, 64)[0]
            if words:
                found = prediction.score_candidates(model, tokenizer, [read], [words], MOST_TOKENS)
                scores = found[0]
        if words:
            scores = np.exp(scores - scores.max())
            values = (scores / scores.sum()).tolist()
            probabilities = dict(zip(words, values, strict=True))
        start = tokenizer.decode(tokenizer(read)["input_ids"][:DRAWN_TOKENS], True)
        figure = draw(model, tokenizer, start)
    return probabilities, written, figure


def page(models: list[str], trust_remote_code: bool = False):
    """The Gradio page; the first text is answered when it opens."""
    import gradio

    def answer(name, task, text, labels):
        try:
            return respond(name, task, text, labels, trust_remote_code)
        except (ValueError, OSError) as error:
            raise gradio.Error(str(error), duration=None) from error

    tasks = [AS_IT_IS, *(name for name in TASKS if len(columns(name)) == 1)]
    with gradio.Blocks(title="ConvT5", analytics_enabled=False) as blocks:
        gradio.Markdown("# ConvT5\nT5 with convolutions in the place of self-attention.")
        with gradio.Row():
            with gradio.Column():
                name = gradio.Dropdown(
                    models, value=models[0], label="Checkpoint", allow_custom_value=True
                )
                task = gradio.Dropdown(tasks, value=AS_IT_IS, label="Shown to the model as")
                text = gradio.Textbox(
                    "Return the mean of an array along an axis.", label="Text", lines=4
                )
                labels = gradio.Textbox(
                    label="Labels, between commas", placeholder="those the checkpoint knows"
                )
                button = gradio.Button("Answer", variant="primary")
            with gradio.Column():
                probabilities = gradio.Label(label="Labels", num_top_classes=5)
                written = gradio.Textbox(label="Generated text", interactive=False)
        filters = gradio.Plot(label="Filters: a row a filter (dynamic: a token), a column a tap")
        given, shown = [name, task, text, labels], [probabilities, written, filters]
        button.click(answer, given, shown)
        text.submit(answer, given, shown)
        blocks.load(answer, given, shown)
    return blocks


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", required=True, help="folders, or owner/name on the Hub"
    )
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--trust_remote_code", action="store_true", help="run a checkpoint's code")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    args = parser.parse_args(arguments)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError:
        print("error: the demo needs Gradio: pip install gradio", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    for name in args.models:
        try:
            load(name, args.trust_remote_code)
        except (ValueError, OSError) as error:
            print(f"error: --models {name}: {error}", file=sys.stderr)
            return 2
    page(args.models, args.trust_remote_code).launch(
        server_name="127.0.0.1", server_port=args.port, share=False
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
