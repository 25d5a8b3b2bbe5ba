"""Lightweight, small: lightweight convolutions, 7 taps, 2 filters.

Ours: the paper gives base only.

command    python -m pretraining.main --config pretraining/configs/small_lightweight.py \\
               --workdir DIR --override data_dir=RECORDS
parameters 57,360,552
tokens     3.81e+10, 128 x 568 raw ones a step
FLOPs      1.04e+13 a step, 5.44e+18 in all
16 TPU v3 chips    75.83 steps/s     1.92 h  (computed, not run)
v5e-8              60.73 steps/s      2.4 h  (computed, not run)
v4-32 pod          169.5 steps/s    0.859 h  (computed, not run)
result     not run yet
"""

import dataclasses

from pretraining.configs.base_lightweight import config as base

config = dataclasses.replace(base, model="lightweight-small")
