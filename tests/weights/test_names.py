"""The name table: both directions, all mismatches in one error, dtypes and buffers given back."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ft import errors
from ft.weights import names, tensors
from ft.weights.names import Rule

RULES = [
    Rule("[m.]emb.weight", "params/emb/embedding"),
    Rule("[m.]emb.position_ids", transform="arange"),
    Rule("[m.]h.{i}.fc.weight", "params/h_{i}/fc/kernel", "transpose"),
    Rule("[m.]h.{i}.norm.(weight|gamma)", "params/h_{i}/norm/scale"),
    Rule("[m.]h.{i}.norm.calls", transform="keep"),
    Rule("[m.]h.{i}.mean", "batch_stats/h_{i}/mean"),
    Rule("out.weight", "params/out/kernel", "transpose", "pool=a"),
    Rule("2_Dense/linear.weight", "params/out/kernel", "transpose", "pool=b|c"),
    Rule("lm.{*}", transform="ignore"),
]


@dataclasses.dataclass(frozen=True)
class Config:
  pool: str = "a"


def file(prefix="", norm="weight", dtype=np.float32, layers=2):
  rng = np.random.default_rng(0)

  def array(*shape):
    return rng.integers(-8, 8, shape).astype(dtype)

  out = {f"{prefix}emb.weight": array(7, 4),
         f"{prefix}emb.position_ids": np.arange(6, dtype=np.int64)[None]}
  for i in range(layers):
    out[f"{prefix}h.{i}.fc.weight"] = array(3, 4)
    out[f"{prefix}h.{i}.norm.{norm}"] = array(4)
    out[f"{prefix}h.{i}.norm.calls"] = np.array(5 + i, np.int64)
    out[f"{prefix}h.{i}.mean"] = array(4)
  out["out.weight"] = array(2, 4)
  return out


def lazy(arrays):
  return {name: tensors.ArrayTensor(array) for name, array in arrays.items()}


def expected(layers=2, labels=2):
  out = {"params/emb/embedding": (7, 4), "params/out/kernel": (4, labels)}
  for i in range(layers):
    out |= {f"params/h_{i}/fc/kernel": (4, 3), f"params/h_{i}/norm/scale": (4,),
            f"batch_stats/h_{i}/mean": (4,)}
  return {path: np.zeros(shape, np.float32) for path, shape in out.items()}


def load(arrays, want=None, config=Config(), **kwargs):
  return names.load_tree(lazy(arrays), RULES, want or expected(), config=config, **kwargs)


def dump(leaves, layout=None, config=Config(), **kwargs):
  dumped = names.dump_tree(leaves, RULES, layout, config=config, **kwargs)
  for tensor in dumped.values():
    array = tensor.read()
    assert array.shape == tensor.shape and array.dtype == tensor.dtype
  return {name: tensor.read() for name, tensor in dumped.items()}


def same(got, want):
  assert got.keys() == want.keys()
  for name in want:
    assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
    assert got[name].tobytes() == want[name].tobytes(), name


@pytest.mark.parametrize("prefix", ["", "m."])
@pytest.mark.parametrize("norm", ["weight", "gamma"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dump_gives_back_what_was_loaded(prefix, norm, dtype):
  arrays = file(prefix, norm, dtype)
  leaves, report, layout = load(arrays)
  assert {str(leaf.dtype) for leaf in leaves.values()} == {"float32"}
  assert set(report.matched) == set(expected()) and not report.initialised
  same(dump(leaves, layout), arrays)


def test_values_go_where_the_table_says():
  arrays = file()
  leaves, _, _ = load(arrays)
  assert np.array_equal(leaves["params/h_1/fc/kernel"], arrays["h.1.fc.weight"].T)
  assert np.array_equal(leaves["batch_stats/h_0/mean"], arrays["h.0.mean"])
  tree = names.unflatten(leaves)
  assert tree["params"]["h_1"]["fc"]["kernel"].shape == (4, 3)
  assert names.flatten(tree).keys() == leaves.keys()


def test_dump_without_a_file_behind_it():
  leaves, _, _ = load(file("m.", "gamma"))
  want = {k: v for k, v in file().items() if not k.endswith(("position_ids", "calls"))}
  same(dump(leaves), want)
  same(dump(leaves, prefix=True), {k if k == "out.weight" else "m." + k: v
                                   for k, v in want.items()})


def test_prefix_can_be_overruled_and_dtypes_stay():
  leaves, _, layout = load(file("", "gamma", np.float16))
  same(dump(leaves, layout, prefix=True), file("m.", "gamma", np.float16))


def test_trained_values_are_not_rounded():
  leaves, _, layout = load(file(dtype=np.float16))
  leaves["params/out/kernel"] = leaves["params/out/kernel"] + 1e-5
  got = dump(leaves, layout)
  assert {str(a.dtype) for name, a in got.items() if "ids" not in name and "calls" not in name} == {
      "float32"}
  assert got["emb.position_ids"].dtype == np.int64


def test_a_new_head_is_not_rounded_either():
  leaves, report, layout = load(file(dtype=np.float16), expected(labels=5), head=("params/out",))
  assert report.initialised == ["params/out/kernel"] and report.ignored == ["out.weight"]
  leaves["params/out/kernel"] = np.full((4, 5), 0.1, np.float32)
  assert dump(leaves, layout)["out.weight"].dtype == np.float32


def test_conditions_choose_the_rule():
  leaves, _, layout = load(file())
  got = dump(leaves, layout, Config("b"))
  assert "2_Dense/linear.weight" in got and "out.weight" not in got
  arrays = file()
  arrays["2_Dense/linear.weight"] = arrays.pop("out.weight")
  _, report, _ = load(arrays, config=Config("c"))
  assert not report.initialised
  _, report, _ = load(arrays, config=Config("a"), head=("params/out",))
  assert report.ignored == ["2_Dense/linear.weight"]
  assert report.initialised == ["params/out/kernel"]


def test_one_error_names_every_mismatch():
  arrays = file()
  del arrays["h.1.fc.weight"]
  arrays["surprise"] = np.zeros(3)
  arrays["h.0.fc.weight"] = np.zeros((3, 5), np.float32)
  with pytest.raises(errors.UserError) as e:
    load(arrays, where="the file x")
  message = str(e.value)
  for part in ("the file x", "missing (1)", "h.1.fc.weight (3, 4) for params/h_1/fc/kernel",
               "unexpected (1)", "surprise (3,)", "wrong shape (1)",
               "h.0.fc.weight: has (3, 5), needs (3, 4) for params/h_0/fc/kernel"):
    assert part in message, part


def test_wrong_number_of_axes_is_a_wrong_shape():
  rules = [Rule("w", "params/w/kernel", "conv"), Rule("d", "params/d/kernel", "depthwise")]
  want = {"params/w/kernel": np.zeros((3, 3, 2, 4)), "params/d/kernel": np.zeros((3, 3, 2))}
  with pytest.raises(errors.UserError, match=r"(?s)wrong shape \(2\).*needs \(4, 2, 3, 3\)"):
    names.load_tree(lazy({"w": np.zeros(3), "d": np.zeros(3)}), rules, want)


def test_two_tensors_for_one_parameter():
  arrays = file()
  arrays["m.h.0.fc.weight"] = arrays["h.0.fc.weight"]
  with pytest.raises(errors.UserError, match="h.0.fc.weight and m.h.0.fc.weight are both"):
    load(arrays)


def test_more_layers_than_the_model_and_fewer():
  with pytest.raises(errors.UserError, match=r"unexpected \(3\)(?s:.*)no params/h_2/fc/kernel"):
    load(file(layers=3))
  with pytest.raises(errors.UserError, match=r"missing \(3\)"):
    load(file(layers=1))


def test_another_architecture_names_the_first_mismatches():
  arrays = {f"blocks.{i}.w": np.zeros(2) for i in range(50)}
  with pytest.raises(errors.UserError, match=r"(?s)missing \(8\).*unexpected \(50\).*and 40 more"):
    load(arrays)


def test_ignored_tensors_are_listed():
  arrays = file() | {"lm.bias": np.zeros(7), "lm.x.y": np.zeros(7)}
  _, report, _ = load(arrays)
  assert report.ignored == ["lm.bias", "lm.x.y"]
  assert "ignored: lm.bias, lm.x.y" in str(report)


def test_head_is_all_or_nothing():
  rules = [Rule("c.w", "params/c/kernel"), Rule("c.b", "params/c/bias")]
  want = {"params/c/kernel": np.zeros((2, 3)), "params/c/bias": np.zeros(3)}
  arrays = {"c.w": np.zeros((2, 4)), "c.b": np.zeros(3)}
  leaves, report, _ = names.load_tree(lazy(arrays), rules, want, head=("params/c",))
  assert not leaves and sorted(report.ignored) == ["c.b", "c.w"]
  assert sorted(report.initialised) == ["params/c/bias", "params/c/kernel"]
  arrays["c.w"] = np.zeros((2, 3))
  leaves, _, _ = names.load_tree(lazy(arrays), rules, want, head=("params/c",))
  assert len(leaves) == 2
  leaves, _, _ = names.load_tree(lazy(arrays), rules, want, head=("params/c",), fresh=("params/c",))
  assert not leaves


def test_buffer_that_does_not_count():
  arrays = file()
  arrays["emb.position_ids"] = arrays["emb.position_ids"] + 2
  with pytest.raises(errors.UserError, match="position_ids should count"):
    load(arrays)


def test_dtype_and_place():
  seen = []

  def place(path, array):
    seen.append((path, array.dtype))
    return jnp.asarray(array)

  leaves, _, layout = load(file(), dtype=ml_dtypes.bfloat16, place=place)
  assert {str(d) for _, d in seen} == {"bfloat16"} and len(seen) == len(leaves)
  same(dump(leaves, layout), file())


def test_one_tensor_in_memory_at_a_time():
  """No tensor is read before the one before it has been handed on."""
  alive = []

  class Counting(tensors.ArrayTensor):

    def read(self):
      assert not alive
      alive.append(self)
      return super().read()

  rules = [Rule("w.{i}", "params/w_{i}/kernel")]
  arrays = {f"w.{i}": Counting(np.zeros(3, np.float32)) for i in range(4)}
  want = {f"params/w_{i}/kernel": np.zeros(3) for i in range(4)}
  names.load_tree(arrays, rules, want, place=lambda path, array: alive.pop())
  assert not alive


@pytest.mark.parametrize("name", sorted(names.TRANSFORMS))
@pytest.mark.parametrize("seed", range(3))
def test_transforms_are_inverses(name, seed):
  rng = np.random.default_rng(seed)
  shape = list(rng.integers(1, 5, {"transpose": 2, "conv1d": 3, "pointwise": 3}.get(name, 4)))
  for axis in {"depthwise": (1,), "pointwise": (2,), "spatial": (0, 1, 2)}.get(name, ()):
    shape[axis] = 1
  array = rng.normal(size=shape).astype(np.float32)
  transform = names.TRANSFORMS[name]
  back = np.ascontiguousarray(transform.dump(np.ascontiguousarray(transform.load(array))))
  assert back.shape == array.shape and back.tobytes() == array.tobytes()


def test_rule_with_an_unknown_transform():
  with pytest.raises(ValueError, match="unknown transform 'flip'"):
    Rule("a", "params/a", "flip")
  with pytest.raises(ValueError, match="unknown transform 'same'"):
    Rule("a")


def test_numbers_are_plain():
  rules = [Rule("h.{i}.w", "params/h_{i}/w")]
  for name in ("h.01.w", "h.x.w", "h.1.2.w", "h.1.w2", "xh.1.w"):
    with pytest.raises(errors.UserError, match="unexpected"):
      names.load_tree(lazy({name: np.zeros(1)}), rules, {})
