"""States of a fit: weights, optimizer and schedule, saved in the background while training goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..distributed import World
from ..errors import UserError
from ..files import MOST_LINES_BYTES, atomic_write_text, checksum, checksum_of_files, parse_json, read_regular, remove
from ..journal import Journal, JournalElsewhere, not_made
from ..models.optimizers import PART, joined_tensors, plain_tensors
from .shards import HostShards, StoredShards, copy_shards, like, local, write_shards


@dataclass(frozen=True)
class _Written:
    """The part of a state that the thread has written to disk."""

    checksums: dict[str, str]  # by the name of the file
    at: float  # when it was complete, by time.monotonic


NO_STATE = (  # errors of reading a state that does not belong to this fit
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
)
DOCUMENT = "state.json"


def not_a_state(directory: Path, error: Exception) -> str:
    """Error message for a saved state that does not fit the model, the optimizer or the schedule."""
    return f"{directory} is not a state of this fit ({type(error).__name__}: {error}): remove it, and start again"


class FitStates:
    """Saves and restores the states of a fit bit for bit, without pickle. The newest two are kept.

    Weights that are not trained, as those under LoRA, are no part of a state.

    ``save`` copies the state to host memory: 12 bytes a parameter for float32 weights and two moments, 6 for bfloat16,
    less with quantised moments. A thread writes the copy while training goes on. Only the calling thread uses the
    journal: a state counts once ``record_written`` or ``finish`` has recorded it. A state that was not recorded,
    because the run was killed, is never restored; both ``restore`` and ``clear`` remove it.

    With several ranks, all of them call the same methods in the same order. Each copies and writes its own shards, and
    rank 0 records the state once all are on the disk. Any number of ranks can restore it, except that quantised moments
    need the number that wrote them.

    Args:
        journal: records the states with their checksums. A damaged state is skipped.
        name: folder of the states in the run directory.
        every_steps, every_seconds: how often a state is saved, whichever comes first, within ``spacing``.
        world: the ranks of the run.
    """

    KEPT = 2
    spacing = 20  # the least time between two states, as a multiple of the time that saving one took

    def __init__(
        self,
        journal: Journal | JournalElsewhere,
        name: str,
        every_steps: int,
        every_seconds: float,
        world: World | None = None,
    ) -> None:
        self.journal, self.name, self.world = journal, name, world or World()
        self.every_steps, self.every_seconds = every_steps, every_seconds
        self.last_step = 0
        self.began = time.monotonic()  # when saving the last state began
        self.ended: float | None = self.began  # when it was written; None while it is being written
        self.executor = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[_Written] | None = None

    @property
    def folder(self) -> Path:
        """The folder of the states."""
        return self.journal.directory / self.name

    def describe_error(self, error: Exception) -> str:
        """Error message for a restored state that does not fit the rest of the training."""
        return not_a_state(self.folder, error)

    def due(self, step: int) -> bool:
        """Whether a state should be saved after this step."""
        return self.world.from_main(self._due, step)

    def _due(self, step: int) -> bool:
        now = time.monotonic()
        passed = now - self.began
        took = (now if self.ended is None else self.ended) - self.began
        wanted = step - self.last_step >= self.every_steps or passed >= self.every_seconds
        return wanted and passed >= (1 + self.spacing) * took  # false while one is being written, unless spacing is 0

    def save(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rest: dict[str, Any]) -> None:
        """Copies the state and starts to write it. Waits for the previous state to be written.

        Args:
            step: number of finished steps; nothing is saved if the last state has the same.
            rest: JSON that ``restore`` returns; numbers come back exactly.

        Raises:
            OSError: if the previous state could not be written.
        """
        if step == self.last_step:
            return
        self.finish()
        self.began, self.ended = time.monotonic(), None
        state = optimizer.state_dict()
        trained = _trained(model)
        names = list(trained)
        tensors = {f"model.{name}": parameter for name, parameter in trained.items()}
        for index, values in state["state"].items():
            tensors |= {f"{kind}.{names[index]}": value for kind, value in plain_tensors(values).items()}
        document = {"step": step, "ranks": self.world.size, "param_groups": state["param_groups"], **rest}
        self.writing = self.executor.submit(self._write, self._state(step), copy_shards(tensors), json.dumps(document))
        self.last_step = step

    def _state(self, step: int) -> str:
        return f"{self.name}/step_{step:08d}"

    def _write(self, name: str, shards: HostShards, document: str) -> _Written:
        """Writes this rank's part of a state to disk. Runs in the thread."""
        directory = self.journal.directory / name
        files = [directory / f"rank_{self.world.rank:05d}.safetensors"]
        write_shards(files[0], shards)
        if self.world.is_main:
            files.append(directory / DOCUMENT)
            atomic_write_text(files[1], document)
        return _Written({file.name: checksum(file) for file in files}, time.monotonic())

    def record_written(self) -> None:
        """Records the state that was being written, if it is complete by now, and removes older ones.

        Raises:
            OSError: if it could not be written.
        """
        if self.writing is not None and not self.world.largest(int(not self.writing.done())):
            self.finish()

    def finish(self) -> None:
        """Waits until the state that is being written is complete, and records it.

        Raises:
            OSError: if it could not be written.
        """
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        written = writing.result()
        parts = self.world.gather(written.checksums)
        self.ended = written.at
        self.world.from_main(self._record, parts)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Does ``finish`` at the end of the block, also if it fails: a resumed run goes on from that state.

        Of several ranks, one that fails leaves it, since the others may not have failed and would not answer.
        """
        try:
            yield
        except BaseException:
            if self.world.size == 1:
                self.finish()
            raise
        self.finish()

    def _record(self, parts: list[dict[str, str]]) -> None:
        """Records the last state, of which these are the checksums of the ranks' files, and removes older ones."""
        content = checksum_of_files({name: value for part in parts for name, value in part.items()})
        self.journal.record(self._state(self.last_step), {"step": self.last_step}, content=content)
        for old in self.journal.within(self.name)[: -self.KEPT]:
            self.journal.forget(old)

    def step(self) -> int:
        """Number of finished steps in the newest whole state; 0 if there is none."""
        return self.world.from_main(self._step)

    def _step(self) -> int:
        newest = self._newest()
        if newest is None:
            return 0
        step = self.journal.note(newest).get("step")
        if type(step) is not int or not 0 < step < 2**63:
            raise UserError(not_made(self.journal, newest))
        return step

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Restores the newest whole state and returns its ``rest``, with "step"; None if there is none.

        Removes states that were not recorded because the run was killed.

        Raises:
            UserError: if the state does not fit the model or optimizer; names it.
        """
        name, step = self.world.from_main(self._remove_unrecorded)
        if name is None:
            return None
        directory = self.journal.directory / name
        try:
            rest = parse_json(read_regular(directory / DOCUMENT, MOST_LINES_BYTES))
            if rest["step"] != step:
                raise ValueError(f"it has step {rest['step']}, and the journal says another")
            self._put_back(directory, model, optimizer, rest)
        except NO_STATE as error:
            raise UserError(not_a_state(directory, error)) from error
        self.last_step = step
        return rest

    def _remove_unrecorded(self) -> tuple[str | None, int]:
        """Removes states that the journal does not have; returns the newest whole one, and its step."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if f"{self.name}/{path.name}" not in self.journal.entries:
                remove(path)
        return self._newest(), self._step()

    def _put_back(
        self, directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rest: dict[str, Any]
    ) -> None:
        files, ranks = sorted(directory.glob("*.safetensors")), rest.pop("ranks", 1)
        if ranks == self.world.size:
            files = [files[self.world.rank]]  # it has all that this rank had
        stored = StoredShards(files)
        if ranks != self.world.size and any(PART in name for name in stored.chunks):
            raise ValueError(f"its quantised moments need the {ranks} ranks that wrote it")
        kinds: dict[str, set[str]] = {}  # of tensors, by parameter
        for key in stored.chunks:
            kind, name = key.split(".", 1)
            kinds.setdefault(name, set()).add(kind)
        state: dict[int, dict[str, Tensor]] = {}
        for index, (name, parameter) in enumerate(_trained(model).items()):
            with torch.no_grad():
                local(parameter).copy_(stored.rows_of(f"model.{name}", parameter))
                own = {kind: _value(stored, kind, name, parameter) for kind in sorted(kinds[name] - {"model"})}
                if own:  # a parameter without gradients has no state
                    state[index] = joined_tensors(own, parameter, optimizer)
        optimizer.load_state_dict({"state": state, "param_groups": rest.pop("param_groups")})

    def _newest(self) -> str | None:
        names = reversed(self.journal.within(self.name))
        return next((name for name in names if self.journal.note(name) is not None), None)

    def clear(self) -> None:
        """Removes all states, because the fit has ended or failed. Waits for one that is being written.

        Raises:
            OSError: if it could not be written.
        """
        try:
            self.finish()
        finally:
            self.world.from_main(lambda: self.journal.forget_folder(self.name))


def _value(stored: StoredShards, kind: str, name: str, parameter: Tensor) -> Tensor:
    """A tensor of a parameter's optimizer state: a number of steps, a part of a quantised moment, or a moment."""
    key = f"{kind}.{name}"
    if PART in kind or not stored.chunks[key][0][1]:
        return stored.whole(key)
    return like(parameter, stored.rows_of(key, parameter))


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Returns the parameters that the optimizer has, in its order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
