"""Generated files of every task in its official schema, and a tiny model that can read them."""

import csv
import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
from conftest import tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from evaluation.tasks import TASKS, TREC_FINE
from modeling_convt5 import ConvT5ForConditionalGeneration

GOOD, BAD = "good fine happy bright kind warm".split(), "bad poor sad dull cruel cold".split()
PEOPLE, PLACES = "Ann Bob Cid Dora".split(), "Rome Oslo Lima Kyiv".split()
TYPES = ("in_distribution", "prim_to_subj_proper", "cp_recursion")


def _text(generator, positive):
    words = generator.choices(GOOD if positive else BAD, k=4)
    return " ".join(["the", *words, generator.choice(["film", "day", "meal"])])


def write_lines(path: Path, lines, encoding="utf-8"):
    content = "".join(f"{line}\n" for line in lines).encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_jsonl(path: Path, rows):
    write_lines(path, [json.dumps(row) for row in rows])


def write_tsv(path: Path, rows, header=None):
    lines = [*([header] if header else []), *rows]
    write_lines(path, ["\t".join(map(str, line)) for line in lines])


def write_csv(path: Path, rows, header=None, encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([*([header] if header else []), *rows])


def write_parquet(path: Path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _splits(task):
    return list(TASKS[task].rows)


def _pairs(generator, count):
    """(first text, second text, whether both are of one sentiment)."""
    for i in range(count):
        first = generator.random() < 0.5
        yield _text(generator, first), _text(generator, first == bool(i % 2)), i % 2


def civil_comments(folder, split, generator, count):
    shares = [0.0, 0.9, 0.5, 0.2] * count
    texts = [_text(generator, share < 0.5) for share in shares[:count]]
    write_parquet(folder / f"{split}.parquet", {"text": texts, "toxicity": shares[:count]})


def wiki_toxicity(folder, split, generator, count):
    rows = [(f"id{i}", _text(generator, not i % 2), i % 2, 0) for i in range(count)]
    write_csv(folder / f"{split}.csv", rows, ["id", "comment_text", "toxic", "severe_toxic"])


def imdb(folder, split, generator, count):
    rows = [{"text": _text(generator, i % 2), "label": i % 2} for i in range(count)]
    write_jsonl(folder / f"{split}.jsonl.gz", rows)


def sst2(folder, split, generator, count):
    rows = [(_text(generator, i % 2) + " ", i % 2) for i in range(count)]
    if split == "test":  # GLUE hides its labels
        rows = [(i, text) for i, (text, _) in enumerate(rows)]
    header = ["index", "sentence"] if split == "test" else ["sentence", "label"]
    write_tsv(folder / f"{_glue_split(split)}.tsv", rows, header)


def sentiment140(folder, split, generator, count):
    labels = [(0, 4, 2)[i % 3] if split == "test" else (0, 4)[i % 2] for i in range(count)]
    rows = [
        (label, i, "Mon", "NO_QUERY", "user", f"café, {_text(generator, label == 4)}")
        for i, label in enumerate(labels)
    ]
    name = {"train": "training.1600000.processed.noemoticon", "test": "testdata.manual.2009.06.14"}
    write_csv(folder / f"{name[split]}.csv", rows, encoding="iso-8859-1")


def trec(folder, split, generator, count):
    lines = []
    for i in range(count):
        name = TREC_FINE[i % len(TREC_FINE)]
        lines.append(f"{name} What is {_text(generator, i % 2)}, {name.split(':')[1]} ?")
    name = {"train": "train_5500", "test": "TREC_10"}[split]
    write_lines(folder / f"{name}.label", lines, "iso-8859-1")


def ag_news(folder, split, generator, count):
    rows = [(i % 4 + 1, f'News "{i}"', _text(generator, i % 2)) for i in range(count)]
    write_csv(folder / f"{split}.csv", rows)


def cogs(folder, split, generator, count):
    kinds = TYPES[1:] if split == "gen" else TYPES[:1]
    rows = []
    for i in range(count):
        name = generator.choice(PEOPLE)
        rows.append((f"{name} ate .", f"eat . agent ( x _ 1 , {name} )", kinds[i % len(kinds)]))
    name = "dev" if split == "validation" else split
    write_tsv(folder / f"{name}.tsv", rows)


def _glue_split(split):
    return split.replace("validation", "dev")


def mnli(folder, split, generator, count):
    words, rows = TASKS["mnli"].words, []
    for i, (first, second, _) in enumerate(_pairs(generator, count)):
        rows.append([i, "id", "id", "genre", first, second, words[i % 3]])
    header = "index promptID pairID genre sentence1 sentence2 gold_label".split()
    if split.startswith("test"):
        rows, header = [row[:-1] for row in rows], header[:-1]
    name = _glue_split(split) if "mismatched" in split else f"{_glue_split(split)}_matched"
    write_tsv(folder / f"{'train' if split == 'train' else name}.tsv", rows, header)


def squad(folder, split, generator, count):
    paragraphs = []
    for i in range(count):
        name, place = generator.choice(PEOPLE), generator.choice(PLACES)
        context = f"In summer {name} went to {place} by train."
        answers = [{"text": place, "answer_start": context.index(place)}]
        question = {"id": f"{split}{i}", "question": f"Where did {name} go?", "answers": answers}
        paragraphs.append({"context": context, "qas": [question]})
    articles = [{"title": "Travel", "paragraphs": paragraphs}]
    name = {"train": "train-v1.1", "validation": "dev-v1.1"}[split]
    content = json.dumps({"version": "1.1", "data": articles}, indent=2)
    (folder / f"{name}.json").write_text(content)


def cola(folder, split, generator, count):
    texts = [_text(generator, i % 2) for i in range(count)]
    if split == "test":
        write_tsv(folder / "test.tsv", enumerate(texts), ["index", "sentence"])
    else:
        rows = [("gj04", i % 2, "*" if i % 2 == 0 else "", text) for i, text in enumerate(texts)]
        write_tsv(folder / f"{_glue_split(split)}.tsv", rows)


def _glue_pairs(task, columns, label, words=None, test_columns=None):
    def write(folder, split, generator, count):
        rows, hidden = [], split == "test"
        for i, (first, second, same) in enumerate(_pairs(generator, count)):
            target = words[same] if words else same
            rows.append([i, first, second, *([] if hidden else [target])])
        header = ["index", *columns, *([] if hidden else [label])]
        write_tsv(folder / f"{_glue_split(split)}.tsv", rows, header)

    return write


def mrpc(folder, split, generator, count):
    rows = [(same, i, i, a, f'{b} "') for i, (a, b, same) in enumerate(_pairs(generator, count))]
    header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    write_tsv(folder / f"{_glue_split(split)}.tsv", rows, header)


def stsb(folder, split, generator, count):
    rows = [
        (i, "main", a, b, round(generator.random() * 5, 3) if i else 5.0)
        for i, (a, b, _) in enumerate(_pairs(generator, count))
    ]
    header = ["index", "genre", "sentence1", "sentence2", "score"]
    if split == "test":
        rows, header = [row[:-1] for row in rows], header[:-1]
    write_tsv(folder / f"{_glue_split(split)}.tsv", rows, header)


def ax(folder, split, generator, count):
    rows = [(i, a, b) for i, (a, b, _) in enumerate(_pairs(generator, count))]
    write_tsv(folder / "diagnostic.tsv", rows, ["index", "sentence1", "sentence2"])


def _superglue_name(split):
    return {"validation": "val"}.get(split, split)


def _superglue(make):
    def write(folder, split, generator, count):
        rows = []
        for i, (first, second, same) in enumerate(_pairs(generator, count)):
            row = {**make(i, first, second, same, generator), "idx": i}
            if split == "test":
                row.pop("label", None)
            rows.append(row)
        write_jsonl(folder / f"{_superglue_name(split)}.jsonl", rows)

    return write


def _wsc(i, first, second, same, generator):
    text = f"{PEOPLE[i % 4]} said that she {first}"
    target = {"span1_text": PEOPLE[i % 4], "span1_index": 0, "span2_text": "she"}
    return {"text": text, "target": {**target, "span2_index": 3}, "label": bool(same)}


def multirc(folder, split, generator, count):
    rows = []
    for i in range(-(-count // 4)):
        questions = []
        for q in range(2):
            answers = [{"text": PEOPLE[a], "idx": 4 * i + 2 * q + a} for a in range(2)]
            if split != "test":
                answers = [{**answer, "label": int(q == a)} for a, answer in enumerate(answers)]
            questions.append({"question": "Who ?", "idx": 2 * i + q, "answers": answers})
        passage = {"text": f"<b>Sent 1:</b> {PEOPLE[i % 4]} ran", "questions": questions}
        rows.append({"idx": i, "passage": passage})
    write_jsonl(folder / f"{_superglue_name(split)}.jsonl", rows)


def record(folder, split, generator, count):
    rows = []
    for i in range(count):
        first, second = generator.sample(PEOPLE, 2)
        text = f"{first} met {second}\n@highlight\nsummer"
        entities = [
            {"start": text.index(name), "end": text.index(name) + len(name) - 1}
            for name in (first, second)
        ]
        query = {"query": "@placeholder met her", "idx": i}
        if split != "test":
            query["answers"] = [{**entities[0], "text": first}]
        rows.append({"idx": i, "passage": {"text": text, "entities": entities}, "qas": [query]})
    write_jsonl(folder / f"{_superglue_name(split)}.jsonl", rows)


ENTAIL = ("not_entailment", "entailment")
GLUE_SENTENCES = ("sentence1", "sentence2")
WRITERS = {
    "civil_comments": civil_comments,
    "wiki_toxicity": wiki_toxicity,
    "imdb": imdb,
    "sst2": sst2,
    "sentiment140": sentiment140,
    "trec": trec,
    "trec_fine": trec,
    "ag_news": ag_news,
    "cogs": cogs,
    "mnli": mnli,
    "squad": squad,
    "cola": cola,
    "mrpc": mrpc,
    "stsb": stsb,
    "qqp": _glue_pairs("qqp", ("question1", "question2"), "is_duplicate"),
    "qnli": _glue_pairs("qnli", ("question", "sentence"), "label", ENTAIL),
    "rte": _glue_pairs("rte", GLUE_SENTENCES, "label", ENTAIL),
    "wnli": _glue_pairs("wnli", GLUE_SENTENCES, "label"),
    "ax": ax,
    "boolq": _superglue(
        lambda i, a, b, same, g: {"question": a, "passage": b, "label": bool(same)}
    ),
    "cb": _superglue(
        lambda i, a, b, same, g: {
            "premise": a,
            "hypothesis": b,
            "label": TASKS["cb"].words[i % 3],
        }
    ),
    "copa": _superglue(
        lambda i, a, b, same, g: {
            "premise": a,
            "choice1": b,
            "choice2": _text(g, False),
            "question": ("cause", "effect")[i % 2],
            "label": same,
        }
    ),
    "multirc": multirc,
    "record": record,
    "wic": _superglue(
        lambda i, a, b, same, g: {
            "word": "film",
            "sentence1": a,
            "sentence2": b,
            "start1": 0,
            "label": bool(same),
        }
    ),
    "wsc": _superglue(_wsc),
    # The diagnostic sets are given with their labels.
    "axb": lambda folder, split, generator, count: write_jsonl(
        folder / "AX-b.jsonl",
        [
            {"sentence1": a, "sentence2": b, "label": ENTAIL[same], "idx": i}
            for i, (a, b, same) in enumerate(_pairs(generator, count))
        ],
    ),
    "axg": lambda folder, split, generator, count: write_jsonl(
        folder / "AX-g.jsonl",
        [
            {"premise": a, "hypothesis": b, "label": ENTAIL[same], "idx": i}
            for i, (a, b, same) in enumerate(_pairs(generator, count))
        ],
    ),
}


def write_task(folder: Path, task: str, count: int = 12, seed: int = 0) -> Path:
    """The files of every split of a task, with `count` rows each; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(_splits(task)):
        WRITERS[task](folder, split, random.Random(f"{task} {seed} {number}"), count)
    return folder


def make_tokenizer(texts) -> PreTrainedTokenizerFast:
    """A token for each word, and T5's way of ending texts and pairs."""
    split = pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", "$A </s> $B </s>", [("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_tiny_model(folder: Path, texts, cls=ConvT5ForConditionalGeneration, **fields) -> Path:
    """A model of 16 channels with a word-level tokenizer for those texts."""
    tokenizer = make_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    cls(tiny_config(vocab_size=len(tokenizer), **fields)).save_pretrained(folder)
    return folder
