"""The process of a vLLM engine: started, spoken to over a socket, watched and ended.

Its messages are those of ``engine``. It is in a process group of its own with what vLLM starts, ends with the
socket, so that nothing is left behind if this process is killed, and gets no keys.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import torch

from ... import signals
from ...errors import UserError
from ...files import MIB

SCRIPT = Path(__file__).with_name("engine.py")
START_SECONDS = 1800  # for vLLM to load a model, compile it and measure its memory
SILENCE_SECONDS = 900  # between two messages of a running engine, which sends one every few seconds
POLL_SECONDS = 0.2  # between two looks whether the run is asked to stop or the process has ended
GRACE_SECONDS = 2  # for the process to notice that the socket is closed
END_SECONDS = 10  # for the process to be gone, once it is killed
LOG_BYTES = 4 * MIB  # that are kept of what vLLM prints
MESSAGE_BYTES = 64 * MIB  # of a line: a response of a million tokens has fewer
# in names of environment variables; headers may hold a key
SECRET = re.compile("key|(^|_)token$|secret|passw|credential|headers$", re.IGNORECASE)
URL_WITH_USER = re.compile(r"://[^\s/]*@")  # in values, as of a proxy
HAS_VLLM = (
    "import sys; sys.path[:] = filter(None, sys.path); from importlib.util import find_spec; print(find_spec('vllm'))"
)
CHECK_SECONDS = 60  # for an interpreter to say whether it has vLLM, which takes a second at most
# of Python's paths and of torchrun, which would send vLLM to other packages and into the group of the ranks
OURS = re.compile(
    "PYTHONPATH|PYTHONHOME|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)
MEMORY = re.compile("memory|OutOfMemory|KV cache", re.IGNORECASE)  # in an error for lack of it


class VllmProcess:
    """A process that runs vLLM. Nothing is sent to it before ``start``.

    Args:
        python: an interpreter of an environment with vLLM.
        device: the policy's, whose GPU the process gets.
        log: the file to which its output goes, from the beginning, in place of what is there; None: it is not kept. A
            log that cannot be written is left alone.
    """

    def __init__(self, python: str, device: torch.device, log: Path | None) -> None:
        self.python, self.device = python, device
        self.socket, theirs = socket.socketpair()
        self.received = b""  # the beginning of a line
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [python, str(SCRIPT), str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C in a terminal is for this process, which ends the other
                    env=child_environment(device),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            except OSError as error:
                self.socket.close()
                raise UserError(f"--vllm_python {python} cannot be started: {error.strerror}") from None
        self.last_lines: deque[str] = deque(maxlen=20)
        file = None if log is None else _open_log(log)
        self.log = None if file is None else log
        self.reader = threading.Thread(target=self._keep_output, args=[self.process.stdout, file], daemon=True)
        self.reader.start()

    def start(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Has vLLM load a model; returns the message that it is ready.

        Raises:
            UserError: if it cannot.
            Stopped: after a signal.
        """
        self.send(settings)
        return self.receive(START_SECONDS)

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message. Raises ``UserError`` if the process has ended, ``Stopped`` after a signal."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        self.socket.settimeout(POLL_SECONDS)
        deadline = time.monotonic() + SILENCE_SECONDS
        while data:
            signals.stop_if_asked()
            try:
                data = data[self.socket.send(data) :]
            except TimeoutError:
                self._check_time(deadline, SILENCE_SECONDS)
            except OSError:
                raise self._ended() from None

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """Waits for a message and returns it.

        Args:
            seconds: the longest wait; default ``SILENCE_SECONDS``.

        Raises:
            UserError: if the process has ended, reports an error, says nothing for too long or talks nonsense.
            Stopped: after a signal.
        """
        seconds = SILENCE_SECONDS if seconds is None else seconds
        deadline = time.monotonic() + seconds
        while b"\n" not in self.received:
            signals.stop_if_asked()
            readable, _, _ = select.select([self.socket], [], [], POLL_SECONDS)
            if readable:
                self._read()
            elif self.process.poll() is not None:  # the socket may live on in a process that vLLM started
                raise self._ended()
            else:
                self._check_time(deadline, seconds)
        line, _, self.received = self.received.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise UserError(f"vLLM's process sent {line[:100]!r}, which is no message{self._where()}")
        if "error" in message:
            raise self._reported(str(message.get("kind")), str(message["error"]))
        return message

    def _read(self) -> None:
        try:
            data = self.socket.recv(MIB)
        except OSError:
            data = b""
        if not data:
            raise self._ended()
        self.received += data
        if len(self.received) > MESSAGE_BYTES:
            raise UserError(f"vLLM's process sent a line of more than {MESSAGE_BYTES} bytes{self._where()}")

    def close(self) -> None:
        """Has the process end with all that it has started, kills what is left, and waits until it is gone."""
        self.socket.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_SECONDS)
        with suppress(ProcessLookupError):  # of a group that has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(END_SECONDS)
        self.reader.join(END_SECONDS)

    def _keep_output(self, output: IO[bytes], log: IO[bytes] | None) -> None:
        """Keeps what the process prints: the first ``LOG_BYTES`` in the log, and the last lines for a message.

        It is read to its end whatever becomes of the log: the process would wait, or fail, if nobody read.
        """
        with output, log or nullcontext():
            left = 0 if log is None else LOG_BYTES
            while line := output.readline(MIB):
                if text := line.decode(errors="replace").strip():
                    self.last_lines.append(text)
                try:
                    left -= log.write(line[:left]) if left else 0
                except OSError:  # a full disk: sampling needs no log
                    left = 0

    def _check_time(self, deadline: float, seconds: float) -> None:
        if time.monotonic() > deadline:
            raise UserError(
                f"vLLM has made no progress for {seconds / 60:.0f} minutes: --resume tries again{self._where()}"
            )

    def _ended(self) -> UserError:
        try:
            status = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return UserError(f"vLLM's process has closed its socket{self._where()}")
        self.reader.join(END_SECONDS)
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return UserError(f"vLLM's process {how}: what was sampled is kept, and --resume goes on{self._where()}")

    def _reported(self, kind: str, error: str) -> UserError:
        if kind == "import":
            return _no_vllm(self.python, error)
        what = "does not start" if kind == "start" else "failed while it sampled"
        hint = ""
        if MEMORY.search(error):
            if self.device.type == "cuda":
                hint = (
                    """; --vllm_options '{"gpu_memory_utilization": 0.8}' sets the share of the memory that it takes"""
                )
            else:
                hint = """; --vllm_options '{"kv_cache_memory_bytes": 1073741824}' sets the size of its KV cache"""
        return UserError(f"vLLM {what}: {error}{hint}{self._where()}")

    def _where(self) -> str:
        """The end of a message: the last line that the process printed, and where its output is."""
        last = f"; its last line: {self.last_lines[-1]}" if self.last_lines else ""
        return f"{last} (its output: {self.log})" if self.log else last


