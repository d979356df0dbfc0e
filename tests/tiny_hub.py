"""The Hugging Face hub on this machine: its cache, as a download leaves it, and a server that takes uploads."""

import base64
import http.server
import json
import threading
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_hub_cache(cache: Path, repo: str, files: dict[str, bytes], commit: str = COMMIT) -> Path:
    """Write a data set into a cache, with `commit` as its main branch; returns the folder of its files."""
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return snapshot


def make_card(*configs: tuple[str, tuple[str, ...]]) -> bytes:
    """A README.md that lists the files of (config, splits) as `CONFIG/SPLIT-*`."""
    lines = ["---", "license: mit", "configs:"]
    for config, splits in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    return "\n".join([*lines, "---", "# Data", ""]).encode()


class UploadServer:
    """A server on this machine that takes uploads of models as the hub does, without large-file storage.

    with UploadServer() as server:
        ...  # in an environment with HF_ENDPOINT=server.url
    server.files["team/model"]["README.md"]
    """

    def __init__(self, refuses: bool = False):
        self.refuses = refuses  # answers every request with 403
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self.tokens: set[str] = set()
        self.created: dict[str, bool] = {}  # repository -> private
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []  # of commits
        self.metadata: list[str] = []  # cards that were checked before a commit

        class Handler(http.server.BaseHTTPRequestHandler):
            server_state = self

            def do_GET(self) -> None:
                self.server_state._answer(self, "GET")

            def do_POST(self) -> None:
                self.server_state._answer(self, "POST")

            def log_message(self, *_) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "UploadServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: http.server.BaseHTTPRequestHandler, method: str) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        self.requests.append((method, handler.path))
        self.tokens.add(handler.headers.get("Authorization", ""))
        status, reply = 403, {"error": "this token may not write"}
        if not self.refuses:
            status, reply = self._reply(handler.path, body)
        content = json.dumps(reply).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _reply(self, path: str, body: bytes) -> tuple[int, dict]:
        if path == "/api/repos/create":
            fields = json.loads(body)
            name = f"{fields['organization']}/{fields['name']}"
            self.created[name] = fields.get("visibility") == "private" or bool(fields.get("private"))
            return 200, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":  # of the metadata of a card
            self.metadata.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        parts = path.split("?")[0].split("/")  # "", api, models, NAMESPACE, NAME, action, revision
        repository, action = "/".join(parts[3:5]), parts[5] if len(parts) > 5 else ""
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            self.messages += [line["value"]["summary"] for line in lines if line["key"] == "header"]
            stored = self.files.setdefault(repository, {})
            for line in lines:
                if line["key"] == "file":
                    stored[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {
                "commitUrl": f"{self.url}/{repository}/commit/{COMMIT}",
                "commitOid": COMMIT,
                "success": True,
            }
        return 404, {"error": "not found"}
