"""Giving a server the weights of a policy: by a command of the user, or by vLLM's own calls."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

from ... import signals
from ...console import say
from ...errors import UserError, one_line
from ...models.checkpoint import directory_of
from ...models.policy import Policy
from ...models.resident import Source
from ...servers import Connection, Endpoint, RequestRefused, ServerUnavailable

RELOAD_LOG = "sampler_reload.log"  # output of the command, in the run directory
VARIABLE = "ONPO_POLICY"  # environment variable of the command: the policy's directory
POLL_SECONDS = 0.1  # between two looks whether the command has ended, or a signal has come
TERMINATION_SECONDS = 5.0  # for a command to end by itself after a signal
QUOTED_CHARACTERS = 300  # of the command's last output, in a message
CACHE_TRIES = 50  # for vLLM to drop its prefix cache, which requests that are being ended still use
DEVELOPER_MODE = "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment, and so that only you reach it"


def run_command(command: str, source: Source, endpoint: Endpoint, directory: Path | None) -> None:
    """Runs the user's command, which returns when the server has the policy.

    It runs in a session of its own, so that a server which it starts outlives this program.

    Args:
        source: the policy, whose directory the variable ``VARIABLE`` holds.
        endpoint: the server, whose key is redacted in messages.
        directory: the run directory, for the command's output; None: it is not kept.

    Raises:
        UserError: if it fails.
        signals.Stopped: after a signal; the command is ended.
    """
    policy = policy_directory(source)
    log = Path(os.devnull) if directory is None else directory / RELOAD_LOG
    say(f"--sampler_reload: the server is given {policy}")
    with open(log, "ab") if directory is None else _open_log(log) as output:
        output.write(f"\n{time.strftime('%F %T')} {VARIABLE}={policy}\n".encode())
        output.flush()
        begin = 0 if directory is None else output.tell()
        status = _wait_for(command, {**os.environ, VARIABLE: policy}, output)
    if status:
        what = f"ended with status {status}" if status > 0 else f"was ended by {signal.Signals(-status).name}"
        said = "" if directory is None else endpoint.redact(_tail(log, begin))
        raise UserError(
            f"--sampler_reload: the command {what} when it was to give the server {policy}"
            + (f": {one_line(said)[-QUOTED_CHARACTERS:]} (all of it is in {log})" if said else "")
        )


def _open_log(log: Path) -> BinaryIO:
    """Opens the log to append to it, without waiting for a reader of a FIFO.

    Raises:
        UserError: if a link, or something that is no file, has its name.
    """
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(log, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise UserError(f"{log} is a link, or no file: remove it") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{log} is no file: remove it")
    return open(descriptor, "ab")


def _wait_for(command: str, environment: dict[str, str], output: BinaryIO) -> int:
    process = subprocess.Popen(
        command,
        shell=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        while process.poll() is None:
            signals.stop_if_asked()
            time.sleep(POLL_SECONDS)
    except BaseException:
        _end(process)
        raise
    return process.returncode


def _end(process: subprocess.Popen) -> None:
    """Ends a command and what it has started, unless that has left its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(TERMINATION_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _tail(log: Path, begin: int) -> str:
    """Returns the last output of a command that began at this byte of the log."""
    with open(log, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(begin, end - 4 * QUOTED_CHARACTERS))
        return file.read().decode(errors="replace").strip()


def check_not_tied(policy: Policy, source: Source) -> None:
    """Checks that vLLM's reload in place gives the server all weights of a policy.

    Raises:
        UserError: if the LM head is tied to the embedding: vLLM (0.32) then keeps the old head, without a message.
    """
    model = policy.model
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if tied or (head is not None and head.weight is embedding.weight):
        raise UserError(
            f"--sampler_reload vllm: the LM head of {source} is tied to its embedding, and vLLM keeps the old head "
            'when it reloads in place. Give a command that restarts the server on "$ONPO_POLICY", use --sampler vllm, '
            "or train an adapter (--lora_rank)"
        )


async def reload_vllm(connection: Connection, source: Source) -> None:
    """Makes vLLM read the weights of a policy in place, and forget the keys and values of the old ones.

    Raises:
        UserError: if it does not.
    """
    weights = {"method": "reload_weights", "kwargs": {"weights_path": policy_directory(source)}}
    await _call(connection, _root(connection.endpoint, "collective_rpc"), weights, DEVELOPER_MODE)
    reset = _root(connection.endpoint, "reset_prefix_cache")
    for _ in range(CACHE_TRIES):
        if '"success":false' not in (await _call(connection, reset, {}, DEVELOPER_MODE)).replace(" ", ""):
            return
        await connection.workers.sleep(POLL_SECONDS)
    raise UserError(
        f"{connection.endpoint} does not drop its prefix cache, which has keys and values of the old weights: other "
        "requests use it. Use a server that only this run asks"
    )


async def load_adapter(connection: Connection, source: Source) -> str:
    """Makes vLLM load an adapter under a name that it has not had, and returns the name.

    vLLM drops the adapters that were not used for longest by itself (--max-cpu-loras).

    Raises:
        UserError: if it does not.
    """
    advice = (
        "start vLLM with --enable-lora, --max-lora-rank of at least --lora_rank, and "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
    )
    directory = Path(policy_directory(source))
    name = f"{directory.parent.name}-{directory.name}-{secrets.token_hex(4)}"
    await _call(connection, "/load_lora_adapter", {"lora_name": name, "lora_path": str(directory)}, advice)
    return name


def policy_directory(source: Source) -> str:
    """Returns the absolute directory of a policy's files, an adapter's included."""
    return os.path.abspath(source) if os.path.isdir(source) else directory_of(str(source))


async def _call(connection: Connection, path: str, body: dict[str, Any], advice: str) -> str:
    """Calls vLLM; returns what it says."""
    try:
        return await connection.with_retries(lambda: connection.request("POST", path, body, str), body)
    except RequestRefused as error:
        raise UserError(f"--sampler_reload vllm: {error}; {advice}") from None
    except ServerUnavailable as error:
        raise UserError(f"--sampler_reload vllm: {error}; see what the server says") from None


def _root(endpoint: Endpoint, name: str) -> str:
    """Returns the URL of a call that is not below /v1."""
    parts = urlsplit(endpoint.url)
    return urlunsplit(parts._replace(path=f"{parts.path.removesuffix('/v1')}/{name}"))
