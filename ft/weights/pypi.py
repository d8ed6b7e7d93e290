"""Fetches one pinned file from the package index the user has configured, and nothing else.

Which index, which credentials and which certificates: as pip and uv are told (environment
variables, pip's configuration files, netrc). The file is known by its sha256 beforehand, so it does
not matter which index it comes from, and none of its code is run.

Protocol: PEP 503 (HTML) and PEP 691 (JSON).
"""

import base64
import configparser
import hashlib
import html.parser
import json
import netrc
import os
import pathlib
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

from absl import logging

from ft import errors

DEFAULT_INDEX = "https://pypi.org/simple"
ATTEMPTS = 3
MAX_PAGE = 64 << 20
MAX_FILE = 20 << 30
_CHUNK = 1 << 18
_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5, */*;q=0.1"
_NETWORK = (OSError, ValueError, EOFError)  # URLError, TLS and timeouts are OSErrors
_RETRY_STATUS = (408, 429, 500, 502, 503, 504)


class Link(NamedTuple):
  """A file an index offers: its URL without credentials, and what the index says of it."""

  url: str
  sha256: str = ""
  size: int = 0


class Settings(NamedTuple):
  """Where packages come from: `indexes` and `find_links` in the order they are asked."""

  indexes: tuple[str, ...]
  find_links: tuple[str, ...]
  cert: str
  proxy: str
  timeout: float


def settings() -> Settings:
  """Returns the user's index settings, read the way pip reads them, else uv's, else PyPI."""
  found = _pip_settings()
  env = os.environ
  index = found.get("index-url") or env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL")
  extra = found.get("extra-index-url") or env.get("UV_INDEX") or env.get("UV_EXTRA_INDEX_URL")
  indexes = [index or DEFAULT_INDEX, *(extra or "").split()]
  if found.get("no-index", "").lower() in ("1", "true", "yes", "on"):
    indexes = []
  cert = found.get("cert") or env.get("REQUESTS_CA_BUNDLE") or env.get("CURL_CA_BUNDLE") or ""
  timeout = found.get("timeout") or found.get("default-timeout") or "60"
  return Settings(
      # uv writes `name=url` where an index has a name
      tuple(re.sub(r"^[\w-]+=(?=[a-z]+://)", "", i).rstrip("/") for i in indexes),
      tuple(found.get("find-links", "").split()), cert, found.get("proxy", ""),
      float(timeout) if re.fullmatch(r"[\d.]+", timeout) else 60.0)


def fetch(name: str, file: str, sha256: str, target: pathlib.Path) -> None:
  """Downloads one file of a package to `target`, checking size and sha256 while it streams.

  Args:
    name: the package's name.
    file: the file's name on the index.
    sha256: what its content must hash to.
    target: where to write it; after an error there is nothing there.

  Raises:
    UserError: no configured place has the file with this sha256; says what each one answered.
  """
  config = settings()
  answers = []
  with_login = _Client(config)
  for place in (*config.find_links, *config.indexes):
    try:
      link = _find(with_login, place, name if place in config.indexes else "", file)
      if link.sha256 and link.sha256 != sha256:
        raise ValueError(f"its {file} has another sha256 ({link.sha256})")
      _download(with_login, link, file, sha256, target)
      return
    except LookupError:
      answers.append(f"{_public(place)}: has no {file}")
    except _NETWORK as e:
      answers.append(f"{_public(place)}: {_reason(e)}")
    target.unlink(missing_ok=True)
  raise errors.UserError("\n  ".join([f"cannot fetch {file} (sha256 {sha256}):", *answers]))


class _Client:
  """urllib with the user's certificates, proxy and passwords; a password goes to its host only."""

  def __init__(self, config: Settings):
    self.timeout = config.timeout
    try:
      context = ssl.create_default_context(cafile=config.cert or None)
    except OSError as e:
      raise errors.UserError(f"pip's cert setting names {config.cert!r}: {e}") from e
    handlers = [urllib.request.HTTPSHandler(context=context), _Login(config.indexes)]
    if config.proxy:
      handlers.append(urllib.request.ProxyHandler({k: config.proxy for k in ("http", "https")}))
    self._opener = urllib.request.build_opener(*handlers)

  def open(self, url: str, accept: str = "*/*"):
    headers = {"Accept": accept, "User-Agent": "ft", "Accept-Encoding": "identity"}
    return self._opener.open(urllib.request.Request(_public(url), headers=headers),
                             timeout=self.timeout)


