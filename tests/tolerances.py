"""The table of tolerances: how far two computations of the same thing may lie apart, and why.

"Relative" means relative to the largest magnitude of the expected tensor: an entry that is small
because large terms cancel carries the rounding of those terms. What must be exact (padding,
segment borders, reused work) is compared by bits and has no entry here.
"""

# --- The convolution against the plain loop of tests/reference.py, relative, by dtype -------------

# Half of the last place, by dtype: what writing the result down costs, however exact the sum.
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11}

# depthwise_conv and lightweight_conv, values and gradients.
CONVOLUTION = {
    # At most 31 products, or 2 * 129 * 64 in a filter's gradient, with roundings of 1e-16.
    "float64": 1e-13,
    # The same with roundings of 6e-8.
    "float32": 2e-6,
    # Sums are float32, so the only rounding is that of the result. The few percent on top are for
    # sums that lie between two numbers of the dtype and go the other way.
    "bfloat16": 1.02 * ROUNDING["bfloat16"],
    "float16": 1.02 * ROUNDING["float16"],
}

# dynamic_conv: a dot product over d_model = 64 precedes the softmax.
DYNAMIC_VALUES = {
    "float64": 1e-13,
    "float32": 2e-6,
    # The predicted logits, of order 3, are rounded before the softmax: 3 roundings on a tap, one on
    # the result.
    "bfloat16": 4 * ROUNDING["bfloat16"],
    "float16": 4 * ROUNDING["float16"],
}
DYNAMIC_GRADIENTS = {
    "float64": 1e-13,
    # A softmax's gradient sums to zero over the taps: the larger terms cancel.
    "float32": 5e-6,
    # The same cancelling, of terms that carry the 4 roundings above, and of logits' gradients that
    # are rounded before they are summed over positions.
    "bfloat16": 10 * ROUNDING["bfloat16"],
    "float16": 10 * ROUNDING["float16"],
}

# Chunks, single steps and the whole row take the same products, in float64 and in another order.
BETWEEN_FORMULATIONS = 1e-13

# The mean of 4,000 random draws of a tap that is dropped with probability 0.25, relative to the
# tap: 5 standard deviations of sqrt(0.25 / 0.75 / 4000).
DROPOUT_MEAN = 0.046

# --- Models --------------------------------------------------------------------------------------

# An all-attention ConvT5 and T5: the same operations in the same order, where sdpa or a fused norm
# may sum in another one. Absolute, on logits and states of order 1 to 10.
T5_VALUES = 1e-5
# Relative to each tensor's largest entry.
T5_GRADIENTS = 1e-5

# The same example computed in two places of a batch (packed or alone, cached or not) in float64,
# absolute: rounding is 1e-15 and grows with depth, a leak of one tap is 1e-3.
FLOAT64_MODEL = 1e-10

# The same in float32, absolute, on states of order 1: matrix products of other shapes sum in
# another order.
FLOAT32_STATES = 1e-6
# On logits, which sum d_model such states.
FLOAT32_LOGITS = 1e-5

# A whole model in half precision against float32, relative: 8 bits (bfloat16) through two stacks of
# two layers, roughly sqrt(number of roundings on the way) * 2**-9.
HALF_PRECISION_MODEL = 0.03

# --- Twins ---------------------------------------------------------------------------------------

# PyTorch and Flax on the same weights in float32, absolute, on logits and states of order 1 to 5:
# both round every product, each library sums in an order of its own.
TWIN_OUTPUTS = 1e-5
# Relative to each gradient's largest entry; a softmax's gradient is a difference of larger terms.
TWIN_GRADIENTS = 1e-4
# In bfloat16, relative to the largest entry: one rounding is 0.4 %, and a few of them meet.
TWIN_BFLOAT16 = 0.02
# A beam's score: a sum of up to 20 log-probabilities, each from logits as above.
TWIN_SCORES = 1e-4

# --- Conversion ----------------------------------------------------------------------------------

# A converted model in float32 against the original's equations in float64, and against real runs of
# Mesh-TensorFlow in float32: absolute, on states and logits of order 1 to 10.
MESH_TF = 1e-5

# --- Pre-training --------------------------------------------------------------------------------

# The first step's loss (order 5) on other layouts of devices in float32, absolute: the same
# products, summed over rows and channels in another order.
LAYOUT_LOSS = 1e-5
# The same step's gradients, relative to each parameter's largest entry.
LAYOUT_GRADIENTS = 1e-5
# Fifty steps in float64, losses absolute, state relative: rounding of 1e-16 grows by training.
LAYOUT_FLOAT64 = 1e-8
# An exported checkpoint's loss in PyTorch on the same batches, absolute (float32).
EXPORT_LOSS = 1e-4
# optax against Adafactor written as a loop, relative, over some steps in float32.
OPTIMIZER = 1e-5

# --- Evaluation ----------------------------------------------------------------------------------

# Metrics against scikit-learn's and SciPy's, absolute, on fractions: float64 sums of hundreds of
# terms, each rounded at 1e-16.
METRIC = 1e-12
# A label's log-probability: from one pass over all labels, and from a pass of its own. As logits.
LABEL_SCORES = 1e-4
