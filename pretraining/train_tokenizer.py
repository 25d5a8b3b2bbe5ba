"""A tokenizer of one's own, for a language or a size of vocabulary that T5's does not serve.

    python -m pretraining.train_tokenizer --data TEXT --output tokenizer.json --vocab_size 8000

Unigram, as T5's, and with its special tokens: <pad> 0, </s> 1, <unk> 2, and the sentinels at the
end, <extra_id_0> the last. Trained on a sample of the documents that `pretraining.prepare` reads.
"""

import argparse
import json
import math
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import UnigramTrainer
from tqdm import tqdm

from .documents import find_sources, read
from .tokens import MULTIPLE

SENTINELS = 100
SPECIAL = ("<pad>", "</s>", "<unk>")
FREQUENT = 1e-5  # share of the words


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A Unigram tokenizer of at most `vocab_size` ids, 100 of them sentinels.

    Raises:
        ValueError: if there is no text, or no room for characters beside the special tokens.
    """
    least = len(SPECIAL) + SENTINELS + 1
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size}: expected at least {least}, of which {least - 1} are special."
        )
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    # Words, digits and punctuation, each with the space before it: splitting these keeps the
    # candidates few and the trainer's numbers finite.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Split(
                Regex(r"▁?\p{L}+|▁?\p{N}|▁?[^\p{L}\p{N}▁]|▁"), behavior="isolated"
            ),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    texts = list(texts)
    characters = {c for text in texts for c in unicodedata.normalize("NFKC", text)} | {"▁"}
    room = vocab_size - least - len(characters)
    short = dict(_short_words(texts).most_common(max(0, room)))
    trainer = UnigramTrainer(
        vocab_size=vocab_size - SENTINELS - len(short),
        special_tokens=list(SPECIAL),
        unk_token="<unk>",
    )
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"vocab_size={vocab_size}: {error}. The text has {len(characters):,} different "
            f"characters: {least + len(characters):,} ids hold them."
        ) from None
    if tokenizer.get_vocab_size() <= len(SPECIAL):
        raise ValueError("There is no text to train a tokenizer on.")
    _add_words(tokenizer, short, texts)
    # Small text may not fill the vocabulary; the sentinels still end it, highest id first.
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(SENTINELS))])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def _short_words(texts):
    """Counts of the frequent words of one character, "▁(" or "▁1"; of "(1)", "▁(" is one.

    The trainer's candidates are what several different words have in common, and these are often
    like no other: "▁(" would stay two tokens however frequent it is.
    """
    counts, words = Counter(), 0
    for text in texts:
        found = [word for word in unicodedata.normalize("NFKC", text).split(" ") if word]
        words += len(found)
        counts.update(f"▁{w[0]}" for w in found if len(w) == 1 or not w[0].isalpha())
    return Counter({word: n for word, n in counts.items() if n >= FREQUENT * words})


def _add_words(tokenizer, counts, texts):
    """Make the words tokens, at their share of all tokens: the likeliest scores of a Unigram."""
    model = json.loads(tokenizer.to_str())["model"]
    total = sum(len(encoding) for encoding in tokenizer.encode_batch_fast(texts))
    known = {piece for piece, _ in model["vocab"]}
    new = [(word, math.log(n / total)) for word, n in counts.items() if word not in known]
    tokenizer.model = models.Unigram(
        [(piece, score) for piece, score in model["vocab"]] + new, unk_id=model["unk_id"]
    )


def sample(data: str, documents: int) -> Iterator[str]:
    """So many training documents of `data` at most, as many of each source, the same every time.

    Raises:
        ValueError: if there is no text.
    """
    sources = [source for source in find_sources(data) if source.split == "train"]
    share, skipped = -(-documents // len(sources)), Counter()
    for source in tqdm(sources, unit="file", desc="text", disable=None):
        yield from _reservoir(read(source, skipped), share)
    for reason, count in skipped.items():
        print(f"left out {count} x {reason}", file=sys.stderr)


def _reservoir(texts, count):
    """`count` of the texts, each with the same chance (Vitter's algorithm R)."""
    generator, kept = random.Random(0), []
    for number, text in enumerate(texts):
        if number < count:
            kept.append(text)
        elif (place := generator.randrange(number + 1)) < count:
            kept[place] = text
    return kept


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretraining.train_tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="file, folder, or hf://owner/name/config")
    parser.add_argument("--output", required=True, type=Path, help="the tokenizer.json to write")
    parser.add_argument("--vocab_size", type=int, default=32_000, help="ids, sentinels included")
    parser.add_argument("--documents", type=int, default=20_000, help="read at most so many")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    args = parser.parse_args(arguments)
    if args.output.exists() and not args.overwrite:
        parser.error(f"--output {args.output} exists. Pass --overwrite to replace it.")
    if args.documents < 1:
        parser.error("--documents must be 1 or more.")
    try:
        tokenizer = train_tokenizer(sample(args.data, args.documents), args.vocab_size)
    except ValueError as error:
        parser.error(str(error))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.output.with_name(f"{args.output.name}.incomplete")
    tokenizer.save(str(unfinished))
    unfinished.replace(args.output)
    size = tokenizer.get_vocab_size()
    print(f"{args.output}: {size:,} ids; a model has {-(-size // MULTIPLE) * MULTIPLE:,}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