class _Login(urllib.request.BaseHandler):
  """Adds basic authentication to each request, redirected ones included, by scheme and host."""

  def __init__(self, urls):
    self._known = {}
    for url in urls:
      parts = urllib.parse.urlsplit(url)
      if parts.username:
        pair = (urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password or ""))
        self._known[parts.scheme, parts.netloc.rpartition("@")[2]] = pair
    try:
      self._netrc = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
      self._netrc = {}

  def http_request(self, request):
    login = self._known.get((request.type, request.host))
    host = request.host.partition(":")[0]
    if login is None and host in self._netrc:
      login = self._netrc[host][0], self._netrc[host][2] or ""
    if login:
      token = base64.b64encode(":".join(login).encode()).decode()
      request.add_unredirected_header("Authorization", f"Basic {token}")
    return request

  https_request = http_request


def _find(client: _Client, place: str, name: str, file: str) -> Link:
  """Returns the link to `file` that a place offers; LookupError where it offers none."""
  folder, url = _local(place), f"{place}/{_normal(name)}/" if name else place
  if folder is not None:
    folder = folder / _normal(name) if name else folder
    if (folder / file).is_file():
      return Link((folder / file).resolve().as_uri())
    url = (folder if folder.is_file() else folder / "index.html").resolve().as_uri()
    if not (folder.is_file() or (folder / "index.html").is_file()):
      raise LookupError
  try:
    links = _retry(lambda: _read_page(client, url))
  except urllib.error.HTTPError as e:
    if e.code == 404:
      raise LookupError from e
    raise
  if file not in links:
    raise LookupError
  link = links[file]
  schemes = ("http", "https") if folder is None else ("http", "https", "file")
  if urllib.parse.urlsplit(link.url).scheme not in schemes:
    raise ValueError(f"offers {file} under a URL that is not http(s)")
  return link


def _read_page(client: _Client, url: str) -> dict[str, Link]:
  """Reads one index page: file name -> link."""
  with client.open(url, _ACCEPT) as response:
    body = response.read(MAX_PAGE + 1)
    kind = response.headers.get("Content-Type", "")
    base = response.geturl()
  if len(body) > MAX_PAGE:
    raise ValueError("its page is too large")
  if "json" in kind:
    return _json_links(json.loads(body), base)
  page = _Anchors(base)
  page.feed(body.decode("utf-8", "replace"))
  return page.links


def _json_links(page: dict, base: str) -> dict[str, Link]:
  try:
    files = list(page["files"])
  except (TypeError, KeyError) as e:
    raise ValueError("its answer is not PEP 691") from e
  return {str(f.get("filename")): Link(urllib.parse.urljoin(base, str(f.get("url"))),
                                       (f.get("hashes") or {}).get("sha256", ""),
                                       int(f.get("size") or 0))
          for f in files if isinstance(f, dict)}


class _Anchors(html.parser.HTMLParser):
  """Collects the links of a PEP 503 page, by file name."""

  def __init__(self, base: str):
    super().__init__()
    self.links = {}
    self._base = base

  def handle_starttag(self, tag, attrs):
    href = dict(attrs).get("href")
    if tag == "base" and href:
      self._base = urllib.parse.urljoin(self._base, href)
    if tag == "a" and href:
      url, fragment = urllib.parse.urldefrag(urllib.parse.urljoin(self._base, href))
      name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
      match = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment)
      self.links[name] = Link(url, match[1] if match else "")


