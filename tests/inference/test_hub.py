"""A Space's folder, and the Hub: a stand-in of its HTTP endpoint, with the real client."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, RepoUrl, SpaceCard

from captioner import Captioner
from captioner.__main__ import main
from captioner.inference.captioner import SHIPPED_CHECKPOINT
from captioner.model.checkpoint import load

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ("README.md", "config.json", "model.safetensors")


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "space"
    assert main(["export", "--space", str(folder)]) == 0
    return folder


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_space_holds_exactly_the_needed_files(space: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "captioner"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    package = set(listed.stdout.split())
    own = {"app.py", "LICENSE", "README.md", "requirements.txt"}
    assert files_in(space) == package | own | {f"assets/checkpoint/{name}" for name in CHECKPOINT}
    for name in CHECKPOINT:
        there = space / "assets" / "checkpoint" / name
        assert there.read_bytes() == (SHIPPED_CHECKPOINT / name).read_bytes()


def test_space_requirements_leave_out_training(space: Path) -> None:
    ours = (ROOT / "requirements.txt").read_text().splitlines()
    needed = (space / "requirements.txt").read_text().splitlines()
    pinned = {line for line in needed if line and not line.startswith("#")}
    assert pinned < set(ours)
    assert any("download.pytorch.org/whl/cpu" in line for line in needed)
    names = {line.partition("==")[0] for line in needed if "==" in line}
    assert {"torch", "gradio", "timm"} <= names
    assert not {"gensim", "datasets", "tensorboard"} & names


@pytest.mark.parametrize("place", ["", "space"])
def test_front_matter_is_valid_for_the_hub(place: str, space: Path) -> None:
    card = SpaceCard.load(space / "README.md" if place else ROOT / "README.md")
    data = card.data
    assert (data.sdk, data.app_file, data.license) == ("gradio", "app.py", "mit")
    assert f"\ngradio=={data.sdk_version}  " in (ROOT / "requirements.txt").read_text()
    # The Python that the tests run on.
    assert data.python_version == f"{sys.version_info.major}.{sys.version_info.minor}"
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {data.colorFrom, data.colorTo} <= colours
    assert len(data.short_description) <= 60
    assert data.title
    assert data.emoji


def test_nonempty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main(["export", "--space", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert files_in(tmp_path) == {"mine"}


def test_broken_checkpoint_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SHIPPED_CHECKPOINT, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    command = ["export", "--space", str(tmp_path / "space")]
    assert main([*command, "--checkpoint", str(tmp_path / "broken")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_unwritable_folder_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["export", "--space", str(tmp_path / "file" / "space")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main(["export"]) == 2
    assert "--space DIR" in capsys.readouterr().err


# ---- The Hub.


class Hub(http.server.ThreadingHTTPServer):
    """As much of the Hub as a model's upload and download need; keeps what was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_good":
            self._json({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            self.server.private = json.loads(body)["visibility"] == "private"
            self._json({"url": f"{self.server.address}/someone/captions", "id": "1"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for each in json.loads(body)["files"]
            ]
            self._json({"files": files})
        else:
            assert self.path.startswith("/api/models/someone/captions/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            address = f"{self.server.address}/someone/captions/commit/{self._sha()}"
            self._json({"success": True, "commitOid": self._sha(), "commitUrl": address})

    def _sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.server.files)).encode()).hexdigest()

    def do_GET(self) -> None:
        found = re.fullmatch(r"/someone/captions/resolve/\w+/(.+)", self.path)
        if self.path.startswith("/api/models/someone/captions/tree/"):
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in self.server.files.items()
            ]
            self._json(rows)
        elif self.path.startswith("/api/models/someone/captions"):
            names = [{"rfilename": name} for name in self.server.files]
            self._json({"id": "someone/captions", "sha": self._sha(), "siblings": names})
        elif found and found[1] in self.server.files:
            data = self.server.files[found[1]]
            tag = hashlib.sha256(data).hexdigest()
            self._send(200, data, ETag=f'"{tag}"', X_Repo_Commit=self._sha())
        else:
            self._send(404, b"", X_Error_Code="EntryNotFound" if found else "RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


def run(hub: Hub, home: Path, *arguments: str, token: str = "hf_good") -> Any:
    """Run the command line against the stand-in."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN": token,
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-m", "captioner", *arguments],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_checkpoint_round_trips_through_the_hub(
    hub: Hub, tmp_path: Path, example_photos: list[Path]
) -> None:
    pushed = run(hub, tmp_path, "export", "--hub", "someone/captions", "--private")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == f"{hub.address}/someone/captions"
    assert hub.private is True
    assert set(hub.files) == set(CHECKPOINT)
    for name in CHECKPOINT:
        assert hub.files[name] == (SHIPPED_CHECKPOINT / name).read_bytes()
    photo = str(example_photos[0])
    there = run(hub, tmp_path, "caption", photo, "--json", "--checkpoint", "someone/captions")
    assert there.returncode == 0, there.stderr
    assert there.stdout == run(hub, tmp_path, "caption", photo, "--json").stdout


@pytest.mark.parametrize("upload_fails", [False, True])
def test_upload_without_owner_goes_to_the_created_repository(
    upload_fails: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = "https://huggingface.co/me/captions"
    uploads = []

    def upload_folder(_: HfApi, *, repo_id: str, folder_path: Path, **__: Any) -> None:
        uploads.append(repo_id)
        assert files_in(folder_path) == set(CHECKPOINT)
        if upload_fails:
            raise OSError("connection lost")

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: RepoUrl(address))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert main(["export", "--hub", "captions"]) == int(upload_fails)
    output = capsys.readouterr()
    assert uploads == ["me/captions"]
    if upload_fails:
        assert "connection lost" in output.err
        assert f"the repository {address} exists" in output.err
    else:
        assert output.out.strip() == address


def test_captioner_uploads_its_checkpoint(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "https://huggingface.co/me/captions"
    uploads = []

    def upload_folder(_: HfApi, *, folder_path: Path, **__: Any) -> None:
        uploads.append(load(folder_path))

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: RepoUrl(address))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert captioner.push_to_hub("captions") == address
    (uploaded,) = uploads
    assert uploaded.vocabulary == captioner.checkpoint.vocabulary
    assert uploaded.card == captioner.checkpoint.card


@pytest.mark.slow
def test_hub_refusal_is_reported_in_one_line(hub: Hub, tmp_path: Path) -> None:
    refused = run(hub, tmp_path, "export", "--hub", "someone/captions", token="hf_bad")
    assert refused.returncode == 1
    assert "hf auth login" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    missing = run(hub, tmp_path, "caption", "p.jpg", "--checkpoint", "nobody/nothing")
    assert missing.returncode == 2
    assert "nobody/nothing" in missing.stderr
    assert len(missing.stderr.strip().splitlines()) == 1