def check_python(python: str | None) -> None:
    """Checks that an interpreter is there and finds vLLM, which takes much less time than importing it.

    Args:
        python: the value of --vllm_python.

    Raises:
        UserError: if it is not, or has no vLLM.
    """
    python = python or sys.executable
    environment, command = child_environment(torch.device("cpu")), [python, "-c", HAS_VLLM]
    try:
        answer = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_SECONDS
        )
    except OSError as error:
        raise UserError(f"--vllm_python {python} cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"--vllm_python {python} did not answer for {CHECK_SECONDS} seconds: is it Python?") from None
    if answer.returncode != 0:
        last = answer.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"--vllm_python {python} ended with status {answer.returncode}: {''.join(last)}")
    if answer.stdout.split()[-1:] == [b"None"]:
        raise _no_vllm(python)


def _no_vllm(python: str, error: str = "it is not installed") -> UserError:
    return UserError(
        f"{python} cannot import vLLM ({error}): --vllm_python FILE names the interpreter of an environment that has "
        "it, and make vllm-env makes one"
    )


def _open_log(path: Path) -> IO[bytes] | None:
    """Returns a new file in place of what has this name, which may be a link or a FIFO; None if that cannot be."""
    try:
        path.unlink(missing_ok=True)
        return open(path, "xb", buffering=0)
    except OSError:
        return None


def _is_secret(name: str, value: str) -> bool:
    """Whether an environment variable may hold a key or a password."""
    in_url = URL_WITH_USER.search(value) or (name.lower().endswith("_proxy") and "@" in value)
    return bool(SECRET.search(name) or in_url)


def child_environment(device: torch.device) -> dict[str, str]:
    """Returns the environment of vLLM's process: this one's without secrets and what is for this process alone.

    Nothing is asked of a hub or reported to anybody, and one GPU is visible, the device's.
    """
    kept = {name: value for name, value in os.environ.items() if not (_is_secret(name, value) or OURS.fullmatch(name))}
    kept |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    # one process: errors arrive with their texts, and requests are scheduled in one order
    kept["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        visible = [name.strip() for name in kept.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        kept["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    else:
        kept.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # as many threads as OMP_NUM_THREADS or the cores
    return kept
