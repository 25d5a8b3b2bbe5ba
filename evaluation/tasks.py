"""The tasks as data: what their rows look like, what a model reads and writes, how it is scored.

The paper's seven data sets and COGS (Tay et al. 2021, table 2), MultiNLI and SQuAD (its section on
two sentences at once), and the tasks of GLUE and SuperGLUE under the names that the Hub gives them.
`data.py` reads their files, `metrics.py` computes their metrics.
"""

from dataclasses import dataclass, field, replace

ENTAILMENT = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not_entailment")
TRUTH = ("False", "True")
SENTIMENT = ("negative", "positive")

# Where the Hub keeps its own parquet copy of data sets that consist of a loading script.
CONVERTED = "refs/convert/parquet"

# The 50 question types of Li and Roth 2002, in the order of the Hub's `fine_label`.
TREC_FINE = tuple(
    f"{coarse}:{fine}"
    for coarse, names in {
        "ABBR": "abb exp",
        "ENTY": "animal body color cremat currency dismed event food instru lang letter other "
        "plant product religion sport substance symbol techmeth termeq veh word",
        "DESC": "def desc manner reason",
        "HUM": "gr ind title desc",
        "LOC": "city country mount other state",
        "NUM": "code count date dist money ord other period perc speed temp volsize weight",
    }.items()
    for fine in names.split()
)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: its id on the command line.
        columns: each column that the template reads, and the other names files give it.
        template: the model's input; `{column}` is replaced.
        words: the target text of each class, in the order of the official class numbers; empty
            where the target is a text.
        metrics: names in `metrics.METRICS`; the first decides which checkpoint is best.
        rows: official number of rows of each split.
        label: the names of the label column, or of the column that holds the target text.
        kind: "classification", "similarity" (a number from 0 to 5, written as a word), "text" (one
            right text), "answers" (several right texts), "entity" (one of the row's `entities`).
        hub: data set, configuration and revision on the Hub, where it is parquet; None where the
            authors keep no copy there.
        hub_splits: our split -> the Hub's, where they differ.
        files: our split -> the stems of its files beside the usual ones.
        headerless: the columns of official files without a header; the number of columns decides.
        spellings: other ways in which files write a class -> its number, or None to drop the row.
        extra: columns kept if a file has them: identifiers, groups, types.
        joined: a column -> the columns it is made of where a file does not have it.
        raw: how the lines of an official file without columns look, as a regular expression.
        latin1: whether the official files are in ISO-8859-1 rather than in UTF-8.
        broken_lines: whether the official files have lines of another number of columns, which are
            left out.
        label_files: our split -> the stem of an official file that holds its labels apart.
        target_length: the most tokens of a target text.
    """

    name: str
    columns: dict[str, tuple[str, ...]]
    template: str
    words: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: dict[str, int]
    label: tuple[str, ...] = ("label",)
    kind: str = "classification"
    hub: tuple[str, str, str] | None = None
    hub_splits: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    headerless: tuple[tuple[str, ...], ...] = ()
    spellings: dict[str, int | None] = field(default_factory=dict)
    extra: tuple[str, ...] = ("idx",)
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    raw: str | None = None
    latin1: bool = False
    broken_lines: bool = False
    label_files: dict[str, str] = field(default_factory=dict)
    target_length: int = 32

    def input_text(self, row: dict) -> str:
        """What the model reads for a row."""
        texts = {name: row[name] for name in self.columns}
        for name, value in texts.items():
            texts[name] = ", ".join(value) if isinstance(value, list) else value
        return self.template.format(**texts)

    def target_text(self, row: dict) -> str:
        """What the model is taught to write for a row."""
        if self.kind == "classification":
            return self.words[row["label"]]
        if self.kind == "similarity":
            return nearest_score(row["label"])
        return row["label"] if self.kind == "text" else row["answers"][0]

    def candidates(self, row: dict) -> list[str] | None:
        """The texts of which one is right, or None if any text may be."""
        if self.kind == "entity":
            return list(row["entities"])
        return list(self.words) or None


def nearest_score(value: float) -> str:
    """A similarity as T5 writes it: the nearest multiple of 0.2, with one decimal."""
    return f"{round(value * 5) / 5:.1f}"


def _pair(name, first, second, **fields):
    """A task on two texts, with T5's prefix."""
    (a, *a_names), (b, *b_names) = first, second
    columns = {a: tuple(a_names), b: tuple(b_names)}
    return Task(name, columns, f"{name} {a}: {{{a}}} {b}: {{{b}}}", **fields)


def _glue(config):
    return ("nyu-mll/glue", config, "main")


def _superglue(config):
    return ("aps/super_glue", config, CONVERTED)


SENTENCES = (("sentence1", "premise"), ("sentence2", "hypothesis"))
PREMISES = (("premise", "sentence1"), ("hypothesis", "sentence2"))

PAPER = [
    Task(
        "civil_comments",
        {"text": ("comment_text", "comment")},
        "civil_comments text: {text}",
        ("civil", "toxic"),
        ("accuracy", "f1", "macro_f1"),
        {"train": 1804874, "validation": 97320, "test": 97320},
        label=("toxicity", "target", "label"),
        hub=("google/civil_comments", "default", "main"),
    ),
    Task(
        "wiki_toxicity",
        {"text": ("comment_text", "comment")},
        "wiki_toxicity text: {text}",
        ("civil", "toxic"),
        ("accuracy", "f1", "macro_f1"),
        {"train": 127656, "validation": 31915, "test": 63978},
        label=("toxicity", "toxic", "label"),
        hub=("OxAISH-AL-LLM/wiki_toxic", "default", CONVERTED),
        label_files={"test": "test_labels"},
    ),
    Task(
        "imdb",
        {"text": ("review", "sentence")},
        "imdb text: {text}",
        SENTIMENT,
        ("accuracy",),
        {"train": 25000, "test": 25000},
        label=("label", "sentiment"),
        hub=("stanfordnlp/imdb", "plain_text", "main"),
        spellings={"neg": 0, "pos": 1},
    ),
    Task(
        "sst2",
        {"sentence": ("text",)},
        "sst2 sentence: {sentence}",
        SENTIMENT,
        ("accuracy",),
        {"train": 67349, "validation": 872, "test": 1821},
        label=("label", "sentiment"),
        hub=_glue("sst2"),
        files={"test": ("test_labelled",)},
    ),
    Task(
        "sentiment140",
        {"text": ("tweet", "sentence")},
        "sentiment140 text: {text}",
        SENTIMENT,
        ("accuracy",),
        {"train": 1600000, "test": 359},
        label=("label", "sentiment", "polarity", "target"),
        hub=("stanfordnlp/sentiment140", "sentiment140", CONVERTED),
        files={
            "train": ("training.1600000.processed.noemoticon",),
            "test": ("test_359_binary", "test_498", "testdata.manual.2009.06.14"),
        },
        headerless=(("label", "id", "date", "query", "user", "text"), ("label", "text")),
        spellings={"4": 1, "2": None, "neutral": None},
        latin1=True,
    ),
    Task(
        "trec",
        {"text": ("question", "sentence")},
        "trec question: {text}",
        ("abbreviation", "entity", "description", "human", "location", "number"),
        ("accuracy", "macro_f1"),
        {"train": 5452, "test": 500},
        label=("coarse_label", "label", "label-coarse", "coarse"),
        hub=("CogComp/trec", "default", CONVERTED),
        files={"train": ("train_5500",), "test": ("TREC_10",)},
        spellings={"abbr": 0, "enty": 1, "desc": 2, "hum": 3, "loc": 4, "num": 5}
        | {
            name.lower(): "ABBR ENTY DESC HUM LOC NUM".split().index(name.split(":")[0])
            for name in TREC_FINE
        },
        raw=r"(?P<label>[A-Z]+:[a-z]+)\s+(?P<text>.+)",
        latin1=True,
    ),
    Task(
        "trec_fine",
        {"text": ("question", "sentence")},
        "trec_fine question: {text}",
        TREC_FINE,
        ("accuracy", "macro_f1"),
        {"train": 5452, "test": 500},
        label=("fine_label", "label", "label-fine", "fine"),
        hub=("CogComp/trec", "default", CONVERTED),
        files={"train": ("train_5500",), "test": ("TREC_10",)},
        raw=r"(?P<label>[A-Z]+:[a-z]+)\s+(?P<text>.+)",
        latin1=True,
    ),
    Task(
        "ag_news",
        {"text": ("content",)},
        "ag_news text: {text}",
        ("world", "sports", "business", "technology"),
        ("accuracy", "macro_f1"),
        {"train": 120000, "test": 7600},
        label=("label", "class index", "class"),
        hub=("fancyzhx/ag_news", "default", "main"),
        headerless=(("class index", "title", "description"), ("class index", "text")),
        spellings={"sci/tech": 3, "scitech": 3, "sci_tech": 3},
        joined={"text": ("title", "description")},
    ),
    Task(
        "cogs",
        {"sentence": ("text", "input", "source")},
        "cogs sentence: {sentence}",
        (),
        ("exact_match",),
        {"train": 24155, "validation": 3000, "test": 3000, "gen": 21000},
        label=("logical_form", "target", "output", "label"),
        kind="text",
        files={"gen": ("gen", "generalization")},
        headerless=(("sentence", "logical_form", "type"), ("sentence", "logical_form")),
        extra=("type", "distribution"),
        target_length=768,
    ),
    _pair(
        "mnli",
        *PREMISES,
        words=ENTAILMENT,
        metrics=("accuracy",),
        rows={
            "train": 392702,
            "validation": 9815,
            "validation_mismatched": 9832,
            "test": 9796,
            "test_mismatched": 9847,
        },
        label=("label", "gold_label"),
        hub=_glue("mnli"),
        hub_splits={"validation": "validation_matched", "test": "test_matched"},
        files={
            "validation": ("validation_matched", "dev_matched"),
            "validation_mismatched": ("validation_mismatched", "dev_mismatched"),
            "test": ("test_matched",),
            "test_mismatched": ("test_mismatched",),
        },
        spellings={"-": None},
        extra=("index", "idx"),
    ),
    Task(
        "squad",
        {"question": (), "context": ("paragraph",)},
        "question: {question} context: {context}",
        (),
        ("f1", "exact_match"),
        {"train": 87599, "validation": 10570},
        label=("answers",),
        kind="answers",
        hub=("rajpurkar/squad", "plain_text", "main"),
        files={"train": ("train-v1.1",), "validation": ("dev-v1.1",)},
        extra=("id", "title"),
        target_length=48,
    ),
]

GLUE = [
    Task(
        "cola",
        {"sentence": ("text",)},
        "cola sentence: {sentence}",
        ("unacceptable", "acceptable"),
        ("matthews",),
        {"train": 8551, "validation": 1043, "test": 1063},
        hub=_glue("cola"),
        headerless=(("source", "label", "star", "sentence"),),
        extra=("index", "idx"),
    ),
    _pair(
        "mrpc",
        ("sentence1", "#1 string"),
        ("sentence2", "#2 string"),
        words=("not_equivalent", "equivalent"),
        metrics=("f1", "accuracy"),
        rows={"train": 3668, "validation": 408, "test": 1725},
        label=("label", "quality"),
        hub=_glue("mrpc"),
        extra=("index", "idx"),
    ),
    _pair(
        "stsb",
        *SENTENCES,
        words=tuple(nearest_score(step / 5) for step in range(26)),
        metrics=("pearson", "spearman"),
        rows={"train": 5749, "validation": 1500, "test": 1379},
        label=("label", "score"),
        kind="similarity",
        hub=_glue("stsb"),
        extra=("index", "idx"),
    ),
    _pair(
        "qqp",
        ("question1",),
        ("question2",),
        words=("not_duplicate", "duplicate"),
        metrics=("f1", "accuracy"),
        rows={"train": 363846, "validation": 40430, "test": 390965},
        label=("label", "is_duplicate"),
        hub=_glue("qqp"),
        extra=("index", "id", "idx"),
        broken_lines=True,
    ),
    _pair(
        "qnli",
        ("question",),
        ("sentence",),
        words=TWO_WAY,
        metrics=("accuracy",),
        rows={"train": 104743, "validation": 5463, "test": 5463},
        hub=_glue("qnli"),
        extra=("index", "idx"),
    ),
    _pair(
        "rte",
        *SENTENCES,
        words=TWO_WAY,
        metrics=("accuracy",),
        rows={"train": 2490, "validation": 277, "test": 3000},
        hub=_glue("rte"),
        extra=("index", "idx"),
    ),
    _pair(
        "wnli",
        *SENTENCES,
        words=("not_entailment", "entailment"),
        metrics=("accuracy",),
        rows={"train": 635, "validation": 71, "test": 146},
        hub=_glue("wnli"),
        extra=("index", "idx"),
    ),
    _pair(  # GLUE's diagnostic set, answered by a model of MultiNLI
        "ax",
        *PREMISES,
        words=ENTAILMENT,
        metrics=("matthews", "accuracy"),
        rows={"test": 1104},
        hub=_glue("ax"),
        files={"test": ("diagnostic",)},
        extra=("index", "idx"),
    ),
]

SUPERGLUE = [
    Task(
        "boolq",
        {"question": (), "passage": ()},
        "boolq question: {question} passage: {passage}",
        TRUTH,
        ("accuracy",),
        {"train": 9427, "validation": 3270, "test": 3245},
        label=("label", "answer"),
        hub=_superglue("boolq"),
    ),
    _pair(
        "cb",
        *PREMISES,
        words=("entailment", "contradiction", "neutral"),
        metrics=("macro_f1", "accuracy"),
        rows={"train": 250, "validation": 56, "test": 250},
        hub=_superglue("cb"),
    ),
    Task(
        "copa",
        {"premise": (), "choice1": (), "choice2": (), "question": ()},
        "copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
        ("choice1", "choice2"),
        ("accuracy",),
        {"train": 400, "validation": 100, "test": 500},
        hub=_superglue("copa"),
    ),
    Task(
        "multirc",
        {"question": (), "answer": (), "paragraph": ("passage",)},
        "multirc question: {question} answer: {answer} paragraph: {paragraph}",
        TRUTH,
        ("f1", "group_exact_match"),
        {"train": 27243, "validation": 4848, "test": 9693},
        hub=_superglue("multirc"),
    ),
    Task(
        "record",
        {"query": (), "entities": (), "passage": ()},
        "record query: {query} entities: {entities} passage: {passage}",
        (),
        ("f1", "exact_match"),
        {"train": 100730, "validation": 10000, "test": 10000},
        label=("answers",),
        kind="entity",
        hub=_superglue("record"),
    ),
    Task(
        "wic",
        {"word": (), "sentence1": (), "sentence2": ()},
        "wic word: {word} sentence1: {sentence1} sentence2: {sentence2}",
        TRUTH,
        ("accuracy",),
        {"train": 5428, "validation": 638, "test": 1400},
        hub=_superglue("wic"),
    ),
    Task(
        "wsc",
        {"text": (), "span1_text": (), "span2_text": ()},
        "wsc pronoun: {span2_text} noun: {span1_text} text: {text}",
        TRUTH,
        ("accuracy",),
        {"train": 554, "validation": 104, "test": 146},
        hub=_superglue("wsc.fixed"),
    ),
    _pair(  # SuperGLUE's two diagnostic sets, answered by a model of RTE
        "axb",
        *SENTENCES,
        words=TWO_WAY,
        metrics=("matthews", "accuracy"),
        rows={"test": 1104},
        hub=_superglue("axb"),
        files={"test": ("AX-b",)},
    ),
    _pair(
        "axg",
        *SENTENCES,
        words=TWO_WAY,
        metrics=("accuracy",),
        rows={"test": 356},
        hub=_superglue("axg"),
        files={"test": ("AX-g",)},
    ),
]

TASKS: dict[str, Task] = {task.name: task for task in (*PAPER, *GLUE, *SUPERGLUE)}
# Diagnostic sets have no training rows: the task whose model answers them, with its input.
ANSWERED_BY = {"ax": "mnli", "axb": "rte", "axg": "rte"}
for _name, _other in ANSWERED_BY.items():
    TASKS[_name] = replace(
        TASKS[_name], template=TASKS[_other].template, columns=TASKS[_other].columns
    )


def get_task(name: str) -> Task:
    """The task of that id.

    Raises:
        ValueError: listing the ids.
    """
    if name not in TASKS:
        raise ValueError(
            f"task={name!r} is not known; choose one of {', '.join(sorted(TASKS))}, or `custom` "
            "with files of your own."
        )
    return TASKS[name]


def custom_task(words: list[str], text_column: str, label_column: str) -> Task:
    """A classification of a user's own file; `words` are its labels, as they are written there."""
    return Task(
        "custom",
        {"text": (text_column,)},
        "{text}",
        tuple(words),
        ("accuracy", "macro_f1"),
        {},
        label=(label_column,),
    )
