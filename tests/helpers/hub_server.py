"""A small Hugging Face hub on the loopback interface, for tests of downloads.

    with HubServer({"org/model": {"config.json": b"{}"}}) as hub:
        subprocess.run(command, env=hub.environment(home))
        assert hub.fetched == ["config.json"]

It answers what `huggingface_hub` asks when it lists a repo and fetches files of it. As on the real one, LFS files
come from a second host, anyone can list a gated repo, and an unknown repo means 401 to who sends no token.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".gguf", ".bin", ".pt", ".png", "tokenizer.json")
REFUSED = "hf_refused"  # a token that this hub does not know


class Request(NamedTuple):
    """One request as it came in."""

    host: str  # hub or cdn
    method: str
    path: str
    range: str | None
    token: str | None


class _Repo:
    def __init__(self, content: Path | Mapping[str, bytes]):
        if isinstance(content, Path):
            paths = [path for path in content.rglob("*") if path.is_file()]
            content = {path.relative_to(content).as_posix(): path.read_bytes() for path in paths}
        self.files = dict(content)
        self.commit = hashlib.sha1("".join(map(self.etag, sorted(self.files))).encode()).hexdigest()

    def lfs(self, name: str) -> dict | None:
        if not name.endswith(LFS):
            return None
        return {"sha256": hashlib.sha256(self.files[name]).hexdigest(), "size": len(self.files[name])}

    def etag(self, name: str) -> str:
        data = self.files[name]
        lfs = self.lfs(name)
        return lfs["sha256"] if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def sibling(self, name: str) -> dict:
        lfs = self.lfs(name)
        entry = {"rfilename": name, "size": len(self.files[name]), "blobId": self.etag(name)[:40]}
        return {**entry, "lfs": {**lfs, "pointerSize": 130}} if lfs else entry

    def tree_entry(self, name: str) -> dict:
        lfs = self.lfs(name)
        entry = {"type": "file", "path": name, "size": len(self.files[name]), "oid": self.etag(name)[:40]}
        return {**entry, "lfs": {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 130}} if lfs else entry


class HubServer:
    """Serves repos until its `with` block ends, and records every request in `requests`.

    Args:
        repos: folder, or bytes by file name, of each repo id.
        gated: ids of the repos whose files only `token` may fetch.
        token: what the account with access sends; any other but `REFUSED` is an account without.

    `sent` counts the bytes of each file's content that were sent, and `cards` is what a repo says of itself.
    """

    def __init__(
        self, repos: Mapping[str, Path | Mapping[str, bytes]], *, gated: Collection[str] = (), token: str = "hf_access"
    ):
        self.repos = {repo_id: _Repo(content) for repo_id, content in repos.items()}
        self.gated, self.token = gated, token
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()
        self.cards: dict[str, dict] = {}
        self.stalled = threading.Event()
        self._released = threading.Event()
        self.heal()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, host)) for host in ("hub", "cdn")]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a process that uses this hub, with `home` as its HF_HOME."""
        unset = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(unset)}
        kept |= {"HF_TOKEN": token} if token else {}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def replace(self, name: str, data: bytes) -> None:
        """Send `data` for the file, while its listed size and hash stay as they are."""
        self._sent[name] = data

    def cut(self, name: str, after: int) -> None:
        """Close the connection of the next transfer of the file after so many bytes."""
        self._cuts[name] = after

    def stall(self, name: str, after: int) -> None:
        """Stop sending the file after so many bytes and set `stalled`, with the connection left open."""
        self._stalls[name] = after

    def publish(self, answer: object) -> None:
        """Answer with this, as JSON unless it is bytes, when a repo's listing is asked for."""
        self._listing = answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    def script(self, name: str, act: Callable[[BaseHTTPRequestHandler], None]) -> None:
        """Let `act` answer each GET for the file, or for the repo's listing if `name` is empty."""
        self._scripts[name] = act

    def fail(self, status: int) -> None:
        """Answer everything with this HTTP status."""
        self._status = status

    def heal(self) -> None:
        """End every fault."""
        self._sent: dict[str, bytes] = {}
        self._cuts: dict[str, int] = {}
        self._stalls: dict[str, int] = {}
        self._scripts: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self._listing: bytes | None = None
        self._status = 200

    @property
    def fetched(self) -> list[str]:
        """Names of the files whose contents were asked for, in order, repeats included."""
        gets = [request for request in self.requests if request.method == "GET"]
        # A transfer from the second host counts once, not again for the redirect that led to it.
        return [
            urlsplit(request.path).path.split("/", 5)[5]
            for request in gets
            if "/resolve/" in request.path and (request.host == "cdn" or not urlsplit(request.path).path.endswith(LFS))
        ]


