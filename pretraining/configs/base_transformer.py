"""Transformer, base: self-attention: the paper's baseline, T5 itself.

The paper's settings.

command    python -m pretraining.main --config pretraining/configs/base_transformer.py \\
               --workdir DIR --override data_dir=RECORDS
parameters 222,903,552
tokens     3.81e+10, 128 x 568 raw ones a step
FLOPs      4.96e+13 a step, 2.60e+19 in all
16 TPU v3 chips    15.89 steps/s     9.17 h  (computed, not run)
v5e-8              12.72 steps/s     11.4 h  (computed, not run)
v4-32 pod          35.52 steps/s      4.1 h  (computed, not run)
result     not run yet
"""

import dataclasses

from pretraining.configs.base_lightweight import config as base

config = dataclasses.replace(base, model="transformer-base")