def _download(client: _Client, link: Link, file: str, sha256: str, target: pathlib.Path) -> None:
  """Streams a file to disk; ValueError where it is not the one that is pinned."""
  digest = _retry(lambda: _stream(client, link, file, target))
  if digest != sha256:
    raise ValueError(f"sha256 mismatch: its {file} hashes to {digest}, which is not what was "
                     "pinned; it is not used")


def _stream(client: _Client, link: Link, file: str, target: pathlib.Path) -> str:
  digest, count = hashlib.sha256(), 0
  with client.open(link.url) as response, open(target, "wb") as out:
    expected = int(response.headers.get("Content-Length") or 0) or link.size
    logging.info("fetching %s (%.1f MB) from %s", file, expected / 1e6,
                 urllib.parse.urlsplit(link.url).netloc or "this machine")
    while chunk := response.read(_CHUNK):
      count += len(chunk)
      if count > (link.size or expected or MAX_FILE):
        raise ValueError(f"its {file} is larger than the {expected:,} bytes it should have")
      digest.update(chunk)
      out.write(chunk)
  if count < expected:
    raise EOFError(f"the download ended after {count:,} of {expected:,} bytes")
  return digest.hexdigest()


def _retry(function):
  """Calls a function up to ATTEMPTS times while the network, not the answer, is what fails."""
  for attempt in range(ATTEMPTS):
    try:
      return function()
    except _NETWORK as e:
      final = isinstance(e, ValueError) or (
          isinstance(e, urllib.error.HTTPError) and e.code not in _RETRY_STATUS)
      local = isinstance(e, (FileNotFoundError, PermissionError)) or getattr(e, "errno", 0) == 28
      if final or local or attempt == ATTEMPTS - 1:
        raise
      time.sleep(0.5 * 2**attempt)


def _pip_settings() -> dict[str, str]:
  """Reads pip's configuration files and environment variables; the later of them wins."""
  found = {}
  for path in _pip_files():
    parser = configparser.RawConfigParser()
    try:
      parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as e:
      raise errors.UserError(f"pip's configuration file {path} cannot be read: {e}") from e
    for section in ("global", "install", "download"):
      if parser.has_section(section):
        found |= {key.replace("_", "-"): value for key, value in parser.items(section)}
  found |= {key[4:].lower().replace("_", "-"): value for key, value in os.environ.items()
            if key.startswith("PIP_") and value}
  return found


def _pip_files() -> list[pathlib.Path]:
  """Returns pip's configuration files in pip's order (pip/_internal/configuration.py)."""
  own = os.environ.get("PIP_CONFIG_FILE")
  if own == os.devnull:
    return []
  home = pathlib.Path.home()
  config = pathlib.Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
  shared = os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
  files = [pathlib.Path(folder) / "pip/pip.conf" for folder in shared.split(os.pathsep)]
  files += [pathlib.Path("/etc/pip.conf")]
  if not (own and pathlib.Path(own).exists()):
    files += [home / ".pip/pip.conf", config / "pip/pip.conf"]
  if sys.platform == "darwin":
    files += [home / "Library/Application Support/pip/pip.conf"]
  return [*files, pathlib.Path(sys.prefix) / "pip.conf", *([pathlib.Path(own)] if own else [])]


def _local(place: str) -> pathlib.Path | None:
  """Returns the folder or file that a place on this machine names; None for one of the network."""
  parts = urllib.parse.urlsplit(place)
  if parts.scheme == "file":
    return pathlib.Path(urllib.request.url2pathname(parts.path))
  return None if parts.scheme in ("http", "https") else pathlib.Path(place).expanduser()


def _public(url: str) -> str:
  """Returns a URL without its credentials, for requests, logs and messages."""
  parts = urllib.parse.urlsplit(url)
  return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _reason(error: Exception) -> str:
  return str(getattr(error, "reason", "") or error) or type(error).__name__


def _normal(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()
