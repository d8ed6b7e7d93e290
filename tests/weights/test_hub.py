"""Models come from the Hub's protocol: pinned, resumed, from the cache, and nothing leaves it."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from weights import hub_server

from ft import errors
from ft.weights import hub, tensors

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {"config.json": b'{"model_type": "bert"}', "tokenizer.json": b"{}", "README.md": b"hello"}
PROGRAM = """
import json, sys
from ft import errors
from ft.weights import resolve, tensors
out = []
for source in sys.argv[1:]:
  try:
    path = resolve.resolve(source)
    assert path.exists()
    out.append(str(path))
  except errors.UserError as e:
    out.append(f"error {e.exit_status}: {e}")
print(json.dumps(out))
"""


@pytest.fixture
def server():
  made = hub_server.Hub()
  yield made
  made.close()


@pytest.fixture
def run(server, tmp_path):
  """Runs a program with the Hub's environment variables; returns what it printed as JSON."""

  def call(*arguments, program=PROGRAM, **env):
    clean = {k: v for k, v in os.environ.items()
             if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, text=True, capture_output=True,
        timeout=300, env={**clean, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"),
                          "JAX_PLATFORMS": "cpu", "HF_HUB_DISABLE_TELEMETRY": "1", **env})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

  return call


def test_downloads_pins_and_works_offline(server, run, tmp_path):
  old = server.add("org/tiny", {**SMALL, "model.safetensors": b"old"})
  new = server.add("org/tiny", {**SMALL, "model.safetensors": b"new", "pytorch_model.bin": b"x",
                                "onnx/model.safetensors": b"y", "tf_model.h5": b"z"})
  server.add("org/tiny", {**SMALL, "model.safetensors": b"branch"}, branch="a/b")
  server.repos["org/tiny"]["a"] = None  # the server splits at the slash; only a%2Fb names it
  latest, pinned = map(pathlib.Path, run("hf:org/tiny", f"hf:org/tiny@{old}"))
  assert (latest / "model.safetensors").read_bytes() == b"new"
  assert (pinned / "model.safetensors").read_bytes() == b"old"
  assert latest.name == new and pinned.name == old
  assert sorted(set(server.downloads())) == ["config.json", "model.safetensors", "tokenizer.json"]
  before = len(server.requests)
  offline = run("hf:org/tiny", f"hf:org/tiny@{old}", "hf:org/tiny/model.safetensors",
                "hf:org/tiny/absent.gguf", "hf:org/other", HF_HUB_OFFLINE="1")
  assert offline[:3] == [str(latest), str(pinned), str(latest / "model.safetensors")]
  assert "absent.gguf is not in the cache" in offline[3]
  assert offline[4].startswith("error 2: cannot fetch hf:org/other")
  assert len(server.requests) == before
  unreachable = run("hf:org/tiny", "hf:org/other", HF_ENDPOINT="http://127.0.0.1:9")
  assert unreachable[0] == str(latest)
  assert unreachable[1].startswith("error 2: cannot fetch hf:org/other")


def test_pickles_are_fetched_only_where_there_is_nothing_better(server, run):
  server.add("org/old", {**SMALL, "pytorch_model.bin": b"weights", "training_args.bin": b"x",
                         "2_Dense/model.safetensors": b"dense"})
  folder = pathlib.Path(run("hf:org/old")[0])
  assert (folder / "pytorch_model.bin").read_bytes() == b"weights"
  assert (folder / "2_Dense/model.safetensors").read_bytes() == b"dense"
  assert not (folder / "training_args.bin").exists()
  assert run("hf:org/old", HF_HUB_OFFLINE="1") == [str(folder)]


def test_one_file_of_many(server, run):
  server.add("org/gguf", {"README.md": b"", "m-Q4.gguf": b"four", "sub/m-Q8.gguf": b"eight"})
  out = run("hf:org/gguf/m-Q4.gguf", "hf:org/gguf@main/sub/m-Q8.gguf", "hf:org/gguf",
            "hf:org/gguf/m-Q5.gguf")
  assert [pathlib.Path(p).read_bytes() for p in out[:2]] == [b"four", b"eight"]
  assert "several GGUF files; name one, as in hf:…/m-Q4.gguf" in out[2]
  assert "has no file m-Q5.gguf (did you mean 'm-Q4.gguf'?)" in out[3]
  assert sorted(server.downloads()) == ["m-Q4.gguf", "sub/m-Q8.gguf"]


def test_what_is_not_there_or_closed_is_one_error(server, run):
  server.add("org/gated", {**SMALL, "model.safetensors": b"secret"})
  server.gated["org/gated"] = "right"
  sources = "hf:org/gated", "hf:org/absent", "hf:org/gated@v9"
  wrong = run(*sources, HF_TOKEN="wrong")
  for source, message in zip(sources, wrong, strict=True):
    assert message.startswith(f"error 2: cannot fetch {source} from the Hugging Face Hub: ")
    assert "HF_TOKEN" in message and "\n" not in message and "wrong" not in message
  right = run(*sources, HF_TOKEN="right")
  assert (pathlib.Path(right[0]) / "model.safetensors").read_bytes() == b"secret"
  assert "cannot fetch hf:org/gated@v9" in right[2]
  assert "cannot fetch" in run("hf:org/gated", HF_TOKEN="wrong")[0]


