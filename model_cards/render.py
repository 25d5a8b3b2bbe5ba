"""Model cards from a configuration and results files: `python -m model_cards.render`.

Without arguments it writes the cards of the released variants into model_cards/cards/. What was
not measured is said to be "not evaluated"; numbers of an evaluation come from a results file alone.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from huggingface_hub import ModelCard, ModelCardData

import modeling_convt5
from evaluation.results import headline, model_index, read_results
from modeling_convt5 import ConvT5Config

HERE = Path(__file__).parent
SECTIONS = (
    "Model details",
    "Usage",
    "Intended use and out-of-scope use",
    "Limitations",
    "Training data and procedure",
    "Evaluation",
    "Speed and memory",
    "Environmental figures",
    "Variants",
    "Fine-tuning",
    "Files",
    "Citation",
)
METADATA = ("language", "library_name", "license", "pipeline_tag", "tags")
NOT_EVALUATED = "Not evaluated: no results file belongs to this checkpoint yet."
NOT_MEASURED = "Not measured for this checkpoint."
LIMITATIONS = (
    "- English text only. What the training text says about people, the model may repeat.\n"
    "- No study of bias was made of this checkpoint."
)
PAPER = "Tay et al. 2021, arXiv 2105.03322"
# Fields that tell one model of the family from another.
SHOWN = (
    "d_model d_kv num_heads d_ff num_layers num_decoder_layers vocab_size encoder_mixers "
    "decoder_mixers encoder_kernel_size decoder_kernel_size encoder_dilation decoder_dilation "
    "num_filters filter_sharing position_embeddings"
).split()


@dataclass(frozen=True)
class Variant:
    """A checkpoint of the family: its name, the preset it is of, and where its weights are from."""

    name: str
    preset: str
    origin: str


CONVERTED = (
    f"converted from a Mesh-TensorFlow checkpoint that the authors of {PAPER}, published "
    "(google-research, `pretrained_conv`), with `python -m conversion.convert_mesh_tf`"
)
PRESET = (
    "a preset of this family, to be pre-trained with `python -m pretraining.main`; no weights of "
    "it are released yet"
)
VARIANTS = {
    variant.name: variant
    for variant in (
        *(
            Variant(f"convt5-{name}", name, CONVERTED)
            for name in (
                "released-lightweight-small",
                "released-lightweight-base",
                "released-lightweight-large",
                "released-dynamic-base",
                "released-dynamic-large",
            )
        ),
        *(
            Variant(f"convt5-{name}", name, PRESET)
            for name in ("lightweight-base", "dynamic-base", "dilated-base", "transformer-base")
        ),
    )
}


@dataclass(frozen=True)
class Kind:
    """How a checkpoint is opened, what it is used for, and what its use prints."""

    auto: str
    tag: str
    use: str


GENERATE = "tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])"
KINDS = {
    "ConvT5ForConditionalGeneration": Kind("Seq2SeqLM", "text2text-generation", GENERATE),
    "ConvT5ForSequenceClassification": Kind(
        "SequenceClassification", "text-classification", "model(**inputs).logits.softmax(-1)"
    ),
    "ConvT5ForTokenClassification": Kind(
        "TokenClassification", "token-classification", "model(**inputs).logits.softmax(-1)"
    ),
    "ConvT5ForQuestionAnswering": Kind(
        "QuestionAnswering", "question-answering", "model(**inputs).start_logits.argmax(-1)"
    ),
    "ConvT5EncoderModel": Kind(
        "TextEncoding", "feature-extraction", "model(**inputs).last_hidden_state"
    ),
}


def architecture(config: ConvT5Config) -> str:
    """The class that a checkpoint was saved from; the language model for a mere preset."""
    return (config.architectures or ["ConvT5ForConditionalGeneration"])[0]


def _kind(config):
    name = architecture(config)
    if name not in KINDS:
        raise ValueError(
            f"config.json names the architecture {name!r}: a card can be written for one of "
            f"{', '.join(KINDS)}."
        )
    return KINDS[name]


def count_parameters(config: ConvT5Config) -> int:
    """The number of parameters, counted in a model without memory for them."""
    with torch.device("meta"):
        model = getattr(modeling_convt5, architecture(config))(config)
    return model.num_parameters()


def short(values) -> str:
    """A field as a card shows it: lists of one value as that value."""
    if isinstance(values, (list, tuple)):
        if len(set(values)) == 1:
            return f"{values[0]} in each layer"
        return ", ".join(map(str, values))
    return str(values)


def receptive_field(config: ConvT5Config) -> str:
    """How many tokens reach a state at the top of the encoder, in words."""
    reach = 1
    layers = zip(
        _each(config.encoder_mixers, config.num_layers),
        _each(config.encoder_kernel_size, config.num_layers),
        _each(config.encoder_dilation, config.num_layers),
        strict=True,
    )
    for mixer, taps, dilation in layers:
        if mixer == "attention":
            return (
                "The encoder has attention layers, through which every token reaches every other."
            )
        reach += (taps - 1) * dilation
    return (
        f"A state at the top of the encoder sees {reach} tokens. Texts that must be compared over "
        "a longer distance (two sentences, a question and its paragraph) want an attention layer: "
        "the paper's own models are weaker there."
    )


def _each(value, layers):
    return list(value) if isinstance(value, (list, tuple)) else [value] * layers


def evaluation_section(records: Sequence[dict]) -> str:
    """A table of the tasks' own metrics with mean, spread and seeds, or that there are none."""
    if not records:
        return NOT_EVALUATED
    lines = ["| task | rows | metric | mean | std | seeds |", "|---|---|---|---|---|---|"]
    for record in records:
        where = record.get("evaluated_on", "test")
        for name in headline(record):
            metric = record["metrics"][name]
            lines.append(
                f"| {record['task']} | {record['rows'].get(where, '')} {where} | {name} | "
                f"{metric['mean']:.4f} | {metric['std']:.4f} | {len(metric['per_seed'])} |"
            )
    lines += ["", "Metrics are fractions. The commands:", ""]
    lines += ["```", *(record["command"] for record in records), "```"]
    return "\n".join(lines)


