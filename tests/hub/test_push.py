"""`mtp export --push` against a server on this machine that takes what huggingface_hub sends."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub.constants
import pytest
from test_export import make

from mtp.hub.push import push


class Hub(BaseHTTPRequestHandler):
    """Makes a repository, asks for every file in the commit itself, and keeps what it is sent."""

    made: list[str] = []
    files: dict[str, bytes] = {}

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        answer: dict = {}
        if self.path == "/api/repos/create":
            name = json.loads(body)
            self.made.append(f"{name.get('organization')}/{name['name']}")
            answer = {"url": f"{huggingface_hub.constants.ENDPOINT}/me/tiny", "name": "me/tiny"}
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": path, **modes} for path in paths]}
        elif self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{huggingface_hub.constants.ENDPOINT}/me/tiny/commit/{'0' * 40}"
            answer = {"commitOid": "0" * 40, "commitUrl": url}
        self.reply(answer)

    def do_GET(self):
        self.reply({"id": "me/tiny", "sha": "0" * 40, "siblings": []})

    def reply(self, answer):
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Hub
    server.shutdown()
    server.server_close()


def test_every_file_of_the_export_arrives_as_it_is(tmp_path, hub):
    make(tmp_path / "out")
    push(tmp_path / "out", "me/tiny")
    assert hub.made == ["me/tiny"]
    expected = {
        str(path.relative_to(tmp_path / "out")): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert hub.files == expected
    assert "mtp_head/model.safetensors" in expected


@pytest.mark.parametrize("name", ["tiny", "a b/c", "https://hub/me/tiny", ""])
def test_what_names_no_repository_is_refused_at_once(tmp_path, name):
    with pytest.raises(ValueError, match="--push must be a repository of the hub, USER/NAME"):
        push(tmp_path, name)


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(ValueError, match="could not upload .* to me/tiny: .*; log in with") as e:
        push(tmp_path, "me/tiny")
    assert "\n" not in str(e.value)
