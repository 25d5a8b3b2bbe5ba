"""`python -m modeling_convt5` prints what every preset is: size, receptive field, cost."""

import argparse
import json

from .configuration_convt5 import PRESETS, ConvT5Config


def describe(name: str, length: int) -> dict[str, str | int | float | None]:
    """One row: parameters, tokens an encoder output sees (None: all), forward FLOPs per token."""
    config = ConvT5Config.from_preset(name)
    flops = config.flops_per_token(length)
    return {
        "preset": name,
        "parameters": config.num_parameters(),
        "receptive_field": config.receptive_field("encoder"),
        "encoder_flops_per_token": flops["encoder"],
        "decoder_flops_per_token": flops["decoder"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m modeling_convt5", description=__doc__)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="default: all of them")
    parser.add_argument("--length", type=int, default=512, help="tokens in either stack (512)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    arguments = parser.parse_args()
    if arguments.length < 1:
        parser.error(f"--length {arguments.length}: expected at least 1")
    try:
        rows = [describe(name, arguments.length) for name in arguments.presets or PRESETS]
    except ValueError as error:
        parser.error(str(error))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        f"{'preset':28}{'parameters':>15}{'receptive field':>17}{'MFLOP/token: encoder':>22}",
        end="",
    )
    print(f"{'decoder':>9}")
    for row in rows:
        field = row["receptive_field"] or "all"
        print(
            f"{row['preset']:28}{row['parameters']:15,}{field:>17}"
            f"{row['encoder_flops_per_token'] / 1e6:22,.1f}"
            f"{row['decoder_flops_per_token'] / 1e6:9,.1f}"
        )


if __name__ == "__main__":
    main()
