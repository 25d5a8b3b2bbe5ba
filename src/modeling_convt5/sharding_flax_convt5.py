"""How parameters are spread over devices: a table of path patterns, first match first.

Mesh axes, each optional: "data" (copies of the model, each with its part of the batch), "fsdp"
(the batch and the parameters are split), "tensor" (each layer's width is split).
"""

import re

try:  # in a `try`, or transformers would ask PyTorch's users to install JAX
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
except ImportError as error:
    raise ImportError("ConvT5 in Flax needs JAX and Flax: pip install jax flax") from error

ShardingRules = list[tuple[str, PartitionSpec]]

# A dense that widens splits its outputs over "tensor", the dense after it its inputs, so that one
# sum over devices a sublayer is enough. What has no line (norms, filters, biases, position tables)
# is small and copied to every device.
SHARDING_RULES: ShardingRules = [
    (r"(shared|embed_tokens|lm_head)\.weight", PartitionSpec("tensor", "fsdp")),
    (r"\.(in_proj|wi|wi_0|wi_1|q|k|v)\.weight", PartitionSpec("tensor", "fsdp")),
    (r"layers\..*\.(out_proj|wo|o|pointwise)\.weight", PartitionSpec("fsdp", "tensor")),
    (r"\.(filter_proj|encoder_summary)\.weight", PartitionSpec(None, "fsdp")),
]


def parameter_sharding(
    key: str, shape: tuple[int, ...], mesh: Mesh, rules: ShardingRules | None = None
) -> NamedSharding:
    """Where the parameter `key` of this shape lies on the mesh.

    Args:
        rules: (pattern, PartitionSpec) pairs; the first pattern found in the key decides, no match
            copies the parameter to every device. None is `SHARDING_RULES`.

    Raises:
        ValueError: if the mesh has other axes, or if its sizes do not divide the shape.
    """
    unknown = sorted(set(mesh.axis_names) - {"data", "fsdp", "tensor"})
    if unknown and rules is None:
        raise ValueError(
            f"The mesh has the axis {', '.join(unknown)}, expected some of data, fsdp and tensor: "
            "name its axes so, or pass sharding_rules."
        )
    spec = PartitionSpec()
    for pattern, candidate in SHARDING_RULES if rules is None else rules:
        if re.search(pattern, key):
            spec = candidate
            break
    if len(spec) > len(shape):
        raise ValueError(f"The sharding rule {spec} for {key} names more axes than {shape} has.")
    axes = []
    for size, axis in zip(shape, spec, strict=False):
        names = [axis] if isinstance(axis, str) else list(axis or ())
        names = [name for name in names if name in mesh.axis_names]
        count = 1
        for name in names:
            count *= mesh.shape[name]
        if size % count:
            raise ValueError(
                f"{key} has shape {shape}: the mesh splits {size} in {count} over "
                f"{' and '.join(names)}. Choose a mesh whose sizes divide it, or pass "
                "sharding_rules without that axis for this key."
            )
        axes.append(names[0] if len(names) == 1 else tuple(names) or None)
    return NamedSharding(mesh, PartitionSpec(*axes))
