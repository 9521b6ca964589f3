"""Uploads to the Hugging Face Hub, against a fake of its API."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from test_model_card import make_run

from onpo_fast import evaluate, export
from onpo_fast.config import Config, parse_run
from onpo_fast.errors import UserError
from onpo_fast.journal import Journal
from onpo_fast.reports import hub

TOKEN = "hf_" + 34 * "x"


class FakeApi:
    """Records what is asked of the Hub."""

    calls: list[tuple[str, Any]] = []  # noqa: RUF012
    error: Exception | None = None

    def __init__(self, token: str, library_name: str | None = None) -> None:
        assert token == TOKEN

    def whoami(self) -> dict:
        self.answer("whoami", None)
        return {}

    def create_repo(self, repository: str, private: bool | None, exist_ok: bool) -> None:
        self.answer("create", (repository, private, exist_ok))

    def create_commit(self, repository: str, operations: list, commit_message: str) -> SimpleNamespace:
        files = {}
        for one in operations:
            content = one.path_or_fileobj
            files[one.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()
        self.answer("commit", files)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repository}/commit/1")

    def answer(self, name: str, content: Any) -> None:
        if self.error:
            raise self.error
        self.calls.append((name, content))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The Hub, logged in: what it is asked."""
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return FakeApi.calls


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def test_the_last_policy_with_its_card(run: Path, calls: list, capsys) -> None:
    export.main([str(run), "--push_to_hub", "org/name", "--private"])
    assert [name for name, _ in calls] == ["create", "commit"]
    assert calls[0][1] == ("org/name", True, True)
    files = calls[1][1]
    assert sorted(files) == ["README.md", "config.json"]
    card = files["README.md"].decode()
    assert "# π_3" in card
    assert "**68.0 %**" in card
    assert 'from_pretrained("org/name")' in card
    said = capsys.readouterr().out
    assert "https://huggingface.co/org/name/commit/1" in said
    assert TOKEN not in said
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert "# π_3" in (run / "iteration_02/policy/README.md").read_text(encoding="utf-8")


def test_another_policy_and_the_default_visibility(run: Path, calls: list) -> None:
    hub.push_policy(run, "org/name", policy=2)
    assert calls[0][1] == ("org/name", None, True)
    assert "# π_2" in calls[1][1]["README.md"].decode()


def test_a_card_of_somebody_else_is_not_uploaded(run: Path, calls: list) -> None:
    (run / "iteration_02/policy/README.md").symlink_to("/etc/hostname")
    hub.push_policy(run, "org/name")
    assert "# π_3" in calls[1][1]["README.md"].decode()
    assert not (run / "iteration_02/policy/README.md").is_symlink()


def record_again(run: Path) -> None:
    Journal(run).record("iteration_02/policy")


def test_code_is_uploaded_only_if_the_user_says_so(run: Path, calls: list, capsys) -> None:
    (run / "iteration_02/policy/modeling.py").write_text("print()")
    record_again(run)
    with pytest.raises(SystemExit):
        export.main([str(run), "--push_to_hub", "org/name"])
    message = capsys.readouterr().err
    assert "modeling.py" in message
    assert "--trust_remote_code" in message
    assert not calls
    export.main([str(run), "--push_to_hub", "org/name", "--trust_remote_code"])
    assert "modeling.py" in calls[1][1]


@pytest.mark.parametrize("harm", ["changed", "added", "link", "folder link", "folder", "other kind"])
def test_only_what_saving_wrote_is_uploaded(run: Path, calls: list, harm: str, tmp_path: Path) -> None:
    policy = run / "iteration_02/policy"
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    if harm == "changed":
        (policy / "config.json").write_text("{}")
    elif harm == "added":
        (policy / "more.json").write_text("{}")
    elif harm == "link":
        (policy / "more.json").symlink_to(secret)
        record_again(run)  # whoever made the run may have written the journal too
    elif harm == "folder link":
        (policy / "additional_chat_templates").symlink_to(tmp_path)
        record_again(run)
    elif harm == "folder":
        (policy / "more").mkdir()
        (policy / "more/x.json").write_text("{}")
        record_again(run)
    else:
        (policy / "id_rsa").write_text("key")
        record_again(run)
    with pytest.raises(UserError, match="iteration_02/policy"):
        hub.push_policy(run, "org/name")
    assert not calls


