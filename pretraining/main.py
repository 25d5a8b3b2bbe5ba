"""Pre-train ConvT5 by span corruption; rerunning the same command resumes.

    python -m pretraining.main --config pretraining/configs/tiny_cpu.py --workdir runs/tiny \\
        --override data_dir=DATA tokenizer=tokenizer.json

Exit codes: 0 finished; 75 pre-empted (SIGTERM) and saved: run the same command again; 130 after
Ctrl-C: the same command goes on from the last checkpoint. Records are in WORKDIR/metrics.jsonl,
checkpoints in WORKDIR/checkpoints.
"""

import argparse
import contextlib
import signal
import sys
from pathlib import Path

# Everything else is imported in `main`: it takes seconds, in which SIGTERM may come.
PREEMPTED = 75


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    import jax

    from .settings import load

    settings = load(args.config, args.override)
    if settings.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if args.distributed or args.coordinator:
        initialize(args)
    # After the processes have met: importing looks at the devices.
    from .checkpointing import is_disk_full
    from .train import BadStep, Preemption, set_up, train

    try:
        with Preemption() as preemption:
            run = set_up(settings, Path(args.workdir), args.export, args.push_to_hub)
            with contextlib.closing(run.checkpoints):
                return train(run, preemption)
    except BadStep as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise SystemExit(
            f"{args.workdir}: the disk is full ({error}). Make space and run the same command "
            "again: it goes on from the last checkpoint."
        ) from error


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretraining.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a file of pretraining/configs, or yours")
    parser.add_argument("--workdir", required=True, help="records and checkpoints of this run")
    parser.add_argument("--override", nargs="+", action="extend", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--export", metavar="DIR", help="write the Hub folder there")
    parser.add_argument("--push_to_hub", metavar="REPO", help="and upload it to owner/name")
    hosts = parser.add_argument_group("several hosts: the same command on each of them")
    hosts.add_argument(
        "--distributed", action="store_true", help="a TPU pod or SLURM, which JAX recognises"
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="or: where process 0 listens")
    hosts.add_argument("--num_processes", type=int)
    hosts.add_argument("--process_id", type=int)
    args = parser.parse_args(arguments)
    if args.coordinator and (args.num_processes is None or args.process_id is None):
        parser.error("--coordinator needs --num_processes and --process_id as well.")
    if not args.coordinator and (args.num_processes or args.process_id) is not None:
        parser.error("--num_processes and --process_id go with --coordinator HOST:PORT.")
    return args


def initialize(args: argparse.Namespace) -> None:
    """Join the other processes."""
    import jax

    jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))  # until `Preemption` takes over
    sys.exit(main())
