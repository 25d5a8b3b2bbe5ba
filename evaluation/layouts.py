"""Official files that hold their rows inside one another: SQuAD, MultiRC, ReCoRD, WSC."""

from collections.abc import Callable, Iterator


def flatten(task: str, where: str, record: dict) -> list[dict]:
    """The rows of a record as a file has it, most often itself.

    Args:
        task: its name.
        where: the record's place, for the error.

    Raises:
        ValueError: if the record is nested in another way than the official files.
    """
    if task not in LAYOUTS:
        return [record]
    try:
        return list(LAYOUTS[task](record))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{where} is not nested as the official files are ({type(error).__name__}: {error})."
        ) from None


def _flatten_squad(record):
    if "paragraphs" not in record:
        yield record
        return
    for paragraph in record["paragraphs"]:
        for question in paragraph["qas"]:
            yield {"title": record.get("title"), "context": paragraph["context"], **question}


def _flatten_multirc(record):
    passage = record.get("passage")
    if not isinstance(passage, dict):
        yield record
        return
    for question in passage["questions"]:
        for answer in question["answers"]:
            place = {"paragraph": record["idx"], "question": question["idx"]}
            yield {
                "paragraph": passage["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer.get("label"),
                "idx": {**place, "answer": answer["idx"]},
            }


def _flatten_record(record):
    passage = record.get("passage")
    if not isinstance(passage, dict):
        yield record
        return
    text = passage["text"]
    spans = [text[span["start"] : span["end"] + 1] for span in passage["entities"]]
    for question in record["qas"]:
        yield {
            "passage": text.replace("\n@highlight\n", " "),
            "entities": sorted(set(spans)),
            "query": question["query"],
            "answers": sorted({answer["text"] for answer in question.get("answers", ())}),
            "idx": {"passage": record["idx"], "query": question["idx"]},
        }


def _flatten_wsc(record):
    yield {**record, **record.get("target", {})}


LAYOUTS: dict[str, Callable[[dict], Iterator[dict]]] = {
    "squad": _flatten_squad,
    "multirc": _flatten_multirc,
    "record": _flatten_record,
    "wsc": _flatten_wsc,
}
