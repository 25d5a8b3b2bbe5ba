"""Dilated, base: dilated lightweight convolutions, receptive widths 4 to 31.

The paper's settings.

command    python -m pretraining.main --config pretraining/configs/base_dilated.py \\
               --workdir DIR --override data_dir=RECORDS
parameters 208,747,456
tokens     3.81e+10, 128 x 568 raw ones a step
FLOPs      4.23e+13 a step, 2.22e+19 in all
16 TPU v3 chips    18.61 steps/s     7.82 h  (computed, not run)
v5e-8               14.9 steps/s     9.77 h  (computed, not run)
v4-32 pod          41.61 steps/s      3.5 h  (computed, not run)
result     not run yet
"""

import dataclasses

from pretraining.configs.base_lightweight import config as base

config = dataclasses.replace(base, model="dilated-base")
