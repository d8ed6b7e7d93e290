"""What every test may use: real models and data where they are, and a tiny run from end to end."""

import os
import pathlib
import subprocess
import sys

import commands
import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
WORDS = ("a bad bland bright dull film fine good great grim it movie of plot poor slow the "
         "this warm was").split()
GOOD = {"bright", "fine", "good", "great", "warm"}


def pytest_configure():
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  # Threads of torch that wait for each other cost a third of the time, on a core a worker.
  os.environ.setdefault("OMP_NUM_THREADS", "1")
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of scripts that tests start


@pytest.fixture(autouse=True)
def quick_compilation(request):
  """Compiles without costly optimisations: most programs run once, on little data.

  What the optimised program is like is asked by tests that are marked so.
  """
  jax.config.update("jax_disable_most_optimizations",
                    request.node.get_closest_marker("optimised") is None)


@pytest.fixture(scope="session")
def shared():
  """The folder of real models and data; a test that asks for it is skipped where it is absent."""
  if not SHARED.is_dir():
    pytest.skip("needs the real models and data in ../shared, which is not there")
  return SHARED


class Tiny:
  """A random two-layer encoder, 180 rows of made-up reviews, and the commands to run them."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.model, self.csv = folder, folder / "tiny-bert", folder / "reviews.csv"
    self._write_model()
    self._write_data()
    self.config = folder / "tiny.py"
    self.config.write_text(f"""
def get_config():
  return dict(
    model=dict(source={str(self.model)!r}),
    data=dict(train={str(self.csv)!r}, columns=dict(text="text", label="label", group="group")),
    optim=dict(rate=3e-3),
    train=dict(batch=16, steps=40, eval_every=20, log_every=5, train_sample=16),
  )
""")

  def _write_model(self):
    import jax
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    from ft import models as ft_models
    from ft.models import bert
    from ft.weights import names

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = bert.Config(
      vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
      intermediate_size=64, max_position_embeddings=128,
    )
    module = bert.Model(config)
    variables = module.init(jax.random.PRNGKey(0), **bert.probe_inputs(config))
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    ft_models.export(
      ft_models.Pretrained("bert", module, variables, names.Report(), files, config, "text", ()),
      self.model,
    )

  def _write_data(self):
    rng, lines = np.random.default_rng(0), ["text,label,group"]
    for i in range(180):
      words = rng.choice(WORDS, rng.integers(3, 20))
      score = sum(1 if w in GOOD else -1 for w in words if w in GOOD or w in WORDS[1:3])
      lines.append(f"{' '.join(words)},{'positive' if score > 0 else 'negative'},g{i % 30}")
    self.csv.write_text("\n".join(lines) + "\n")

  def command(self, workdir, *flags):
    return [sys.executable, "scripts/train.py", f"--config={self.config}", f"--workdir={workdir}",
            *flags]

  def train(self, workdir, *flags, status=0, **env):
    """Runs to the end and checks the exit status; returns the finished process."""
    done = subprocess.run(self.command(workdir, *flags), cwd=ROOT, env=commands.environment(**env),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr[-3000:]
    return done

  def start(self, workdir, *flags, **env):
    """Starts a run in the background."""
    return subprocess.Popen(
      self.command(workdir, *flags), cwd=ROOT, env=commands.environment(**env),
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
  return Tiny(tmp_path_factory.mktemp("tiny"))
