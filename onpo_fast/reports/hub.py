"""Upload a policy of a run, with its model card, to a repository on the Hugging Face Hub.

The token comes from the environment (HF_TOKEN) or from ``hf auth login`` and is never written or shown. Only files that
saving a policy writes are uploaded: regular files in the policy's own directory, whose checksum the journal has.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..console import say
from ..errors import UserError
from ..files import MODEL_CARD, PARTIAL
from ..journal import Journal
from ..models.checkpoint import ADAPTER_CONFIG, adapter_settings
from ..run.outputs import finished_policies
from ..sources import HUB_ID
from .model_card import model_card, write_model_cards
from .run_data import RunData

POLICY_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".spm", ".bpe", ".vocab", ".tiktoken")  # endings
CODE_FILES = (".py",)
TEMPLATE_FOLDER = "additional_chat_templates"  # the one folder that saving a tokenizer may make


def check_upload(repository: str, base: str | None = None) -> None:
    """Check a repository's name and the user's token, before a run of hours.

    Args:
        base: the base model, if policies are adapters.

    Raises:
        UserError: if the name is invalid, the base is not on the Hub, there is no token, or the Hub does not accept it.
    """
    check_name(repository)
    if base is not None:
        _check_base(repository, base)
    token = _token(repository)
    try:
        HfApi(token=token).whoami()
    except Exception as error:  # the network, the service, a token that expired
        raise UserError(
            f"--push_to_hub {repository}: the Hub cannot be reached or refuses the token: {_text(error, token)}"
        ) from error


def _check_base(repository: str, base: str) -> None:
    """Raises ``UserError`` if an adapter's base model is on this machine alone, so that nobody could use the upload."""
    if Path(base).exists() or not HUB_ID.fullmatch(base):
        raise UserError(
            f"--push_to_hub {repository}: the policies are adapters over {base}, which is not on the Hub: upload the "
            "merged model instead, which python -m onpo_fast.export DIR --merge writes"
        )


def check_name(repository: str) -> None:
    """Raises ``UserError`` if a name is not ORG/NAME as the Hub allows it."""
    try:
        if not HUB_ID.fullmatch(repository):
            raise HFValidationError("expected ORG/NAME")
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {repository}: {_text(error)}") from None


def push_policy(
    directory: Path,
    repository: str,
    policy: int | None = None,
    private: bool | None = None,
    with_code: bool = False,
    journal: Journal | None = None,
) -> str:
    """Upload a finished policy and its model card in one commit; returns the commit's URL.

    Args:
        directory: the run directory.
        repository: ORG/NAME, created if it does not exist.
        policy: t of π_t, at least 2; default the last one.
        private: visibility of a repository that is created; default as the owner's settings say.
        with_code: upload also Python code that came with the base model.
        journal: of the run; read from the directory by default.

    Raises:
        UserError: if there is no such policy, it is not as it was saved, has code that ``with_code`` does not allow, is
            an adapter over a model that is not on the Hub, or the upload fails.
    """
    check_name(repository)
    journal = journal or Journal(directory)
    policies = finished_policies(directory, journal)
    if not policies:
        raise UserError(f"{directory} has no finished policy to upload")
    name = f"π_{policy}" if policy is not None else max(policies, key=lambda one: int(one.removeprefix("π_")))
    if name not in policies:
        known = ", ".join(one.removeprefix("π_") for one in policies)
        raise UserError(f"--policy {policy}: {directory} has no finished policy of this number; it has {known}")
    source = policies[name]
    files = policy_files(source, with_code)
    if ADAPTER_CONFIG in files:
        _check_base(repository, str(adapter_settings(str(source)).get("base_model_name_or_path")))
    token = _token(repository)
    write_model_cards(directory, journal)
    run = RunData.read(directory, examples=False)
    card = model_card(run, journal, source.relative_to(directory).as_posix(), repository)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    operations.append(CommitOperationAdd(path_in_repo=MODEL_CARD, path_or_fileobj=card.encode()))
    say(f"upload {name} to {repository}: {', '.join(files)}, {MODEL_CARD}")
    try:
        api = HfApi(token=token, library_name="onpo_fast")
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message=f"{name}, trained with onpo_fast")
    except Exception as error:  # the network, the service, rights, a full disk there
        raise UserError(
            f"--push_to_hub {repository}: the upload failed: {_text(error, token)}. The policy is in {source}; "
            f"python -m onpo_fast.export {shlex.quote(str(directory))} --push_to_hub {repository} tries again"
        ) from error
    return str(commit.commit_url)


def policy_files(policy: Path, with_code: bool = False) -> dict[str, Path]:
    """The files of a policy that are uploaded, by their names in the repository; its model card is not among them.

    Raises:
        UserError: if there is a link, a folder, a file of another kind, or code without ``with_code``.
    """
    files = {}
    for path in sorted(policy.rglob("*")):
        name = path.relative_to(policy).as_posix()
        if name in (MODEL_CARD, MODEL_CARD + PARTIAL) or (name == TEMPLATE_FOLDER and not path.is_symlink()):
            continue
        if path.suffix in CODE_FILES and not with_code:
            raise UserError(
                f"{path} is Python code, which whoever loads the policy would run: read it, and add "
                "--trust_remote_code to upload it too"
            )
        saved = path.parent == policy or path.parent == policy / TEMPLATE_FOLDER
        if path.is_symlink() or not (saved and path.is_file() and path.suffix in (*POLICY_FILES, *CODE_FILES)):
            raise UserError(f"{path} is not a file that saving a policy writes: nothing was uploaded")
        files[name] = path
    return files


def _token(repository: str) -> str:
    """The user's token.

    Raises:
        UserError: if there is none, or the Hub is switched off.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push_to_hub {repository}: HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it")
    token = huggingface_hub.get_token()
    if not token:
        raise UserError(
            f"--push_to_hub {repository}: there is no Hugging Face token: run `hf auth login`, or set HF_TOKEN"
        )
    return token


def _text(error: Exception, token: str = "") -> str:
    """An error as text, without the token."""
    text = f"{error}" or type(error).__name__
    return text.replace(token, "…") if token else text
