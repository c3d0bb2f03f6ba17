"""`distlm export hf --push`, against a local stand-in for the hub, and what it says without network or token."""

import argparse
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest

from distlm.errors import DistlmError, UsageError
from distlm.models.export.push import Repository
from distlm.models.export.run import export_model


class StandIn:
    """What of huggingface_hub.HfApi is used, over folders of this machine."""

    root: ClassVar[Path]
    made: ClassVar[dict[str, bool]]
    """Repository → whether it is private."""

    def whoami(self) -> dict[str, str]:
        return {"name": "user"}

    def repo_exists(self, name: str) -> bool:
        return (self.root / name).is_dir()

    def list_repo_files(self, name: str) -> list[str]:
        return [path.name for path in (self.root / name).iterdir()]

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)
        (self.root / name / ".gitattributes").touch()
        self.made[name] = private
        return f"https://hub/{name}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


def options(out: Path, **changes: Any) -> argparse.Namespace:
    given = {"out": str(out), "push": "user/model", "public": False, "finetuned": None, "seed": None}
    return argparse.Namespace(**given | changes)


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    StandIn.root, StandIn.made = tmp_path / "hub", {}
    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    return StandIn


@pytest.mark.parametrize("public", [False, True])
def test_a_folder_goes_to_a_stand_in_for_the_hub(tmp_path: Path, hub: type[StandIn], public: bool) -> None:
    found = export_model(options(tmp_path / "out", public=public), tmp_path / "step", write)
    assert found["repository"] == "https://hub/user/model" and hub.made == {"user/model": not public}
    assert (hub.root / "user/model/config.json").read_text() == "{}"
    # A repository with files is left as it is, and nothing is written here.
    with pytest.raises(
        DistlmError, match=r"--push user/model: it has files \(config\.json\), and nothing is overwritten"
    ):
        export_model(options(tmp_path / "second"), tmp_path / "step", write)
    assert not (tmp_path / "second").exists()


def test_an_upload_that_fails_leaves_the_folder_and_says_so(
    tmp_path: Path, hub: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **named: Any) -> None:
        raise ConnectionError("the line is cut\nfar away")

    monkeypatch.setattr(hub, "upload_folder", broken)
    with pytest.raises(DistlmError, match=r"--push user/model: the line is cut; .* \(\S+/out is whole\)$"):
        export_model(options(tmp_path / "out"), tmp_path / "step", write)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("name", ["model", "a/b/c", "/model", "user/"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="name the repository as USER/NAME"):
        Repository.check(name, True)


@pytest.fixture
def refusing() -> Iterator[str]:
    """Address of a server that knows no token."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"error":"Invalid username or password."}'
            self.send_response(401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def at(address: str, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=address, token=token))
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)


@pytest.mark.parametrize("token", ["hf_wrong", None])
def test_a_wrong_token_and_none_are_one_line(refusing: str, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    at(refusing, token, monkeypatch)
    with pytest.raises(DistlmError, match=r"^--push user/model: .*; log in with a token .*`hf auth login`") as told:
        Repository.check("user/model", True)
    assert "\n" not in str(told.value)


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    at("http://127.0.0.1:9", "hf_some", monkeypatch)
    with pytest.raises(DistlmError, match=r"^--push user/model: .*refused.*; is the hub reachable from here\?") as told:
        Repository.check("user/model", True)
    assert "\n" not in str(told.value)
