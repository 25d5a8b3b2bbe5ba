"""Transformer, small: self-attention: the paper's baseline, T5 itself.

Ours: the paper gives base only.

command    python -m pretraining.main --config pretraining/configs/small_transformer.py \\
               --workdir DIR --override data_dir=RECORDS
parameters 60,506,624
tokens     3.81e+10, 128 x 568 raw ones a step
FLOPs      1.24e+13 a step, 6.51e+18 in all
16 TPU v3 chips    63.36 steps/s      2.3 h  (computed, not run)
v5e-8              50.74 steps/s     2.87 h  (computed, not run)
v4-32 pod          141.7 steps/s     1.03 h  (computed, not run)
result     not run yet
"""

import dataclasses

from pretraining.configs.base_lightweight import config as base

config = dataclasses.replace(base, model="transformer-small")
