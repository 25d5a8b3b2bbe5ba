"""The tokenizer of a run: its file, and what span corruption and the model need to know of it."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer

# The vocabulary of a model is a multiple of this, as T5's is, so that devices can share it.
MULTIPLE = 128


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer and its special tokens.

    Attributes:
        path: the tokenizer.json.
        sha256: of that file.
        tokenizer: without padding and truncation.
        size: ids that it can give, sentinels included.
        pad_token_id, eos_token_id: of `<pad>` and `</s>`.
        first_sentinel_id: of `<extra_id_0>`; the others count down from it.
        num_sentinels: how many there are.
    """

    path: Path
    sha256: str
    tokenizer: Tokenizer = field(repr=False, compare=False)
    size: int
    pad_token_id: int
    eos_token_id: int
    first_sentinel_id: int
    num_sentinels: int

    @property
    def vocab_size(self) -> int:
        """The least multiple of 128 that holds every id."""
        return -(-self.size // MULTIPLE) * MULTIPLE


def open_tokenizer(name: str) -> TokenizerFile:
    """Open a tokenizer.json, a folder that holds one, or that of a repository on the Hub.

    Raises:
        ValueError: if there is none, or if it lacks T5's special tokens.
    """
    path = _find(name)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"tokenizer={name}: {path} is not a tokenizer of the `tokenizers` library ({error})."
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # "</s>" in a text is text, as for SentencePiece
    ids = {token: tokenizer.token_to_id(token) for token in ("<pad>", "</s>", "<extra_id_0>")}
    missing = [token for token, number in ids.items() if number is None]
    if missing:
        raise ValueError(
            f"tokenizer={name}: {path} has no {', '.join(missing)}. Span corruption needs T5's "
            "special tokens: <pad>, </s> and the sentinels <extra_id_0>, <extra_id_1>, ..."
        )
    first, count = ids["<extra_id_0>"], 1
    while tokenizer.token_to_id(f"<extra_id_{count}>") == first - count:
        count += 1
    if tokenizer.token_to_id(f"<extra_id_{count}>") is not None:
        raise ValueError(
            f"tokenizer={name}: <extra_id_{count}> has the id "
            f"{tokenizer.token_to_id(f'<extra_id_{count}>')}, expected {first - count}: sentinels "
            "count down from <extra_id_0>, as in T5's vocabulary."
        )
    return TokenizerFile(
        path=path,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        tokenizer=tokenizer,
        size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        pad_token_id=ids["<pad>"],
        eos_token_id=ids["</s>"],
        first_sentinel_id=first,
        num_sentinels=count,
    )


def _find(name):
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return path
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and path.suffix != ".json":
        try:
            return Path(hf_hub_download(name, "tokenizer.json"))
        except OSError as error:
            raise ValueError(
                f"tokenizer={name}: no such file or folder, and the Hub did not give it ({error})."
            ) from error
    raise ValueError(
        f"tokenizer={name}: there is no file {path}. Pass a tokenizer.json, a folder that holds "
        "one, or a repository on the Hub."
    )
