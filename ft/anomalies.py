"""Anomalies by what is nominal: a bank of patches, distances to it, and how maps are judged.

PatchCore (Roth et al. 2022, arXiv:2106.08265) in the form of anomalib; AnomalyDINO (Damm et al.
2025, arXiv:2405.14529) differs in the distance and in how patches make an image's score.

Shapes: B images, P patches of an image, D features, M patches in the bank, N images of a split.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SMOOTH = 4.0  # pixels: standard deviation of the Gaussian that smooths a map


def unit(x):
  """Returns vectors (…, D) of length 1."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames=("count",))
def coreset(points, count: int, first):
  """Returns (count,) rows of points (N, D), each the farthest from those before it (k-centre).

  Greedy, a factor of two from the best cover (Sener and Savarese 2018, arXiv:1708.00489).

  Args:
    count: at most N.
    first: the row that it starts from.
  """
  squares = jnp.sum(jnp.square(points), 1)

  def add(i, state):
    chosen, away, row = state
    chosen = chosen.at[i].set(row)
    new = squares + squares[row] - 2 * (points @ points[row])
    away = jnp.minimum(away, new).at[row].set(-jnp.inf)  # none is taken twice
    return chosen, away, jnp.argmax(away)

  start = jnp.zeros(count, jnp.int32), jnp.full(len(points), jnp.inf), jnp.asarray(first)
  return jax.lax.fori_loop(0, count, add, start)[0]


def select(points, count: int, projection: int, seed: int) -> np.ndarray:
  """Returns sorted rows (count,) of points (N, D) by `coreset` of a random projection of them.

  Args:
    count: how many; at most N.
    projection: dimensions of the projection (Johnson and Lindenstrauss); 0 or at least D: none.
    seed: of the projection and of the row it starts from.
  """
  rng, points = np.random.default_rng(seed), np.asarray(points, np.float32)
  if count >= len(points):
    return np.arange(len(points))
  if 0 < projection < points.shape[1]:
    points = points @ (rng.normal(size=(points.shape[1], projection)) / projection**0.5
                       ).astype(np.float32)
  # Distances do not change, and the squares that they are the difference of become small.
  points = points - points.mean(0)
  return np.sort(np.asarray(coreset(points, count, rng.integers(len(points)))))


def euclidean(a, b):
  """Returns the distance (…) of vectors (…, D); larger for the same pairs as `cosine`."""
  return jnp.linalg.norm(a - b, axis=-1)


def cosine(a, b):
  """Returns 1 - cosine (…) of vectors of length 1 (…, D), without its cancellation."""
  return 0.5 * jnp.sum(jnp.square(a - b), -1)


DISTANCES = {"euclidean": euclidean, "cosine": cosine}


def nearest(one, bank, distance=euclidean):
  """Returns (distance, place in the bank), (P,) each: the nearest of bank (M, D) to (P, D)."""
  place = jnp.argmin(jnp.sum(jnp.square(bank), 1) - 2 * one @ bank.T, 1)
  # From the difference: the expanded form loses half of the digits where two are close.
  return distance(one, bank[place]), place


def patchcore(one, away, place, bank, neighbours: int, distance=euclidean):
  """Returns () the score of an image: its largest distance, reweighted (equation 7 of PatchCore).

  s = (1 - exp ‖m - m*‖ / Σ exp ‖m - n‖) ‖m - m*‖, the sum over the b neighbours n in the bank of
  m*, itself among them, which is nearest to the patch m with the largest distance. A distance
  counts for more where m* has neighbours that are far from m: where it is rare itself.

  Args:
    one: (P, D) patches. away, place: what `nearest` says. bank: (M, D).
    neighbours: b; with 1 the largest distance is the score.
  """
  worst = jnp.argmax(away)
  if neighbours == 1:
    return away[worst]
  centre = bank[place[worst]]
  _, near = jax.lax.top_k(2 * bank @ centre - jnp.sum(jnp.square(bank), 1),
                          min(neighbours, len(bank)))
  others = jnp.where(near == place[worst], -jnp.inf, distance(one[worst], bank[near]))
  return (1 - jax.nn.softmax(jnp.append(away[worst], others))[0]) * away[worst]


def tail(away, share: float = 0.01):
  """Returns () the mean of the largest one per cent of (P,) distances, as AnomalyDINO does."""
  return jnp.mean(jax.lax.top_k(away, max(1, int(share * away.size)))[0])


def score(images, bank, *, distance: str, how: str, neighbours: int):
  """Returns (scores (B,), maps (B, h, w)) of patches (B, h, w, D).

  Args:
    bank: (M, D), of `patches`; with the distance "cosine" of length 1.
    distance: one of DISTANCES.
    how: "patchcore", or of the distances "max", "tail" or "mean": the last for surfaces that a
      defect changes everywhere a little.
    neighbours: b of `patchcore`.
  """
  rows, measure = images.reshape(images.shape[0], -1, images.shape[-1]), DISTANCES[distance]
  rows = unit(rows) if distance == "cosine" else rows

  def of_image(one):
    away, place = nearest(one, bank, measure)
    if how == "patchcore":
      return patchcore(one, away, place, bank, neighbours, measure), away
    return {"max": jnp.max, "mean": jnp.mean, "tail": tail}[how](away), away

  scores, away = jax.lax.map(of_image, rows)
  return scores, away.reshape(images.shape[:3])


def enlarge(maps, size: tuple[int, int]) -> np.ndarray:
  """Returns maps (N, h, w) at the size (H, W) of the images, smoothed, float32."""
  import PIL.Image
  from scipy import ndimage

  made = []
  for one in np.asarray(maps, np.float32):
    large = PIL.Image.fromarray(one).resize(size[::-1], PIL.Image.Resampling.BILINEAR)
    made.append(ndimage.gaussian_filter(np.asarray(large), SMOOTH))
  return np.stack(made)


def region_overlap(maps, masks, limit: float = 0.3) -> float:
  """Returns PRO: the mean share of a defect that is found, over false alarms up to a limit.

  Each connected region of the masks weighs the same; the curve's area up to the limit, over the
  limit (Bergmann et al. 2021, section 4.3 of "The MVTec Anomaly Detection Dataset").

  Args:
    maps: (N, H, W) scores. masks: (N, H, W), above 0 in defects.
    limit: share of nominal pixels that are called defects.
  """
  from scipy import ndimage

  weights, regions = np.zeros(np.shape(masks)), 0
  for i, mask in enumerate(np.asarray(masks) > 0):
    numbers, count = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)
    weights[i] = np.where(mask, 1 / sizes[numbers], 0)
    regions += count
  nominal = (np.asarray(masks) == 0).ravel()
  if not regions or not nominal.any():
    return float("nan")
  values = np.asarray(maps, np.float64).ravel()
  order = np.argsort(-values, kind="stable")
  last = np.append(np.diff(values[order]) != 0, True)  # of pixels with equal scores
  alarms = np.cumsum(nominal[order])[last] / nominal.sum()
  found = np.cumsum(weights.ravel()[order])[last] / regions
  alarms, found = np.append(0.0, alarms), np.append(0.0, found)
  within = alarms <= limit
  alarms, found = (np.append(alarms[within], limit),
                   np.append(found[within], np.interp(limit, alarms, found)))
  return float(np.trapezoid(found, alarms) / limit)
