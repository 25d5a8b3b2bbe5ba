"""A Hub on the loopback interface, for the real huggingface_hub client: standard library only.

    with HubServer() as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("user/name")

Models, data sets and spaces live in memory, with commits, branches, tags, LFS, ranges and private
repositories. `hub.fail` injects faults; `hub.requests` lists what was asked for. Uploads need
HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

DATE = "2026-01-01T00:00:00.000Z"
LFS_ENDINGS = (".safetensors", ".model", ".png", ".bin", ".npz", ".parquet", ".gz")


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]
    parent: str | None


@dataclass
class Repo:
    name: str
    kind: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, title: str, files: dict[str, bytes], parent: str | None, branch: str) -> Commit:
        text = repr((title, parent, sorted((p, _sha256(c)) for p, c in files.items())))
        oid = hashlib.sha1(f"{self.name} {text}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, files, parent)
        self.branches[branch] = oid
        return self.commits[oid]

    def find(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)


@dataclass
class Fault:
    """Requests whose method and path match get `status`, or lose their connection."""

    method: str
    pattern: str
    status: int | None
    times: int
    after_bytes: int | None = None
    before: object = None  # called first: someone else's commit, for instance


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_ENDINGS) or size > 10_000_000


class HubServer:
    """The server; a context manager. `url` is its address, `token` the one it accepts."""

    def __init__(self, user: str = "user", token: str = "hf_loopback"):
        self.user, self.token = user, token
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fail(self, method, pattern, status=None, times=1, after_bytes=None, before=None) -> None:
        """The next `times` matching requests fail with `status`.

        Without a status the connection is cut, after `after_bytes` of the body if given. A fault
        with `before` and neither status nor bytes only calls it, and then answers as always.
        """
        self.faults.append(Fault(method, pattern, status, times, after_bytes, before))

    def repo(self, name: str, kind: str = "model") -> Repo:
        return self.repos[kind, name]

    def asked(self, method: str, pattern: str) -> list[str]:
        """The paths of the requests so far that match."""
        return [path for m, path in self.requests if m == method and re.search(pattern, path)]


# (method, path with {repo}, name of the handler's method); {x} is one segment, {x*} the rest
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", "/api/repos/create", "create"),
    ("DELETE", "/api/repos/delete", "delete"),
    ("POST", "/api/{kinds}/{repo}/preupload/{revision}", "preupload"),
    ("POST", "/api/{kinds}/{repo}/commit/{revision}", "commit"),
    ("GET", "/api/{kinds}/{repo}/revision/{revision}", "info"),
    ("GET", "/api/{kinds}/{repo}/tree/{revision}", "tree"),
    ("GET", "/api/{kinds}/{repo}/tree/{revision}/{path*}", "tree"),
    ("POST", "/api/{kinds}/{repo}/paths-info/{revision}", "paths_info"),
    ("GET", "/api/{kinds}/{repo}/refs", "refs"),
    ("GET", "/api/{kinds}/{repo}/commits/{revision}", "commits"),
    ("POST", "/api/{kinds}/{repo}/tag/{revision}", "tag"),
    ("POST", "/api/{kinds}/{repo}/branch/{branch}", "branch"),
    ("GET", "/api/{kinds}/{repo}", "info"),
    ("POST", "/{repo}.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/{oid}", "lfs_upload"),
    ("POST", "/lfs/{oid}/verify", "lfs_verify"),
    ("GET", "/{repo}/resolve/{revision}/{path*}", "resolve"),
    ("HEAD", "/{repo}/resolve/{revision}/{path*}", "resolve"),
    ("GET", "/api/resolve-cache/{kinds}/{repo}/{revision}/{path*}", "resolve"),
]


def _compile(path):
    pattern = path.replace("{repo}", r"(?P<repo>[^/]+/[^/]+?)")
    pattern = pattern.replace("{kinds}", "(?P<kinds>models|datasets|spaces)")
    pattern = re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", pattern)
    pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)
    prefix = r"(?:/(?P<prefix>datasets|spaces))?" if path.startswith("/{repo}") else ""
    return re.compile(prefix + pattern)


COMPILED = [(method, _compile(path), name) for method, path, name in ROUTES]


class _Cut(Exception):
    """Close the connection without an answer."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self):
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), parts.path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.cut_after = None
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        try:
            if not self._fault(path):
                self._route(path)
        except _Cut:
            self.close_connection = True

    def _fault(self, path):
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.pattern, path):
                fault.times -= 1
                if fault.before is not None:
                    fault.before()
                if fault.status is not None:
                    self._error(fault.status, None, f"injected {fault.status}")
                    return True
                if fault.after_bytes is None and fault.before is None:
                    raise _Cut
                self.cut_after = fault.after_bytes
        return False

    def _route(self, path):
        for method, pattern, name in COMPILED:
            match = pattern.fullmatch(path)
            if match and method == self.command:
                found = {k: unquote(v) for k, v in match.groupdict().items() if v}
                return self._checked(name, found)
        self._error(404, None, f"no such address: {self.command} {path}")

    def _checked(self, name, found):
        """Authorisation first: the Hub hides private repositories from strangers."""
        sent = self.headers.get("Authorization")
        if sent is not None and sent != f"Bearer {self.hub.token}":
            return self._error(401, None, "Invalid credentials in Authorization header")
        writes = self.command in ("POST", "PUT", "DELETE")
        if writes and sent is None and name not in ("validate_yaml", "paths_info", "lfs_upload"):
            return self._error(401, None, "Invalid username or password.")
        kind = (found.pop("kinds", None) or found.pop("prefix", None) or "models").rstrip("s")
        if "repo" in found:
            repo = self.hub.repos.get((kind, found.pop("repo")))
            if repo is None or (repo.private and sent is None):
                return self._error(
                    401 if sent is None else 404, "RepoNotFound", "no such repository"
                )
            found["repo"] = repo
            if "revision" in found and name not in ("preupload", "commit"):
                found["commit"] = repo.find(found.pop("revision"))
                if found["commit"] is None:
                    return self._error(404, "RevisionNotFound", "no such revision")
        elif name == "info":
            found["commit"] = None
        return getattr(self, f"on_{name}")(**found)

    # --- answers --------------------------------------------------------------------------------

    def _send(self, status, content=b"", headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.cut_after is not None:
                self.wfile.write(content[: self.cut_after])
                self.wfile.flush()
                self.connection.shutdown(2)
                raise _Cut
            self.wfile.write(content)

    def _json(self, content, status=200):
        headers = {"Content-Type": "application/json"}
        self._send(status, json.dumps(content).encode(), headers)

    def _error(self, status, code, message):
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def on_whoami(self):
        if "Authorization" not in self.headers:
            return self._error(401, None, "Invalid username or password.")
        token = {"accessToken": {"displayName": "test", "role": "write"}}
        user = {"type": "user", "name": self.hub.user, "orgs": [], "auth": token}
        self._json(user)

    def on_validate_yaml(self):
        self._json({"errors": [], "warnings": []})

    def _named(self):
        fields = json.loads(self.body)
        owner = fields.get("organization") or self.hub.user
        return (fields.get("type") or "model", f"{owner}/{fields['name']}"), fields

    def on_create(self):
        (kind, name), fields = self._named()
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repos:
            content = {"error": "You already created this repo", "url": url}
            return self._json(content, 409)
        private = fields.get("private") or fields.get("visibility") == "private"
        repo = self.hub.repos[kind, name] = Repo(name, kind, bool(private))
        repo.add("initial commit", {".gitattributes": b""}, None, "main")
        self._json({"url": url, "name": name, "id": name})

    def on_delete(self):
        key, _ = self._named()
        self.hub.repos.pop(key, None)
        self._json({})

    def on_preupload(self, repo, revision):
        commit, files = repo.find(revision), []
        for file in json.loads(self.body)["files"]:
            path, lfs = file["path"], _is_lfs(file["path"], file["size"])
            content = commit.files.get(path) if commit else None
            oid = None if content is None else (_sha256 if lfs else _blob)(content)
            mode = "lfs" if lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def on_lfs_batch(self, repo):
        objects = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.lfs:
                href = f"{self.hub.url}/lfs/{item['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def on_lfs_upload(self, oid):
        if _sha256(self.body) != oid:
            return self._error(422, None, "the content is not what its name says")
        self.hub.lfs[oid] = self.body
        self._send(200)

    def on_lfs_verify(self, oid):
        self._json({}) if oid in self.hub.lfs else self._error(404, None, "no such object")

    def on_commit(self, repo, revision):
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        with self.hub.lock:  # one commit at a time, wholly or not at all
            head = repo.find(revision)
            if head is None:
                return self._error(404, "RevisionNotFound", "no such revision")
            header = next(line["value"] for line in lines if line["key"] == "header")
            parent = header.get("parentCommit")
            if parent is not None and parent != head.oid:
                message = "A commit has happened since. Please refresh and try again."
                return self._error(412, None, message)
            files = dict(head.files)
            for line in lines:
                fault = self._change(files, line["key"], line["value"])
                if fault:
                    return self._error(400, None, fault)
            branch = revision
            if "1" in self.query.get("create_pr", ()):
                branch = f"refs/pr/{1 + sum(b.startswith('refs/pr/') for b in repo.branches)}"
            commit = repo.add(header["summary"], files, head.oid, branch)
        prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
        url = f"{self.hub.url}/{prefix}{repo.name}"
        answer = {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{url}/commit/{commit.oid}",
        }
        if branch != revision:
            answer["pullRequestUrl"] = f"{url}/discussions/{branch.rpartition('/')[2]}"
        self._json(answer)

    def _change(self, files, key, value):
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.hub.lfs:
                return f"LFS object {value['oid']} was never uploaded"
            files[value["path"]] = self.hub.lfs[value["oid"]]
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                return f"A file with this name doesn't exist: {value['path']}"
        elif key == "deletedFolder":
            for path in [p for p in files if p.startswith(value["path"].rstrip("/") + "/")]:
                del files[path]
        return None

    def on_info(self, repo, commit=None):
        commit = commit or repo.find("main")
        content = {
            "_id": "1",
            "id": repo.name,
            "modelId": repo.name,
            "author": repo.name.split("/")[0],
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": DATE,
            "createdAt": DATE,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }
        self._json(content)

    def _entry(self, path, content):
        entry = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
        if _is_lfs(path, len(content)):
            entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
        return entry

    def on_tree(self, repo, commit, path=""):
        recursive = "true" in [v.lower() for v in self.query.get("recursive", ())]
        prefix = f"{path}/" if path else ""
        inside = {p: c for p, c in sorted(commit.files.items()) if p.startswith(prefix)}
        if path and not inside:
            return self._error(404, "EntryNotFound", f"{path} does not exist")
        folders = {p[len(prefix) :].partition("/")[0] for p in inside if "/" in p[len(prefix) :]}
        entries = [
            {"type": "directory", "path": prefix + name, "size": 0, "oid": _blob(name.encode())}
            for name in sorted(folders)
        ]
        entries += [
            self._entry(p, c) for p, c in inside.items() if recursive or "/" not in p[len(prefix) :]
        ]
        self._json(entries)

    def on_paths_info(self, repo, commit):
        form = json.loads(self.body) if self.body[:1] == b"{" else parse_qs(self.body.decode())
        entries = []
        for path in form.get("paths", []):
            if path in commit.files:
                entries.append(self._entry(path, commit.files[path]))
            elif any(p.startswith(f"{path}/") for p in commit.files):
                folder = {"type": "directory", "path": path, "size": 0}
                entries.append({**folder, "oid": _blob(path.encode())})
        self._json(entries)

    def on_refs(self, repo):
        def listed(table, kind):
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}
                for name, oid in table.items()
                if not name.startswith("refs/")
            ]

        heads, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
        self._json({"branches": heads, "tags": tags, "converts": []})

    def on_commits(self, repo, commit):
        found = []
        while commit is not None:
            author = [{"user": self.hub.user, "avatar": ""}]
            fields = {"id": commit.oid, "title": commit.title, "message": "", "date": DATE}
            found.append({**fields, "authors": author})
            commit = repo.commits.get(commit.parent)
        self._json(found)

    def on_tag(self, repo, commit):
        repo.tags[json.loads(self.body)["tag"]] = commit.oid
        self._json({})

    def on_branch(self, repo, branch):
        start = repo.find(json.loads(self.body or b"{}").get("startingPoint", "main"))
        if branch in repo.branches:
            return self._error(409, None, "Reference already exists")
        repo.branches[branch] = start.oid
        self._json({}, 201)

    def on_resolve(self, repo, commit, path):
        if path not in commit.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
            return self._send(404, b"", headers)
        content = commit.files[path]
        lfs = _is_lfs(path, len(content))
        etag = (_sha256 if lfs else _blob)(content)
        headers = {
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{etag}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._send(200, content, headers)
        first = int(wanted[1])
        last = min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if first > last:
            return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers)
