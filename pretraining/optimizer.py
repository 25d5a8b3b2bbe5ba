"""The optimizers of pre-training, in optax.

"adafactor" is the paper's framework's (Shazeer and Stern 2018, arXiv 1804.04235): updates scaled
by the parameter's RMS, clipped at RMS 1, second moments decayed by 1 - t^-0.8 and kept in rows and
columns, learning rate 1 / sqrt(max(step, warmup)). "adamw" is nanoT5's (Nawrot 2023): AdamW whose
update is scaled by the parameter's RMS, gradients clipped at a global norm of 1, linear warm-up
and a cosine to 1e-5.
"""

import jax.numpy as jnp
import optax

from .settings import Settings

ADAMW_PEAK, ADAMW_END = 2e-2, 1e-5


def learning_rate(settings: Settings) -> optax.Schedule:
    """The learning rate at a step, counted from 0."""
    if settings.optimizer == "adafactor":
        factor = 1.0 if settings.learning_rate is None else settings.learning_rate
        return lambda step: factor / jnp.sqrt(jnp.maximum(step, settings.warmup_steps))
    peak = ADAMW_PEAK if settings.learning_rate is None else settings.learning_rate
    if settings.warmup_steps >= settings.train_steps:
        raise ValueError(
            f"Settings.warmup_steps={settings.warmup_steps} is not allowed: expected less than "
            f"train_steps={settings.train_steps} for the cosine of AdamW. Shorten the warm-up."
        )
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, settings.warmup_steps, settings.train_steps, min(ADAMW_END, peak)
    )


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """The optimizer of a run; its state has the dtype of the parameters."""
    schedule = learning_rate(settings)
    if settings.optimizer == "adafactor":
        return optax.adafactor(
            schedule, decay_rate=0.8, clipping_threshold=1.0, momentum=None, weight_decay_rate=None
        )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-6),
        optax.scale_by_param_block_rms(min_scale=1e-3),
        optax.scale_by_learning_rate(schedule),
    )
