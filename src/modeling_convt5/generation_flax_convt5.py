"""Generation in Flax: encoder, prompt and a `lax.while_loop` over new tokens in one compiled call.

Greedy and beam search choose the tokens that transformers' `generate` chooses in PyTorch, rule by
rule; sampling draws its own random numbers, reproducible by `seed`.

Shapes: B batch, R rows = B * beams (or * returned sequences), P prompt length, N new tokens, V
vocabulary.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

try:  # in a `try`, or transformers would ask PyTorch's users to install JAX
    import jax
    import jax.numpy as jnp
    from flax import nnx, struct
except ImportError as error:
    raise ImportError("ConvT5 in Flax needs JAX and Flax: pip install jax flax") from error

from .outputs_flax_convt5 import FlaxGenerateOutput

# Added to the score of what may not be chosen, as in transformers.
_IMPOSSIBLE = -1.0e9
# Inputs are padded to a multiple, so that texts of similar lengths share a compiled program.
_LENGTH_MULTIPLE = 32
# generation_config.json fields that change nothing at these values, and that only PyTorch supports
# at others.
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "guidance_scale": 1.0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "min_p": None,
    "penalty_alpha": None,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
    "max_time": None,
    "prompt_lookup_num_tokens": None,
    "constraints": None,
}


@dataclass(frozen=True)
class FlaxGenerationConfig:
    """What `generate` does unless told otherwise: generation_config.json, with T5's defaults.

    Attributes are those of transformers' `GenerationConfig`; `others` keeps the file's remaining
    fields, as JSON, so that saving loses nothing.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    others: str = field(default="{}", repr=False)

    @classmethod
    def from_folder(cls, folder: Path, config: Any) -> "FlaxGenerationConfig":
        """The file's settings, and the model configuration's special tokens where it has none."""
        path, found = folder / "generation_config.json", {}
        if path.is_file():
            try:
                found = dict(json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise OSError(f"{path} is damaged ({error}). Get it again.") from error
        return cls.from_fields(found, config)

    @classmethod
    def from_fields(cls, found: dict[str, Any], config: Any) -> "FlaxGenerationConfig":
        own = {spec.name for spec in fields(cls)} - {"others"}
        known = {key: _frozen(v) for key, v in found.items() if key in own and v is not None}
        for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id"):
            known.setdefault(name, _frozen(getattr(config, name)))
        others = {key: value for key, value in found.items() if key not in own}
        return cls(**known, others=json.dumps(others, sort_keys=True))

    def save(self, folder: Path) -> None:
        default = FlaxGenerationConfig()
        own = {k: v for k, v in asdict(self).items() if k != "others" and v != getattr(default, k)}
        text = json.dumps({**json.loads(self.others), **own}, indent=2, sort_keys=True) + "\n"
        (folder / "generation_config.json").write_text(text)

    def with_arguments(self, arguments: dict[str, Any]) -> "FlaxGenerationConfig":
        """Some settings replaced, all of them checked.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        own = {spec.name for spec in fields(self)} - {"others"}
        unknown = sorted(set(arguments) - own)
        if unknown:
            raise ValueError(
                f"generate() in Flax does not support {', '.join(unknown)}. Supported are "
                f"{', '.join(sorted(own))}; PyTorch's generate() has the rest."
            )
        given = {key: _frozen(value) for key, value in arguments.items() if value is not None}
        settings = replace(self, **given)
        for name, value in json.loads(self.others).items():
            if name in _NEUTRAL and value is not None and value != _NEUTRAL[name]:
                raise ValueError(
                    f"generation_config.json sets {name}={value!r}, which generate() in Flax does "
                    f"not support: set model.generation_config without it, or use PyTorch's."
                )
        settings._check()
        return settings

    def _check(self):
        def expect(name, allowed, fits):
            if not fits:
                raise ValueError(f"generate: {name}={getattr(self, name)!r}, expected {allowed}.")

        for name, least in (("num_beams", 1), ("num_return_sequences", 1), ("top_k", 0)):
            expect(name, f"an integer of at least {least}", _is_int(getattr(self, name), least))
        for name in ("max_new_tokens", "max_length", "min_new_tokens"):
            value = getattr(self, name)
            least = 0 if name == "min_new_tokens" else 1
            expect(name, f"an integer of at least {least}", value is None or _is_int(value, least))
        expect("temperature", "a number above 0", self.temperature > 0)
        expect("top_p", "a number above 0 and at most 1", 0 < self.top_p <= 1)
        stops = "True, False or 'never'"
        expect("early_stopping", stops, self.early_stopping in (True, False, "never"))
        most = self.num_beams if self.num_beams > 1 else (None if self.do_sample else 1)
        if most is not None and self.num_return_sequences > most:
            raise ValueError(
                f"generate: num_return_sequences={self.num_return_sequences}, expected at most "
                f"{most}: greedy search has one result, a beam search num_beams. Set num_beams or "
                "do_sample=True."
            )

    @property
    def ends(self) -> tuple[int, ...]:
        """The end-of-sequence tokens."""
        eos = self.eos_token_id
        return () if eos is None else (eos if isinstance(eos, tuple) else (eos,))


class FlaxGenerationMixin:
    """`generate` for models with a language-model head."""

    def generate(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | str | None = None,
        num_return_sequences: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        seed: int = 0,
        return_dict_in_generate: bool = False,
        **more: Any,
    ) -> jax.Array | FlaxGenerateOutput:
        """Token ids for texts; what is not given is taken from `self.generation_config`.

        Compiled once for each batch shape (lengths are rounded up to a multiple of 32) and each
        set of arguments, `temperature`, `top_p`, `length_penalty` and `seed` excepted.

        Args:
            input_ids: (B, L) integers.
            attention_mask: (B, L), 0 for padding; None: all are tokens, as transformers 5 has it.
            decoder_input_ids: (B, P), how each result begins; without the start token it is put
                in front.
            max_new_tokens: the most tokens to generate (20 unless `max_length` says otherwise).
            do_sample, temperature, top_k, top_p: sampling; `top_k=0` and `top_p=1` keep all tokens.
            num_beams, length_penalty, early_stopping: beam search.
            num_return_sequences: results for each text.
            eos_token_id, pad_token_id: what ends a result, and what fills it up.
            seed: of the sampling.
            return_dict_in_generate: return a `FlaxGenerateOutput`, with a beam search's scores.
            more: `max_length`, `min_new_tokens`, `decoder_start_token_id`.

        Returns:
            (B * num_return_sequences, at most P + max_new_tokens) int32 ids.

        Raises:
            ValueError: for arguments that do not fit or are not supported.
        """
        given = dict(more, max_new_tokens=max_new_tokens, do_sample=do_sample)
        given |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        given |= {"num_beams": num_beams, "length_penalty": length_penalty}
        given |= {"early_stopping": early_stopping, "num_return_sequences": num_return_sequences}
        given |= {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        settings = self.generation_config.with_arguments(given)
        input_ids = jnp.asarray(input_ids)
        if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise ValueError(
                f"generate: input_ids has shape {input_ids.shape} and dtype {input_ids.dtype}, "
                "expected integers of shape (batch, length)."
            )
        if input_ids.size == 0:
            raise ValueError(f"generate: input_ids has shape {input_ids.shape}, pass some tokens.")
        prompt = self._prompt(decoder_input_ids, input_ids.shape[0], settings)
        attention_mask = self._mask(input_ids, attention_mask)
        new = _new_tokens(settings, prompt.shape[1])
        self._check_positions(prompt.shape[1] + new)
        input_ids, attention_mask = self._rounded(input_ids, attention_mask)
        numbers = (settings.temperature, settings.top_p, settings.length_penalty)
        static = replace(settings, temperature=1.0, top_p=1.0 if settings.top_p == 1 else 0.5)
        static = replace(static, length_penalty=1.0, max_new_tokens=new, others="{}")
        graphdef, state = nnx.split(self)
        key = jax.random.key(seed)
        sequences, length, scores = _generate(
            graphdef,
            static,
            settings.length_penalty > 0,
            state,
            (input_ids, attention_mask, prompt),
            tuple(jnp.float32(number) for number in numbers),
            key,
        )
        sequences = sequences[:, : int(length)]
        if return_dict_in_generate:
            return FlaxGenerateOutput(sequences=sequences, sequences_scores=scores)
        return sequences

    def _prompt(self, decoder_input_ids, batch, settings):
        start = settings.decoder_start_token_id
        if decoder_input_ids is None:
            if start is None:
                raise ValueError(
                    "generate: decoder_start_token_id is not set in the configuration. Set it (T5 "
                    "uses 0), or pass decoder_input_ids."
                )
            return jnp.full((batch, 1), start, jnp.int32)
        prompt = jnp.asarray(decoder_input_ids)
        if prompt.ndim != 2 or prompt.shape[0] != batch or prompt.shape[1] == 0:
            raise ValueError(
                f"generate: decoder_input_ids has shape {prompt.shape}, expected ({batch}, length)."
            )
        prompt = prompt.astype(jnp.int32)
        if start is not None and bool((prompt[:, 0] != start).all()):
            prompt = jnp.pad(prompt, ((0, 0), (1, 0)), constant_values=start)
        return prompt

    def _mask(self, input_ids, attention_mask):
        if attention_mask is not None:
            attention_mask = jnp.asarray(attention_mask)
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"generate: attention_mask has shape {attention_mask.shape}, expected that of "
                    f"input_ids, {input_ids.shape}: one entry per token, 0 for padding."
                )
            return attention_mask
        return jnp.ones_like(input_ids)

    def _check_positions(self, length):
        config = self.config
        if config.position_embeddings and length - 1 > config.max_position_embeddings:
            raise ValueError(
                f"Generating up to {length} tokens needs more positions than the table has "
                f"(max_position_embeddings={config.max_position_embeddings}). Lower max_new_tokens."
            )

    def _rounded(self, input_ids, attention_mask):
        """Padded to a multiple of 32 tokens: what padding holds changes nothing."""
        length = input_ids.shape[1]
        rounded = -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        if self.config.position_embeddings:
            rounded = max(length, min(rounded, self.config.max_position_embeddings))
        right = ((0, 0), (0, rounded - length))
        return jnp.pad(input_ids, right), jnp.pad(attention_mask, right)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graphdef, settings, longer_is_better, state, texts, numbers, key):
    input_ids, attention_mask, prompt = texts
    model = nnx.merge(graphdef, state)
    beams = settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences
    hidden = model.encode(input_ids, attention_mask).last_hidden_state
    hidden, mask, prompt = (jnp.repeat(x, beams, axis=0) for x in (hidden, attention_mask, prompt))
    length = prompt.shape[1] + settings.max_new_tokens
    cache = model.init_cache(prompt.shape[0], length, hidden, mask)

    def decode(tokens, cache):
        """Tokens (R, T) -> float32 logits (R, V) after the last of them, and the cache."""
        output = model.decode(tokens, hidden, mask, past_key_values=cache)
        return output.logits[:, -1].astype(jnp.float32), output.past_key_values

    logits, cache = decode(prompt, cache)
    if settings.num_beams > 1:
        search = _BeamSearch(settings, longer_is_better, numbers, prompt)
        return search.run(decode, logits, cache, key)
    return _search(settings, numbers, prompt, decode, logits, cache, key)


def _search(settings, numbers, prompt, decode, logits, cache, key):
    """Greedy search or sampling: ids (R, P + N), how many columns are used, and no scores."""
    rows, start = prompt.shape
    length = start + settings.max_new_tokens
    pad = settings.pad_token_id
    pad = (settings.ends or (0,))[0] if pad is None else pad
    sequences = jnp.full((rows, length), pad, jnp.int32).at[:, :start].set(prompt)

    def unfinished(carry):
        place, _, finished, *_ = carry
        return (place < length) & ~finished.all()

    def one_token(carry):
        place, sequences, finished, logits, cache, key = carry
        logits = _processed(logits, place - start, settings, numbers)
        if settings.do_sample:
            key, own = jax.random.split(key)
            token = jax.random.categorical(own, logits, axis=-1)
        else:
            token = jnp.argmax(logits, axis=-1)
        token = jnp.where(finished, pad, token).astype(jnp.int32)
        sequences = jax.lax.dynamic_update_slice(sequences, token[:, None], (0, place))
        finished |= _is_end(token, settings.ends)
        logits, cache = decode(token[:, None], cache)
        return place + 1, sequences, finished, logits, cache, key

    finished = jnp.zeros(rows, bool)
    carry = (jnp.int32(start), sequences, finished, logits, cache, key)
    place, sequences, *_ = jax.lax.while_loop(unfinished, one_token, carry)
    return sequences, place, None


@struct.dataclass
class _Beams:
    """Hypotheses of each text, best first.

    Attributes:
        sequences: (B, beams, P + N) ids.
        scores: (B, beams): summed log-probabilities of running beams; of finished ones over their
            length to the power of the length penalty.
        lengths: (B, beams) new tokens.
    """

    sequences: jax.Array
    scores: jax.Array
    lengths: jax.Array

    def take(self, order):
        """The hypotheses at `order` (B, beams)."""
        return jax.tree.map(lambda x: _gather(x, order), self)


class _BeamSearch:
    """transformers' beam search: the same hypotheses, scores and stopping rules, step by step."""

    def __init__(self, settings, longer_is_better, numbers, prompt):
        self.settings, self.numbers, self.longer_is_better = settings, numbers, longer_is_better
        self.beams = settings.num_beams
        self.batch, self.start = prompt.shape[0] // self.beams, prompt.shape[1]
        self.length = self.start + settings.max_new_tokens
        # As many candidates as leave `beams` to go on from if the best end with every end token.
        self.candidates = max(2, 1 + len(settings.ends)) * self.beams
        self.prompt = prompt.reshape(self.batch, self.beams, self.start)

    def run(self, decode, logits, cache, key):
        batch, beams = self.batch, self.beams
        fill = -1
        if self.settings.ends:  # transformers fills with the end token where padding is 0
            fill = self.settings.pad_token_id or self.settings.ends[0]
        sequences = jnp.full((batch, beams, self.length), fill, jnp.int32)
        sequences = sequences.at[:, :, : self.start].set(self.prompt)
        lengths = jnp.zeros((batch, beams), jnp.int32)
        # At first all beams are alike: only the first of them may be continued.
        scores = jnp.full((batch, beams), _IMPOSSIBLE).at[:, 0].set(0.0)
        running = _Beams(sequences, scores, lengths)
        finished = _Beams(sequences, jnp.full((batch, beams), _IMPOSSIBLE), lengths)
        is_finished = jnp.zeros((batch, beams), bool)
        improvable, go_on = jnp.ones((batch, 1), bool), jnp.array(True)
        place = jnp.int32(self.start)
        carry = (go_on, place, running, finished, is_finished, improvable, logits, cache, key)
        body = partial(self._step, decode)
        _, _, _, finished, *_ = jax.lax.while_loop(lambda carry: carry[0], body, carry)
        returned = self.settings.num_return_sequences
        sequences = finished.sequences[:, :returned].reshape(batch * returned, self.length)
        used = self.start + finished.lengths[:, :returned].max()
        return sequences, used, finished.scores[:, :returned].reshape(-1)

    def _step(self, decode, carry):
        _, place, running, finished, is_finished, improvable, logits, cache, key = carry
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        log_probs = _processed(log_probs, place - self.start, self.settings, self.numbers)
        total = log_probs.reshape(self.batch, self.beams, -1) + running.scores[:, :, None]
        key, own = jax.random.split(key)
        scores, chosen = self._choose(total.reshape(self.batch, -1), own)
        beam, token = jnp.divmod(chosen, logits.shape[-1])
        sequences = _gather(running.sequences, beam)
        sequences = jax.lax.dynamic_update_slice(
            sequences, token[:, :, None].astype(jnp.int32), (0, 0, place)
        )
        lengths = jnp.full_like(beam, place + 1 - self.start)
        candidates = _Beams(sequences, scores, lengths)
        ends = _is_end(token, self.settings.ends) | (place + 1 >= self.length)
        _, order = jax.lax.top_k(scores + ends * _IMPOSSIBLE, self.beams)
        running = candidates.replace(scores=scores + ends * _IMPOSSIBLE).take(order)
        finished, is_finished = self._finish(
            candidates, ends, finished, is_finished, improvable, place
        )
        improvable &= self._can_improve(running, finished, is_finished, place + 1)
        go_on = improvable.any() & ~ends.all()
        if self.settings.early_stopping is True:
            go_on &= ~is_finished.all()
        rows = (_gather(beam, order) + jnp.arange(self.batch)[:, None] * self.beams).reshape(-1)
        token = _gather(token, order).reshape(-1, 1).astype(jnp.int32)
        logits, cache = decode(token, cache.reorder_cache(rows))
        return go_on, place + 1, running, finished, is_finished, improvable, logits, cache, key

    def _choose(self, total, key):
        """The scores and places (B, candidates) of the candidates, best first."""
        if not self.settings.do_sample:
            return jax.lax.top_k(total, self.candidates)
        # Without replacement: the largest of scores with Gumbel noise.
        noise = jax.random.gumbel(key, total.shape)
        _, chosen = jax.lax.top_k(jax.nn.log_softmax(total) + noise, self.candidates)
        scores, order = jax.lax.top_k(_gather(total, chosen), self.candidates)
        return scores, _gather(chosen, order)

    def _finish(self, candidates, ends, finished, is_finished, improvable, place):
        """The best of what was finished before and what ends now."""
        just = ends & (jnp.arange(self.candidates) < self.beams)
        scores = candidates.scores / (place + 1 - self.start) ** self.numbers[2]
        if self.settings.early_stopping is True:
            scores += is_finished.all(-1, keepdims=True) * _IMPOSSIBLE
        scores += ~improvable * _IMPOSSIBLE
        scores += ~just * _IMPOSSIBLE
        both = jax.tree.map(
            lambda old, new: jnp.concatenate([old, new], axis=1),
            finished,
            candidates.replace(scores=scores),
        )
        _, order = jax.lax.top_k(both.scores, self.beams)
        is_finished = _gather(jnp.concatenate([is_finished, just], axis=1), order)
        return both.take(order), is_finished

    def _can_improve(self, running, finished, is_finished, place):
        """Whether the best running beam can still pass the worst finished one (B, 1)."""
        length = place - self.start
        if self.settings.early_stopping == "never" and self.longer_is_better:
            length = self.length - self.start
        best = running.scores[:, :1] / length ** self.numbers[2]
        worst = finished.scores.min(axis=1, keepdims=True)
        worst = jnp.where(is_finished, worst, _IMPOSSIBLE)
        return (best > worst).any(-1, keepdims=True)


def _processed(scores, generated, settings, numbers):
    """Scores (R, V) with what may not come next at minus infinity, for sampling sharpened."""
    temperature, top_p, _ = numbers
    lowest = jnp.float32(-jnp.inf)
    if settings.min_new_tokens and settings.ends:
        early = generated < settings.min_new_tokens
        is_end = _is_end(jnp.arange(scores.shape[-1]), settings.ends)
        scores = jnp.where(early & is_end, lowest, scores)
    if not settings.do_sample:
        return scores
    keep = 1 if settings.num_beams == 1 else 1 + max(1, len(settings.ends))
    scores = scores / temperature
    if settings.top_k:
        count = min(max(settings.top_k, keep), scores.shape[-1])
        least = jax.lax.top_k(scores, count)[0][:, -1:]
        scores = jnp.where(scores < least, lowest, scores)
    if settings.top_p < 1:  # the smallest set of tokens whose probabilities sum to top_p or more
        ordered = -jnp.sort(-scores, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        kept = (before < top_p) | (jnp.arange(scores.shape[-1]) < keep)
        least = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
        scores = jnp.where(scores < least, lowest, scores)
    return scores


def _new_tokens(settings, prompt_length):
    """How many tokens to generate at most."""
    if settings.max_new_tokens is not None:
        return settings.max_new_tokens
    if settings.max_length is None:
        return 20
    if settings.max_length <= prompt_length:
        raise ValueError(
            f"generate: max_length={settings.max_length}, but decoder_input_ids holds "
            f"{prompt_length} tokens already. Pass max_new_tokens."
        )
    return settings.max_length - prompt_length


def _is_end(token, ends):
    is_end = jnp.zeros(token.shape, bool)
    for end in ends:
        is_end |= token == end
    return is_end


def _gather(x, order):
    """x (B, n, ...) at order (B, m) -> (B, m, ...)."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value


def _is_int(value, least):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