def test_more_chat_templates_are_uploaded(run: Path, calls: list) -> None:
    folder = run / "iteration_02/policy/additional_chat_templates"
    folder.mkdir()
    (folder / "tools.jinja").write_text("x")
    record_again(run)
    hub.push_policy(run, "org/name")
    assert "additional_chat_templates/tools.jinja" in calls[1][1]


@pytest.mark.parametrize("error", [OSError(f"no network {TOKEN}"), ValueError("bad\nrepository")])
def test_a_failed_upload_is_one_line_without_the_token(
    run: Path, calls: list, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(FakeApi, "error", error)
    with pytest.raises(SystemExit) as stopped:
        export.main([str(run), "--push_to_hub", "org/name"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.count("\n") == 1
    assert "--push_to_hub org/name" in message
    assert TOKEN not in message
    with pytest.raises(UserError, match="--push_to_hub org/name"):
        hub.check_upload("org/name")


def test_the_token_is_looked_for_early(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.check_upload("org/name")
    assert calls == [("whoami", None)]
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="HF_TOKEN"):
        hub.check_upload("org/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        hub.check_upload("org/name")


@pytest.mark.parametrize("name", ["", "name", "org/name/x", "org/..", "org/na me", "-/x", "org/" + 100 * "x"])
def test_bad_names_of_repositories(name: str) -> None:
    with pytest.raises(UserError, match="--push_to_hub"):
        hub.check_name(name)


def test_a_run_without_a_policy(tmp_path: Path, calls: list) -> None:
    (tmp_path / "config.yaml").write_text("iterations: 2\n")
    with pytest.raises(UserError, match="no finished policy"):
        hub.push_policy(tmp_path, "org/name")


@pytest.mark.parametrize("where", ["file", "journal"])
def test_a_run_directory_uploads_nothing_unasked(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come from a stranger, who would get what the user's prompts and GPU made of it."""
    run = tmp_path / "run"
    run.mkdir()
    config = Config(out="run", device="cpu", push_to_hub="stranger/model")
    if where == "file":
        (run / "config.yaml").write_text(config.to_yaml())
    else:
        Journal(run).begin({"options": vars(config)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="push_to_hub asks to upload the policy to stranger/model"):
        parse_run(["--resume", "--out", "run"])
    given = ["--resume", "--out", "run", "--push_to_hub", "stranger/model"]
    assert parse_run(given)[0].push_to_hub == "stranger/model"
    assert "push_to_hub" not in evaluate.OPTIONS


class LocalHub(BaseHTTPRequestHandler):
    """The few addresses of the Hub that an upload of small files asks."""

    received: dict[str, list] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        self.respond({"name": "me", "type": "user", "auth": {}})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in content.splitlines()]
        self.received.setdefault(self.path, []).extend(lines)
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        if self.path == "/api/repos/create":
            self.respond({"url": "https://huggingface.co/org/name", "id": "org/name"})
        elif self.path.endswith("/preupload/main"):
            files = [{"path": one["path"], "uploadMode": "regular"} for one in lines[0]["files"]]
            self.respond({"files": [one | {"shouldIgnore": False} for one in files]})
        else:
            self.respond({"commitUrl": "https://huggingface.co/org/name/commit/1", "commitOid": "1", "success": True})

    def respond(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def test_the_real_client_against_a_local_server(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(LocalHub, "received", {})
    with ThreadingHTTPServer(("127.0.0.1", 0), LocalHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            hub.check_upload("org/name")
            assert hub.push_policy(run, "org/name").endswith("/org/name/commit/1")
        finally:
            server.shutdown()
    (commit,) = [lines for path, lines in LocalHub.received.items() if path.endswith("/commit/main")]
    files = {one["value"]["path"]: one["value"]["content"] for one in commit if one["key"] == "file"}
    assert sorted(files) == ["README.md", "config.json"]
    assert "# π_3" in base64.b64decode(files["README.md"]).decode()
