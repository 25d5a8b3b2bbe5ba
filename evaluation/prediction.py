"""What a PyTorch model answers to the rows of a task: label words scored, texts, or a head.

Shapes: B texts, N candidates of all texts of a batch, L length, M target length, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.modeling_outputs import BaseModelOutput

from .answers import batches, check_method, from_logits, from_scores, from_text, longest_target
from .tasks import Task

SCORED_TOGETHER = 512  # candidates in a pass; one text's are never split


def load_model(name: str, revision: str | None = None, trust_remote_code: bool = False):
    """(model, tokenizer, method) of a fine-tuned folder or repository; its class decides.

    A folder that examples/finetune.py has written stands for the `model` in it. `method` is "head"
    for a model with a head, otherwise None.
    """
    inside = Path(name) / "model"
    if (inside / "config.json").is_file() and not (Path(name) / "config.json").is_file():
        name = str(inside)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name, **options)
    architecture = (config.architectures or [""])[0]
    auto, method = AutoModelForSeq2SeqLM, None
    if architecture.endswith("ForSequenceClassification"):
        auto, method = AutoModelForSequenceClassification, "head"
    elif architecture.endswith("ForQuestionAnswering"):
        auto, method = AutoModelForQuestionAnswering, "head"
    model = auto.from_pretrained(name, **options).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model, AutoTokenizer.from_pretrained(name, **options), method


def predict(
    task: Task,
    model,
    tokenizer,
    rows: Sequence[dict],
    method: str | None = None,
    max_input_length: int = 512,
    batch_size: int = 32,
    num_beams: int = 1,
) -> list[dict]:
    """An answer to each row.

    Args:
        model: an encoder-decoder with a language-model head ("score", "generate"), or with a
            classification or a question-answering head ("head").
        max_input_length: tokens of an input; longer ones are cut at the end.

    Returns:
        `prediction` of each row, as `metrics.compute` takes it; beside it `text` for what was
        generated, and `scores`, the probability of each class (or candidate), where there are any.

    Raises:
        ValueError: if the task cannot be answered that way.
    """
    method = check_method(task, method)
    texts = [task.input_text(row) for row in rows]
    with evaluating(model):
        if method == "score":
            candidates = [task.candidates(row) for row in rows]
            scores = score_candidates(
                model, tokenizer, texts, candidates, max_input_length, batch_size
            )
            return [from_scores(task, *pair) for pair in zip(candidates, scores, strict=True)]
        if method == "generate":
            length = longest_target(task, tokenizer, rows)
            found = generate(
                model, tokenizer, texts, max_input_length, length, batch_size, num_beams
            )
            return [{"prediction": from_text(task, text), "text": text} for text in found]
        if task.kind == "answers":
            return answer_spans(model, tokenizer, rows, max_input_length, batch_size)
        return [
            from_logits(task, logits)
            for logits in classify(model, tokenizer, texts, max_input_length, batch_size)
        ]


@contextmanager
def evaluating(model):
    """Neither dropout nor gradients; afterwards the model is as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def encode(tokenizer, texts: Sequence[str], max_length: int, device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, L) of texts, cut to `max_length` tokens."""
    inputs = tokenizer(
        list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    return {key: inputs[key].to(device) for key in ("input_ids", "attention_mask")}


def score_candidates(
    model,
    tokenizer,
    texts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    max_input_length: int = 512,
    batch_size: int = 32,
) -> list[np.ndarray]:
    """log p(candidate | text) of each text's candidates, their end-of-sequence token included.

    A text is encoded once; all its candidates are read by the decoder in one pass, so that the
    probabilities are exact and the best of them is always one of the candidates.

    Returns:
        For each text a float64 array, one number for each of its candidates.
    """
    scores: list[np.ndarray] = [np.empty(0)] * len(texts)
    device = next(model.parameters()).device
    for rows in batches(texts, [len(c) for c in candidates], SCORED_TOGETHER, batch_size):
        inputs = encode(tokenizer, [texts[i] for i in rows], max_input_length, device)
        states = model.get_encoder()(**inputs).last_hidden_state
        counts = [len(candidates[i]) for i in rows]
        owner = torch.arange(len(rows), device=device).repeat_interleave(
            torch.tensor(counts, device=device)
        )
        targets = tokenizer(
            text_target=[text for i in rows for text in candidates[i]],
            padding=True,
            return_tensors="pt",
        ).to(device)
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
        logits = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states[owner]),
            attention_mask=inputs["attention_mask"][owner],
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits
        log_probabilities = -torch.nn.functional.cross_entropy(
            logits.double().transpose(1, 2), labels, reduction="none"
        ).sum(1)
        parts = np.split(log_probabilities.cpu().numpy(), np.cumsum(counts)[:-1])
        for i, part in zip(rows, parts, strict=True):
            scores[i] = part
    return scores


def generate(
    model,
    tokenizer,
    texts: Sequence[str],
    max_input_length: int,
    max_new_tokens: int,
    batch_size: int = 32,
    num_beams: int = 1,
) -> list[str]:
    """The text that the model writes for each text."""
    written = [""] * len(texts)
    device = next(model.parameters()).device
    for rows in batches(texts, [1] * len(texts), len(texts), batch_size):
        inputs = encode(tokenizer, [texts[i] for i in rows], max_input_length, device)
        ids = model.generate(
            **inputs, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False
        )
        # Without the clean-up that joins " ." and the like: COGS' logical forms are full of them.
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        for i, text in zip(rows, tokenizer.batch_decode(ids, **options), strict=True):
            written[i] = text.strip()
    return written


def classify(
    model, tokenizer, texts: Sequence[str], max_input_length: int, batch_size: int = 32
) -> list[np.ndarray]:
    """Logits (num_labels,) of a classification head for each text."""
    found: list[np.ndarray] = [np.empty(0)] * len(texts)
    device = next(model.parameters()).device
    for rows in batches(texts, [1] * len(texts), len(texts), batch_size):
        inputs = encode(tokenizer, [texts[i] for i in rows], max_input_length, device)
        logits = model(**inputs).logits.double().cpu().numpy()
        for i, row in zip(rows, logits, strict=True):
            found[i] = row
    return found


def answer_spans(
    model,
    tokenizer,
    rows: Sequence[dict],
    max_input_length: int,
    batch_size: int = 32,
    longest: int = 30,
) -> list[dict]:
    """The most probable span of at most `longest` tokens of each context, as text."""
    found: list[dict] = [{}] * len(rows)
    device = next(model.parameters()).device
    texts = [row["context"] for row in rows]
    for chosen in batches(texts, [1] * len(rows), len(rows), batch_size):
        inputs = encode_contexts(tokenizer, [rows[i] for i in chosen], max_input_length)
        names = ("input_ids", "attention_mask")
        output = model(**{key: torch.tensor(inputs[key], device=device) for key in names})
        start, end = output.start_logits.double(), output.end_logits.double()
        length = start.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool, device=device).triu()
        allowed &= ~torch.ones_like(allowed).triu(longest)
        for place, i in enumerate(chosen):
            inside = torch.tensor([s == 1 for s in inputs.sequence_ids(place)], device=device)
            scores = start[place][:, None] + end[place][None]
            scores = scores.masked_fill(~(allowed & inside[:, None] & inside), -torch.inf)
            first, last = divmod(int(scores.argmax()), length)
            offsets = inputs["offset_mapping"][place]
            text = texts[i][offsets[first][0] : offsets[last][1]] if inside.any() else ""
            found[i] = {"prediction": text.strip(), "text": text.strip()}
    return found


def encode_contexts(tokenizer, rows: Sequence[dict], max_length: int):
    """Questions and contexts as pairs, the contexts cut, with the characters of each token.

    Raises:
        ValueError: if a question leaves no room for its context.
    """
    questions = [row["question"] for row in rows]
    longest = max(map(len, tokenizer(questions).input_ids))
    if longest >= max_length:
        raise ValueError(
            f"max_input_length={max_length} leaves no room beside a question of {longest} tokens."
        )
    return tokenizer(
        questions,
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=max_length,
        padding=True,
        return_offsets_mapping=True,
    )


def span_positions(inputs, rows: Sequence[dict]) -> tuple[list[int], list[int]]:
    """First and last token of each row's first answer; behind the row where it was cut off."""
    starts, ends = [], []
    for place, row in enumerate(rows):
        begin = row["answer_starts"][0] if row.get("answer_starts") else -1
        if begin < 0:
            begin = row["context"].find(row["answers"][0])
        stop = begin + len(row["answers"][0])
        sides, offsets = inputs.sequence_ids(place), inputs["offset_mapping"][place]
        tokens = [
            t
            for t, (low, high) in enumerate(offsets)
            if sides[t] == 1 and low < stop and high > begin
        ]
        cut = not tokens or begin < 0 or offsets[tokens[-1]][1] < stop
        starts.append(len(sides) if cut else tokens[0])
        ends.append(len(sides) if cut else tokens[-1])
    return starts, ends
