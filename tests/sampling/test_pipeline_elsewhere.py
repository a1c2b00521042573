"""A saved pipeline gives the same frames in other processes and from the Hugging Face hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from vidfill.modeling.autoencoder import SHIPPED_WEIGHTS
from vidfill.sampling.pipeline import VideoInpaintPipeline

pytestmark = pytest.mark.slow

# A process that knows nothing of this one fills what it is given.
READER = """
import sys
import numpy as np
from diffusers import DiffusionPipeline

given, folder, exported_by_0_1 = np.load(sys.argv[1]), *sys.argv[2:]
first = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
from vidfill import VideoInpaintPipeline
for pipe in (first, DiffusionPipeline.from_pretrained(exported_by_0_1, trust_remote_code=True)):
    assert isinstance(pipe, VideoInpaintPipeline)
for number, pipe in enumerate([first, VideoInpaintPipeline.from_pretrained(folder)]):
    frames = pipe(given["video"], given["mask"], num_samples=2, output_type="np").frames
    np.save(f"{number}.npy", frames)
"""

PUSHER = """
import sys
import numpy as np
from vidfill import VideoInpaintPipeline

given, folder, name = np.load(sys.argv[1]), *sys.argv[2:]
VideoInpaintPipeline.from_pretrained(folder).push_to_hub(name, token="hf_none", private=True)
pipe = VideoInpaintPipeline.from_pretrained(name)
frames = pipe(given["video"], given["mask"], num_samples=2, output_type="np").frames
np.save("0.npy", frames)
"""


def run_apart(folder: Path, script: str, clip: dict, *words: str, **environment: str) -> None:
    """Run a script in a process of its own, which works in `folder`."""
    np.savez(folder / "given.npz", **clip)
    command = [sys.executable, "-c", script, "given.npz", *words]
    environment |= {"HF_HOME": str(folder / "home")}
    subprocess.run(command, check=True, cwd=folder, env=os.environ | environment)


def test_saved_and_loaded_in_a_fresh_process_it_gives_the_same_frames(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray, tmp_path: Path
) -> None:
    expected = pipe(video, mask, num_samples=2, output_type="np").frames
    pipe.save_pretrained(tmp_path / "model")
    run_apart(
        tmp_path, READER, {"video": video, "mask": mask}, "model", str(SHIPPED_WEIGHTS / "inpaint")
    )
    for by_diffusers_and_by_us in ("0.npy", "1.npy"):
        assert np.array_equal(np.load(tmp_path / by_diffusers_and_by_us), expected)


# The hub


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face hub as an upload and a download ask for, for one model."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


COMMIT = "0" * 40
NAME = "someone/filler"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            self._say({"url": f"{self.server.url}/{NAME}"})
        elif path == f"/api/models/{NAME}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self._say({"files": [{"path": name, **modes} for name in names]})
        elif path == f"/api/models/{NAME}/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            for value in (line["value"] for line in lines if line["key"] == "file"):
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.url}/{NAME}/commit/{COMMIT}"
            self._say({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self._say({"warnings": [], "errors": []})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        resolved = f"/{NAME}/resolve/{COMMIT}/"
        if path.startswith(f"/api/models/{NAME}/tree/"):
            self._say(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": _hash(content)}
                    for name, content in self.server.files.items()
                ]
            )
        elif path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._say({"id": NAME, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(resolved) and path.removeprefix(resolved) in self.server.files:
            self._send(self.server.files[path.removeprefix(resolved)], "application/octet-stream")
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _say(self, answer: object) -> None:
        self._send(json.dumps(answer).encode(), "application/json")

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_hash(content)}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_pushed_to_the_hub_and_fetched_by_name_it_gives_the_same_frames(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray, hub: Hub, tmp_path: Path
) -> None:
    expected = pipe(video, mask, num_samples=2, output_type="np").frames
    folder = tmp_path / "model"
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text("# A model\n")
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    run_apart(tmp_path, PUSHER, {"video": video, "mask": mask}, str(folder), NAME, **online)
    assert hub.files == {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    assert np.array_equal(np.load(tmp_path / "0.npy"), expected)