def code_files(folder: Path) -> list[Path]:
    """The Python files of a checkpoint's folder."""
    return sorted(folder.glob("*.py"))


def files_section(folder: Path | None) -> str:
    """The code with its sha256, which a reader compares with what is downloaded."""
    if folder is None:
        return "Listed with their sha256 when the checkpoint is published."
    rows = [
        f"| {p.name} | `{hashlib.sha256(p.read_bytes()).hexdigest()}` |" for p in code_files(folder)
    ]
    return "\n".join(["| file | sha256 |", "|---|---|", *rows])


def render(
    repo_id: str,
    config: ConvT5Config,
    origin: str,
    records: Sequence[dict] = (),
    folder: Path | None = None,
    plots: Sequence[str] = (),
) -> str:
    """A card as text, with its metadata.

    Args:
        origin: where the weights are from, as a part of a sentence.
        records: of `evaluation.results.read_results`.
        folder: of the checkpoint, for the list of its code.
        plots: paths in the repository of pictures of these results.
    """
    mixers = sorted({*_each(config.encoder_mixers, 1), *_each(config.decoder_mixers, 1)})
    fields = [f"| `{name}` | {short(getattr(config, name))} |" for name in SHOWN]
    kind = _kind(config)
    evaluation = evaluation_section(records)
    evaluation += "".join(f"\n\n![{Path(plot).stem}]({quote(plot)})" for plot in plots)
    name = repo_id.rpartition("/")[2]
    text = (HERE / "template.md").read_text("utf-8")
    body = text.format(
        title=name,
        summary=f"ConvT5: T5 whose token mixing is a convolution ({PAPER}). This checkpoint is "
        f"{origin}. Its mixers: {', '.join(mixers)}.",
        details="\n".join(["| field | value |", "|---|---|", *fields]),
        sizes=f"{count_parameters(config):,} parameters, shared ones counted once.",
        repo_id=repo_id,
        auto=kind.auto,
        use=kind.use,
        example="The filter reads its <extra_id_0> and nothing else.",
        limitations=f"- {receptive_field(config)}\n{LIMITATIONS}",
        training=_training(origin, records),
        evaluation=evaluation,
        speed=NOT_MEASURED + " The family's measurements stand in the source repository under "
        "benchmarks/results, each with its command.",
        environment=NOT_MEASURED,
        variants="\n".join(f"- {v.name}: {v.origin.partition(',')[0]}" for v in VARIANTS.values()),
        files=files_section(folder),
    )
    card = ModelCard(f"---\n{_metadata(name, kind, records).to_yaml()}\n---\n\n{body}")
    return str(card).rstrip() + "\n"


def _training(origin, records):
    """How the weights came to be: what the origin says, and the commands of fine-tuning."""
    text = f"The weights are {origin}."
    if origin == CONVERTED:
        text += (
            " The paper pre-trains on C4 by span corruption (15 % of the tokens, spans of three on "
            "average) for 524,288 steps of 128 texts of 512 tokens, with Adafactor and an inverse "
            "square root schedule; the conversion changes no weight."
        )
    tuned = sorted({record["task"] for record in records if "method" in record})
    if tuned:
        text += f" Results are given for: {', '.join(tuned)}; their commands stand below."
    return text


def _metadata(name, kind, records):
    return ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=kind.tag,
        tags=["convt5", "t5", "convolution", "jax", "safetensors", "custom_code"],
        model_name=name if records else None,
        eval_results=model_index(records) if records else None,
    )


def check_card(text: str, records: Sequence[dict]) -> None:
    """Refuse a card that is incomplete, or whose evaluation says what no results file says.

    Raises:
        ValueError: naming the section or field, or the number.
    """
    data = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    missing = [name for name in METADATA if not data.get(name)]
    if missing:
        raise ValueError(f"The card's metadata lacks {', '.join(missing)}.")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    if tuple(headings) != SECTIONS:
        wrong = [name for name in SECTIONS if name not in headings]
        raise ValueError(
            f"The card's sections are {headings}; missing or out of order: {wrong or headings}. "
            f"Expected {', '.join(SECTIONS)}."
        )
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for name, content in sections.items():
        if not content.strip():
            raise ValueError(f"The card's section {name!r} is empty.")
    known = set(re.findall(r"\d+\.\d+", evaluation_section(records)))
    for number in re.findall(r"\d+\.\d+", sections["Evaluation"]):
        if number not in known:
            raise ValueError(
                f"The card's evaluation says {number}, which is in no results file: numbers are "
                "rendered, not typed."
            )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model_cards.render", description=__doc__)
    parser.add_argument("--output_dir", default=str(HERE / "cards"))
    parser.add_argument("--owner", default="convt5", help="of the repositories in the snippets")
    parser.add_argument("--variant", choices=VARIANTS, help="one of them; all by default")
    parser.add_argument("--results", nargs="*", default=[], help="results files of that variant")
    args = parser.parse_args(argv)
    if args.results and not args.variant:
        parser.error("--results needs --variant: results belong to one checkpoint")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        records = [record for path in args.results for record in read_results(path)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in [args.variant] if args.variant else VARIANTS:
        variant = VARIANTS[name]
        config = ConvT5Config.from_preset(variant.preset)
        text = render(f"{args.owner}/{name}", config, variant.origin, records)
        check_card(text, records)
        (folder / f"{name}.md").write_text(text, "utf-8")
        print(folder / f"{name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
