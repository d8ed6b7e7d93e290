"""A server on loopback that speaks as much of the Hugging Face Hub's protocol as downloads need."""

import hashlib
import http.server
import json
import threading
import urllib.parse


class Hub:
  """`repos`: name -> {commit: {file: bytes}, branch: commit}.

  Attributes:
    gated: name of a repository -> the token that opens it.
    cut: file -> how many downloads of it are dropped half-way.
    requests: (method, path, Range header) of every request.
  """

  def __init__(self):
    self.repos, self.gated, self.cut, self.requests = {}, {}, {}, []
    hub = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_GET(self):
        hub._answer(self, True)

      def do_HEAD(self):
        hub._answer(self, False)

      def log_message(self, *args):
        pass

    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.server.server_port}"
    threading.Thread(target=self.server.serve_forever, daemon=True).start()

  def close(self):
    self.server.shutdown()
    self.server.server_close()

  def add(self, name, files, branch="main"):
    """Adds a commit, which the branch then names; returns its hash."""
    commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
    self.repos.setdefault(name, {}).update({commit: files, branch: commit})
    return commit

  def downloads(self):
    """Returns the names of files whose content was asked for."""
    return [path.split("/resolve/")[1].split("/", 1)[1] for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path]

  def _answer(self, request, body):
    path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
    self.requests.append((request.command, path, request.headers.get("Range")))
    if path.startswith("/api/models/"):
      name, kind, rest = self._split(path.removeprefix("/api/models/"))
    else:
      name, kind, rest = self._split(path.removeprefix("/"))
    if name not in self.repos:
      return self._error(request, 404, "RepoNotFound", "Repository not found")
    if name in self.gated and request.headers.get("Authorization") != f"Bearer {self.gated[name]}":
      return self._error(request, 401, "GatedRepo", f"Access to model {name} is restricted")
    revision, _, file = (rest or "main").partition("/")
    commit = self.repos[name].get(revision)
    commit = commit if isinstance(commit, str) else revision if commit else None
    if commit is None:
      return self._error(request, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
    files = self.repos[name][commit]
    if kind in ("", "revision"):
      return self._json(request, {"id": name, "modelId": name, "sha": commit, "private": False,
                                  "tags": [], "siblings": [{"rfilename": f} for f in files]})
    if kind == "tree":
      return self._json(request, [{"type": "file", "path": f, "size": len(content),
                                   "oid": hashlib.sha1(content).hexdigest()}
                                  for f, content in files.items()])
    if file not in files:
      return self._error(request, 404, "EntryNotFound", "Entry not found", commit)
    return self._file(request, file, files[file], commit, body)

  def _split(self, path):
    for kind in ("revision", "tree", "resolve"):
      if f"/{kind}/" in path:
        name, _, rest = path.partition(f"/{kind}/")
        return name, kind, rest
    return path, "", ""

  def _json(self, request, value):
    self._send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

  def _error(self, request, status, code, message, commit=None):
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    self._send(request, status, b"", headers | ({"X-Repo-Commit": commit} if commit else {}))

  def _file(self, request, file, content, commit, body):
    headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit,
               "Accept-Ranges": "bytes"}
    start, status, wanted = 0, 200, request.headers.get("Range")
    if wanted:
      start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
      headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    if body and self.cut.get(file, 0) > 0:
      self.cut[file] -= 1
      return self._send(request, status, content[start:], headers, cut=(len(content) - start) // 2)
    return self._send(request, status, content[start:], headers)

  def _send(self, request, status, content, headers, cut=None):
    request.send_response(status)
    for name, value in headers.items():
      request.send_header(name, value)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command == "GET":
      try:
        request.wfile.write(content[:cut])
        request.wfile.flush()
      except OSError:
        pass  # the client went away
    if cut is not None:
      request.close_connection = True
      request.connection.shutdown(2)
