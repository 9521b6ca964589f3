"""States of a fit: weights, optimizer and schedule, saved in the background while training goes on."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..files import MOST_LINES_BYTES, atomic_write_directory, checksum, parse_json, read_regular, remove
from ..models.optimizers import joined_tensors, plain_tensors
from .journal import Journal, not_made


@dataclass(frozen=True)
class _Written:
    """A state that the thread has written to disk."""

    name: str  # path in the run directory
    step: int
    checksum: str
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


def not_a_state(directory: Path, error: Exception) -> str:
    """Error message for a saved state that does not fit the model, the optimizer or the schedule."""
    return f"{directory} is not a state of this fit ({type(error).__name__}: {error}): remove it, and start again"


class FitStates:
    """Saves and restores the states of a fit bit for bit, without pickle. The newest two are kept.

    ``save`` copies the state to host memory: 12 bytes a parameter for float32 weights and two moments, 6 for bfloat16,
    less with quantised moments. A thread writes
    the copy while training goes on. Only the calling thread uses the journal: a state counts once ``record_written`` or
    ``finish`` has recorded it. A state that was not recorded, because the run was killed, is never restored; both
    ``restore`` and ``clear`` remove it.

    Args:
        journal: records the states with their checksums. A damaged state is skipped.
        name: folder of the states in the run directory.
        every_steps, every_seconds: how often a state is saved, whichever comes first, within ``spacing``.
    """

    KEPT = 2
    spacing = 20  # the least time between two states, as a multiple of the time that saving one took

    def __init__(self, journal: Journal, name: str, every_steps: int, every_seconds: float) -> None:
        self.journal, self.name = journal, name
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
        names = [name for name, _ in model.named_parameters()]
        tensors = {f"model.{name}": _copy(parameter) for name, parameter in model.named_parameters()}
        for index, values in state["state"].items():
            tensors |= {f"{key}.{names[index]}": _copy(value) for key, value in plain_tensors(values).items()}
        document = json.dumps({"step": step, "param_groups": state["param_groups"], **rest})
        self.writing = self.executor.submit(self._write, step, tensors, document)
        self.last_step = step

    def _write(self, step: int, tensors: dict[str, Tensor], document: str) -> _Written:
        """Writes a state to disk. Runs in the thread."""
        name = f"{self.name}/step_{step:08d}"

        def fill(directory: Path) -> None:
            save_file(tensors, directory / "state.safetensors")
            (directory / "state.json").write_text(document, encoding="utf-8")

        atomic_write_directory(self.journal.directory / name, fill)
        tensors.clear()
        return _Written(name, step, checksum(self.journal.directory / name), time.monotonic())

    def record_written(self) -> None:
        """Records the state that was being written, if it is complete by now, and removes older ones.

        Raises:
            OSError: if it could not be written.
        """
        if self.writing is not None and self.writing.done():
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
        self.ended = written.at
        self.journal.record(written.name, {"step": written.step}, content=written.checksum)
        for old in self.journal.within(self.name)[: -self.KEPT]:
            self.journal.forget(old)

    def step(self) -> int:
        """Number of finished steps in the newest whole state; 0 if there is none."""
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
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if f"{self.name}/{path.name}" not in self.journal.entries:
                remove(path)
        name = self._newest()
        if name is None:
            return None
        directory = self.journal.directory / name
        try:
            rest = self._put_back(directory, model, optimizer)
        except NO_STATE as error:
            raise UserError(not_a_state(directory, error)) from error
        self.last_step = rest["step"]
        return rest

    def _put_back(self, directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        rest = parse_json(read_regular(directory / "state.json", MOST_LINES_BYTES))
        if rest["step"] != self.step():
            raise ValueError(f"it has step {rest['step']}, and the journal says another")
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(directory / "state.safetensors").items():
            kind, parameter_name = key.split(".", 1)
            by_parameter.setdefault(parameter_name, {})[kind] = tensor
        state: dict[int, dict[str, Tensor]] = {}
        for index, (parameter_name, parameter) in enumerate(model.named_parameters()):
            own = by_parameter[parameter_name]
            with torch.no_grad():
                parameter.copy_(own.pop("model"))
            if own:  # a parameter without gradients has no state
                state[index] = joined_tensors(own, parameter, optimizer)
        optimizer.load_state_dict({"state": state, "param_groups": rest.pop("param_groups")})
        return rest

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
            self.journal.forget_folder(self.name)


def _copy(tensor: Tensor) -> Tensor:
    """Copies a tensor to host memory. Waits for the device, since the optimizer is about to change the tensor.

    The memory is not pinned: torch would never free it, and rounds its size up to a power of two.
    """
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
