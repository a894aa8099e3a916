"""A stand-in of a wandb server on this machine: it takes what a run sends and keeps it.

It answers the requests of one run of wandb's client: the GraphQL of runs and artifacts, the stream
of history lines, and uploads.
"""

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

ENTITY = {"id": "e1", "name": "me"}


class WandbServer(ThreadingHTTPServer):
    """Serves until `shutdown`; everything that came in is in its attributes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, dict[str, Any]] = {}
        """Variables of the requests that opened or changed a run, merged, by its id."""
        self.history: dict[str, list[dict[str, Any]]] = {}
        """Lines of the run's history by id, without the columns of wandb itself."""
        self.resumed: list[str] = []
        """Ids whose state the client asked for, in order to resume them."""
        self.artifacts: list[dict[str, Any]] = []
        """Variables of the requests that made an artifact, whose id is its place from 1."""
        self.committed: list[str] = []
        """Ids of the artifacts that are complete."""
        self.uploads: dict[str, bytes] = {}
        """Files by artifact and name, such as `1/report.html`, and manifests."""
        Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that closes its connection, as it does at its end."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """`data` of the answer to a GraphQL request."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        action = getattr(self, f"_{found[1]}", None) if found else None
        return action(given.get("input", given)) if action else {}

    def _Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "u1", "entity": "me", "username": "me", "email": None, "flags": "{}"}
        return {"viewer": viewer | {"teams": {"edges": []}}}

    def _bucket(self, name: str) -> dict[str, Any]:
        lines = len(self.history.get(name, []))
        project = {"id": "p1", "name": "mtp", "entity": ENTITY}
        run = self.runs[name]
        texts = {"description": None, "sweepName": None, "displayName": run["displayName"]}
        counts = {"historyLineCount": lines, "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": "[]", "eventsTail": "[]", "summaryMetrics": "{}"}
        tail = json.dumps([json.dumps({"_step": lines - 1, "_runtime": 1})])
        tails["historyTail"] = tail if lines else "[]"
        about = {"id": "b1", "name": name, "config": run["config"], "project": project}
        return about | texts | counts | tails | {"tags": [], "wandbConfig": '{"t": 1}'}

    def _RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        self.resumed.append(given["name"])
        bucket = self._bucket(given["name"]) if given["name"] in self.runs else None
        return {"model": {"id": "p1", "name": "mtp", "entity": ENTITY, "bucket": bucket}}

    def _UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        is_new = given["name"] not in self.runs
        known = {key: value for key, value in given.items() if value is not None}
        self.runs[given["name"]] = self.runs.get(given["name"], {}) | known
        return {"upsertBucket": {"bucket": self._bucket(given["name"]), "inserted": is_new}}

    def _ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(given)
        made = {"id": str(len(self.artifacts)), "state": "PENDING"}
        return {
            "createArtifact": {"artifact": made | {"artifactSequence": {"latestArtifact": None}}}
        }

    def _CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        file = self._file(given["artifactID"], given["name"])
        return {"createArtifactManifest": {"artifactManifest": {"id": "m1", "file": file}}}

    def _UpdateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        file = self._file("manifest", "updated")
        return {"updateArtifactManifest": {"artifactManifest": {"id": "m1", "file": file}}}

    def _CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            self._file(file["artifactID"], file["name"])
            | {"storagePath": None, "uploadMultipartUrls": None}
            | {"artifact": {"id": file["artifactID"]}}
            for file in given["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.committed.append(given["artifactID"])
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}

    def _CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/up/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": "b1", "uploadHeaders": [], "files": files}}

    def _file(self, artifact: str, name: str) -> dict[str, Any]:
        url = f"{self.url}/up/{artifact}/{name}"
        return {
            "id": name,
            "name": name,
            "displayName": name,
            "uploadUrl": url,
            "uploadHeaders": [],
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *parts: Any) -> None:
        """Print nothing."""

    def do_PUT(self) -> None:
        """An upload."""
        self.server.uploads[self.path.removeprefix("/up/")] = self._body()
        self._send({})

    def do_POST(self) -> None:
        """GraphQL or lines of a run."""
        body = self._body()
        if self.path == "/graphql":
            request = json.loads(body)
            answer = self.server.answer(request["query"], request.get("variables") or {})
            self._send({"data": answer})
            return
        if self.path.endswith("/file_stream"):
            name = self.path.split("/")[-2]
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if history:
                lines = self.server.history.setdefault(name, [])
                # A line that the client sends again replaces the one that is there.
                del lines[history["offset"] :]
                lines += [
                    {k: v for k, v in json.loads(line).items() if not k.startswith("_")}
                    for line in history["content"]
                ]
        self._send({"limits": {}})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
