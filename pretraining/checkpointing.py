"""Checkpoints of a run with orbax: written in the background, whole or not there.

A checkpoint holds the state (parameters, moments, counts), where the data stand, and what the run
was made of, so that another run cannot take it up by mistake. Arrays are read onto whatever mesh
there is now.
"""

import errno
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from .step import State

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a file could not grow.

    The storage below orbax raises its own errors, with the system's words in them.
    """
    while error is not None:
        words = any(os.strerror(number) in str(error) for number in _DISK_FULL)
        if words or getattr(error, "errno", None) in _DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: created if need be.
        keep_last: how many are kept.
        made_of: whatever a resumed run must have in common with the one that wrote them; plain
            values that JSON can hold.
    """

    def __init__(self, folder: Path, keep_last: int, made_of: dict[str, Any]):
        self.folder, self.made_of = folder.absolute(), made_of
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "run")
        )

    def latest(self) -> int | None:
        """The last step that was written whole."""
        self.manager.wait_until_finished()
        return self.manager.latest_step()

    def save(self, step: int, state: State, data: dict[str, Any]) -> None:
        """Begin to write; returns as soon as `state` may be reused."""
        run = {"made_of": self.made_of, "data": data}
        self.manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)),
        )

    def check(self, step: int) -> None:
        """Compare what the run is made of with a checkpoint.

        Raises:
            ValueError: naming every difference.
        """
        found = self._run(step)["made_of"]
        differences = [
            f"  {key}: {found.get(key)!r} in the checkpoint, {self.made_of.get(key)!r} now"
            for key in sorted({*found, *self.made_of})
            if found.get(key) != self.made_of.get(key)
        ]
        if differences:
            raise ValueError(
                f"{self.folder} holds checkpoints of another run. Choose another --workdir, or "
                "undo the change:\n" + "\n".join(differences)
            )

    def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """The state and the place in the data at a step.

        Args:
            abstract: shapes, dtypes and shardings of the state.

        Raises:
            ValueError: if the checkpoint is damaged.
        """
        try:
            state = self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]
        except Exception as error:  # whatever orbax and its storage raise for a damaged file
            raise ValueError(
                f"{self.folder / str(step)} cannot be read ({error}). If it is damaged, remove "
                "that folder: the run goes on from the checkpoint before it."
            ) from error
        return state, self._run(step)["data"]

    def wait(self) -> None:
        """Return when everything is written; raises what went wrong in the background."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and stop the threads."""
        self.manager.close()

    def _run(self, step):
        try:
            return self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))[
                "run"
            ]
        except Exception as error:
            raise ValueError(
                f"{self.folder / str(step)} cannot be read ({error}). If it is damaged, remove "
                "that folder: the run goes on from the checkpoint before it."
            ) from error
