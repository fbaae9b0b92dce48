"""A hub that hangs, fails or breaks off: one line within a limit, and nothing half downloaded is taken for whole."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

COMMIT = "c" * 40
FILES = {"config.json": b"{}", "model.safetensors": b"w" * 40_000, "tokenizer.json": b"t" * 10_000}
BROKEN = "tokenizer.json"
# The client waits between its tries, and for an answer; here neither is worth the time.
FETCH = """
import time
from runtime import hub
time.sleep, hub.WAIT_S = lambda seconds: None, 1.0
from model.hub import fetch
from runtime.errors import UserError
try:
    print("folder", fetch("org/name"))
except UserError as error:
    print("error:", error)
"""


class Hub(http.server.ThreadingHTTPServer):
    """Speaks as much of the hub's protocol as a download needs. mode: "well", "hangs", "fails", "fails later", "breaks off"."""

    daemon_threads = True

    def __init__(self, mode: str):
        self.mode, self.over = mode, threading.Event()
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        mode, path = self.server.mode, self.path.partition("?")[0]
        name, of_api = path.rpartition("/")[2], path.startswith("/api/")
        if mode == "hangs":
            self.server.over.wait()
        if mode in ("hangs", "fails") or (mode == "fails later" and not of_api):
            self.say(b"", 500)
        elif name == "main":
            self.say(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": file} for file in FILES]}).encode())
        elif "/tree/" in path:
            rows = [{"type": "file", "path": file, "size": len(data), "oid": digest(data)} for file, data in FILES.items()]
            self.say(json.dumps(rows).encode())
        elif name in FILES and not of_api:
            self.say(FILES[name], part=mode == "breaks off" and name == BROKEN)
        else:
            self.say(b"", 404)

    do_HEAD = do_GET

    def say(self, body: bytes, status: int = 200, part: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{digest(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if part else body)
        self.close_connection = part

    def log_message(self, *args) -> None:
        pass


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def fetched(home, hub: Hub, **env: str) -> subprocess.Popen:
    """`fetch` in a process of its own: the client reads its environment when it is imported."""
    limits = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    told = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home), **limits, **env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", FETCH], env=os.environ | told, **pipes)


def test_it_ends_in_one_line_and_nothing_is_half_there(tmp_path):
    hubs = {mode: Hub(mode) for mode in ("hangs", "fails", "fails later", "breaks off")}
    processes = {mode: fetched(tmp_path / mode, hub) for mode, hub in hubs.items()}
    for mode, process in processes.items():
        said, noise = process.communicate(timeout=60)
        assert said.startswith("error: org/name: no such folder, and the hub did not give it ("), (mode, said, noise)
        assert said.count("\n") == 1 and "if the network is at fault, try again" in said and "Traceback" not in noise, (mode, said, noise)

    # what the broken download left: the other files, and no file of the one that broke off under its name
    (snapshot,) = (tmp_path / "breaks off").rglob(COMMIT)
    assert sorted(path.name for path in snapshot.iterdir()) == sorted(FILES.keys() - {BROKEN})
    offline, _ = fetched(tmp_path / "breaks off", hubs["breaks off"], HF_HUB_OFFLINE="1").communicate(timeout=60)
    assert offline.startswith("error: org/name: ") and offline.count("\n") == 1, offline  # not the folder that lacks a file
    hubs["breaks off"].mode = "well"
    said, noise = fetched(tmp_path / "breaks off", hubs["breaks off"]).communicate(timeout=60)
    assert said == f"folder {snapshot}\n", (said, noise)
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == FILES
    for hub in hubs.values():
        hub.close()


def test_a_client_that_is_made_anew_has_the_limit_too():
    """huggingface_hub makes one after a connection that failed."""
    code = "from huggingface_hub import close_session, get_session; from runtime import hub; hub._limit(); hub._limit()\n"
    code += "for _ in range(2): assert get_session().event_hooks['request'].count(hub._bounded) == 1; close_session()\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=os.getcwd(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