def _handler(hub: HubServer, host: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # it would delay each body by 40 ms

        def do_GET(self) -> None:
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
            hub.requests.append(Request(host, self.command, unquote(self.path), self.headers["Range"], token))
            url = urlsplit(unquote(self.path))
            parts = url.path.strip("/").split("/")
            if hub._status != 200:
                self.refuse(hub._status, "", "Internal Error")
            elif token == REFUSED:
                self.refuse(401, "", "Invalid credentials in Authorization header")
            elif parts[:2] == ["api", "models"] and len(parts) >= 4:
                self.describe("/".join(parts[2:4]), parts[4:], parse_qs(url.query), token)
            elif parts[2:3] == ["resolve"]:
                self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)
            else:
                self.refuse(404, "", f"no such page: {self.path}")

        do_HEAD = do_GET

        def find(self, repo_id: str, revision: str, token: str | None) -> _Repo | None:
            repo = hub.repos.get(repo_id)
            if repo is None and token is None:
                self.refuse(401, "", "Invalid username or password.")
            elif repo is None:
                self.refuse(404, "RepoNotFound", "Repository not found")
            elif revision not in ("main", repo.commit):
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                return repo
            return None

        def describe(self, repo_id: str, rest: list[str], query: dict, token: str | None) -> None:
            repo = self.find(repo_id, rest[1] if rest else "main", token)
            if repo is None:
                return
            if rest[:1] == ["tree"]:
                answer = [repo.tree_entry(name) for name in repo.files]
            else:
                entries = [repo.sibling(name) if "blobs" in query else {"rfilename": name} for name in repo.files]
                answer = {"id": repo_id, "sha": repo.commit, "private": False, "siblings": entries}
                answer |= {"cardData": hub.cards[repo_id]} if repo_id in hub.cards else {}
                answer |= {"gated": "auto" if repo_id in hub.gated else False}
            if "" in hub._scripts:
                self.act("")
                return
            body = json.dumps(answer).encode() if hub._listing is None else hub._listing
            self.answer(200, {"Content-Type": "application/json", "Content-Length": len(body)}, body)

        def resolve(self, repo_id: str, revision: str, name: str, token: str | None) -> None:
            repo = self.find(repo_id, revision, token)
            if repo is None:
                return
            if name not in repo.files:
                self.refuse(404, "EntryNotFound", "Entry not found")
            elif name in hub._scripts and (host == "cdn" or not repo.lfs(name)) and self.command == "GET":
                self.act(name)
            elif host == "cdn":
                self.send_file(name, repo.files[name], {"ETag": f'"{repo.etag(name)}"'})
            elif repo_id in hub.gated and token != hub.token:
                self.refuse(403 if token else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
            elif lfs := repo.lfs(name):
                linked = {"X-Linked-Size": lfs["size"], "X-Linked-Etag": f'"{lfs["sha256"]}"'}
                place = {"Location": hub.cdn + self.path, "X-Repo-Commit": repo.commit, "Content-Length": 0}
                self.answer(302, {**linked, **place}, b"")
            else:
                self.send_file(name, repo.files[name], {"ETag": f'"{repo.etag(name)}"', "X-Repo-Commit": repo.commit})

        def act(self, name: str) -> None:
            self.close_connection = True
            with contextlib.suppress(ConnectionError):
                hub._scripts[name](self)

        def send_file(self, name: str, data: bytes, headers: dict) -> None:
            data = hub._sent.get(name, data)
            first, _, last = (self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(data)) + 1, len(data))
            if start or stop < len(data):
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            headers["Content-Length"] = stop - start
            end = stop
            if self.command == "GET":
                end = min(hub._stalls.get(name, end), hub._cuts.pop(name, end))
                hub.sent[name] += max(0, end - start)
            self.answer(206 if "Content-Range" in headers else 200, headers, data[start:end])
            if name in hub._stalls and self.command == "GET":
                hub.stalled.set()
                hub._released.wait(60)
            self.close_connection |= end < stop

        def refuse(self, status: int, code: str, message: str) -> None:
            body = json.dumps({"error": message}).encode()
            headers = {"X-Error-Message": message, "Content-Length": len(body)}
            self.answer(status, {**headers, "X-Error-Code": code} if code else headers, body)

        def answer(self, status: int, headers: dict, body: bytes) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
                self.wfile.flush()

        def log_message(self, *args) -> None:
            pass

    return Handler
