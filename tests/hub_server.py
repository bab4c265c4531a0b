"""A loopback server that speaks as much of the hub's protocol as reading a dataset or a model needs.

It fails where told:

    with HubServer() as hub:
        hub.commit("owner/name", {"README.md": b"...", "data/train-0.parquet": b"..."})   # on main
        hub.faults = {3: 429, 5: "cut"}                  # the third and the fifth request in its life
        hub.broken = {"data/train-0.parquet": "garble"}  # every request for this file
        HF_ENDPOINT = hub.url

As on the hub: a commit of 40 hex digits for each revision, the tree in pages joined by Link headers,
small files answered directly, large ones by a signed redirect to another host, Range with 206 and
Content-Range, X-Repo-Commit, X-Linked-Size, ETag, and X-Error-Code that tells a missing file from a
missing revision or repository.

Faults: an HTTP status; "stall" (half the body, then nothing), "cut" (half the body, then the connection
closes), "short" (half the body, declared as if it were all), "garble" (the whole body, its first 16
bytes overwritten), "silence" (nothing).
"""
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# What the hub keeps outside git, behind a redirect.
LARGE = (".parquet", ".jsonl", ".gz", ".safetensors", ".vocab")


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class HubServer:
    def __init__(self, page_size: int = 1000, port: int = 0):
        self.page_size = page_size                       # entries of a page of the tree
        self.repos = {}                                  # name -> {revision or commit: {path: bytes}}
        self.heads = {}                                  # (name, revision) -> commit
        self.faults, self.broken = {}, {}
        self.headers = {429: {"Retry-After": "7"}}       # that go with a status
        self.log = []                                    # (method, path, authorization, bytes of body sent)
        self.lock, self.closing = threading.Lock(), threading.Event()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        commit = sha1(repr(sorted((path, sha256(data)) for path, data in files.items())).encode())
        self.repos.setdefault(repo, {})[commit] = files
        self.heads[repo, revision] = commit
        return commit

    def forget(self, repo: str, commit: str) -> None:
        del self.repos[repo][commit]

    def bodies(self) -> int:
        """Bytes of files sent so far (not of the API)."""
        return sum(sent for _, path, _, sent in self.log if "/api/" not in path)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.hub
        self.parts, self.query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
        with hub.lock:
            hub.log.append((self.command, self.parts.path, self.headers.get("Authorization"), 0))
            self.number = len(hub.log)
        self.fault = hub.faults.get(self.number)
        parts = [unquote(part) for part in self.parts.path.strip("/").split("/")]
        if parts[0] == "cdn":                            # /cdn/<repo>/<name>/<commit>/<path>
            path = "/".join(parts[4:])
            self.fault = self.fault or hub.broken.get(path)
            return self.send_file(hub.repos[f"{parts[1]}/{parts[2]}"][parts[3]][path], {})
        if parts[0] in ("api", "datasets"):              # a model's files have neither before its name
            parts = parts[2 if parts[0] == "api" else 1:]
        self.send_of_repo("/".join(parts[:2]), *(parts[2:] or ["revision"])[:1], parts[3:] or ["main"])

    def send_of_repo(self, repo, verb, rest):
        """/<repo>/<verb>/<revision>/<path>"""
        hub = self.hub
        if repo not in hub.repos:
            return self.missing("RepoNotFound", 401)     # the hub does not say whether it is there
        commit = hub.heads.get((repo, rest[0]), rest[0])
        if commit not in hub.repos[repo]:
            return self.missing("RevisionNotFound")
        files, path = hub.repos[repo][commit], "/".join(rest[1:])
        if verb == "revision":
            return self.send_json({
                "id": repo, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": name} for name in sorted(files)]})
        if verb == "tree":
            return self.send_tree(files, path)
        if path not in files:
            return self.missing("EntryNotFound")
        if not path.endswith(LARGE):
            return self.send_file(files[path], {"X-Repo-Commit": commit, "ETag": f'"{sha1(files[path])}"'})
        if isinstance(hub.broken.get(path), int):
            self.fault = hub.broken[path]
        host = f"http://localhost:{hub.port}"            # not 127.0.0.1: another host for the client
        self.answer(302, b"", {
            "Location": f"{host}/cdn/{repo}/{commit}/{path}?Signature=" "signed-canary",
            "X-Repo-Commit": commit, "X-Linked-Size": str(len(files[path])),
            "X-Linked-ETag": f'"{sha256(files[path])}"'})

    def send_tree(self, files, folder):
        folders = {"/".join(name.split("/")[:depth])
                   for name in files for depth in range(1, name.count("/") + 1)}
        entries = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders]
        for name, data in files.items():
            entries.append({"type": "file", "path": name, "size": len(data), "oid": sha1(data)})
            if name.endswith(LARGE):
                entries[-1]["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        below = f"{folder}/" if folder else ""
        inside = [entry for entry in entries if entry["path"].startswith(below)]
        if "true" not in [value.lower() for value in self.query.get("recursive", [])]:
            inside = [entry for entry in inside if "/" not in entry["path"].removeprefix(below)]
        inside.sort(key=lambda entry: entry["path"])
        start = int(self.query.get("cursor", ["0"])[0])
        end, headers = start + self.hub.page_size, {}
        if end < len(inside):
            following = f"{self.hub.url}{self.parts.path}?recursive=true&cursor={end}"
            headers["Link"] = f'<{following}>; rel="next"'
        self.send_json(inside[start:end], headers)

    def send_json(self, value, headers=()):
        body = json.dumps(value).encode()
        self.answer(200, body, {"Content-Type": "application/json", **dict(headers)})

    def missing(self, code, status=404):
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def send_file(self, data, headers):
        status, span = 200, self.headers.get("Range")
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            if first:
                first, last = int(first), min(int(last or len(data)), len(data) - 1)
            else:                                        # the last so many bytes
                first, last = len(data) - int(last), len(data) - 1
            headers, status = {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, 206
            data = data[first:last + 1]
        self.answer(status, data, {"Accept-Ranges": "bytes", **headers})

    def answer(self, status, body, headers):
        """Send the answer, or what the fault makes of it."""
        fault = self.fault
        if fault == "silence":
            self.close_connection = True
            self.hub.closing.wait(5)
            return
        if isinstance(fault, int):
            status, body, headers = fault, b"", self.hub.headers.get(fault, {})
        if fault == "garble":
            body = b"\xa5" * 16 + body[16:]
        if fault == "short":
            body = body[:len(body) // 2]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("cut", "stall"):
            body = body[:len(body) // 2]
            self.close_connection = True
        self.hub.log[self.number - 1] = (*self.hub.log[self.number - 1][:3], len(body))
        try:
            self.wfile.write(body)
            self.wfile.flush()
            if fault == "stall":
                self.hub.closing.wait()               # only the client's patience ends it, or the test
        except (BrokenPipeError, ConnectionResetError):  # the client has lost patience
            self.close_connection = True