def test_interrupted_download_is_resumed(server, run):
  content = np.random.default_rng(0).bytes(24 << 20)  # its client keeps chunks of 10 MB
  server.add("org/big", {**SMALL, "model.safetensors": content})
  server.cut["model.safetensors"] = 1
  folder = pathlib.Path(run("hf:org/big")[0])
  assert (folder / "model.safetensors").read_bytes() == content
  assert any(ranged and "model.safetensors" in path for _, path, ranged in server.requests)


def test_download_that_never_ends_leaves_nothing_that_counts(server, run):
  content = np.random.default_rng(0).bytes(300_000)
  server.add("org/big", {**SMALL, "model.safetensors": content})
  server.cut["model.safetensors"] = 10**6
  assert run("hf:org/big")[0].startswith("error 2: cannot fetch hf:org/big")
  server.cut.clear()
  folder = pathlib.Path(run("hf:org/big")[0])
  assert (folder / "model.safetensors").read_bytes() == content


def test_hostile_names_are_not_written(server, run, tmp_path):
  for i, name in enumerate(("../../../../evil.json", "/tmp/evil.json", "a/../../evil.json",
                            "..\\evil.json")):
    server.add(f"org/evil{i}", {**SMALL, "model.safetensors": b"w", name: b"evil"})
  out = run(*(f"hf:org/evil{i}" for i in range(4)))
  assert all("leaves its folder; refused" in message for message in out)
  assert not [p for p in tmp_path.rglob("*") if "evil.json" in p.name]
  assert not pathlib.Path("/tmp/evil.json").exists()


def test_tiny_bert_loads_from_the_hub(server, run, tmp_path):
  transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
  torch.manual_seed(0)
  model = transformers.BertModel(transformers.BertConfig(
      vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
      intermediate_size=64, max_position_embeddings=40)).eval()
  model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
  saved = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
  assert "model.safetensors.index.json" in saved  # links of the Hub's cache are followed
  server.add("org/tiny", saved)
  program = """
import sys, json, numpy as np
from ft import models
loaded = models.load(sys.argv[1])
ids = np.arange(12).reshape(2, 6)
out = loaded.module.apply(loaded.variables, input_ids=ids, attention_mask=np.ones_like(ids))
print(json.dumps(np.asarray(out["last_hidden_state"]).tolist()))
"""
  got = np.array(run("hf:org/tiny", program=program))
  with torch.no_grad():
    want = model(torch.arange(12).reshape(2, 6)).last_hidden_state.numpy()
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(("source", "want"), [
    ("hf:gpt2", ("gpt2", None, "")), ("hf:org/name", ("org/name", None, "")),
    ("hf:org/name@v1.0", ("org/name", "v1.0", "")),
    ("hf:org/name@refs/pr/3", ("org/name", "refs/pr/3", "")),
    ("hf:org/name@refs/pr/3/a.gguf", ("org/name", "refs/pr/3", "a.gguf")),
    ("hf:org/name@a%2Fb/c/d.gguf", ("org/name", "a/b", "c/d.gguf")),
    ("hf:org/name/c/d.gguf", ("org/name", None, "c/d.gguf")),
])
def test_sources(source, want):
  assert hub.parse(source) == want


@pytest.mark.parametrize("source", ["hf:", "hf:/x", "hf:a b", "hf:org/name/../x", "hf:org/name@"])
def test_malformed_sources(source):
  with pytest.raises(errors.UserError, match="not of the form hf"):
    hub.parse(source)


def test_choice_of_files():
  assert hub.choose(["consolidated.safetensors", "model-00001-of-00002.safetensors",
                     "model-00002-of-00002.safetensors", "model.safetensors.index.json"]) == [
      "model.safetensors.index.json", "model-00001-of-00002.safetensors",
      "model-00002-of-00002.safetensors"]
  assert hub.choose(["consolidated.safetensors"]) == ["consolidated.safetensors"]
  assert hub.choose(["a.gguf", "b.txt"]) == ["b.txt", "a.gguf"]
  assert hub.choose(["readme.md"]) == []


def test_links_of_shards(tmp_path):
  """Those of the Hub's cache are followed, others that leave the folder are not."""
  repo = tmp_path / "models--org--name"
  folder = repo / "snapshots" / "c0ffee"
  for place in (repo / "blobs", folder, tmp_path / "elsewhere"):
    place.mkdir(parents=True)
  tensors.write_safetensors(repo / "blobs" / "hash", {"a": np.arange(3)})
  tensors.write_safetensors(tmp_path / "elsewhere" / "x", {"a": np.arange(4)})
  link = folder / "model-00001-of-00001.safetensors"
  (folder / "model.safetensors.index.json").write_text(
      json.dumps({"weight_map": {"a": link.name}}))
  link.symlink_to("../../blobs/hash")
  assert tensors.open_tensors(folder)["a"].shape == (3,)
  for target in (tmp_path / "elsewhere" / "x", "../../../elsewhere/x"):
    link.unlink()
    link.symlink_to(target)
    with pytest.raises(errors.UserError, match="link that leads out of its folder"):
      tensors.open_tensors(folder)
  (repo / "blobs" / "sub").symlink_to(tmp_path / "elsewhere")
  link.unlink()
  link.symlink_to("../../blobs/sub/x")
  with pytest.raises(errors.UserError, match="link that leads out of its folder"):
    tensors.open_tensors(folder)
