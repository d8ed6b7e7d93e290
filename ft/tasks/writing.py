"""What tasks share that are judged by the texts a model writes: nats per token, and scores."""

import numpy as np

from ft.tasks import lm


class Task(lm.Task):
  """Metrics of a split, of tokens and of the texts that were written for some of its rows.

  A subclass has `_measures`, with `values(statistics)`, `value(name, statistics)` and
  `signatures()`, and:

  Attributes:
    judged: (name, mode) of what verdicts are about, nats_per_token or a score of texts.
    statistics: names of the arrays that its `compare` gives.
  """

  statistics: tuple[str, ...] = ()

  @property
  def _written(self) -> bool:
    """Whether verdicts are about written texts."""
    return self.judged[0] != "nats_per_token"

  def describe_task(self) -> dict:
    """Returns the card's fields about the task."""
    signatures = {"signatures": self._measures.signatures()} if self.generate_rows else {}
    return {"mode": self.judged[1], **signatures}

  def metrics(self, outputs: dict) -> dict[str, float]:
    """Returns the metrics of a split: those of `lm.Task`, and of the texts that were written.

    Args:
      outputs: "nll" and "tokens" (N,), and of written texts `compare`'s statistics with
        "generated" (N,), 1 where there is one; each pair may be absent.
    """
    found = super().metrics(outputs) if "nll" in outputs else {}
    return found | (self._measures.values(self._chosen(outputs)) if "generated" in outputs else {})

  def value(self, outputs: dict) -> float:
    """Returns the metric that verdicts are about; NaN where a split has none."""
    if not self._written:
      return super().value(outputs)
    if "generated" not in outputs:
      return float("nan")
    return self._measures.value(self.judged[0], self._chosen(outputs))

  def count(self, outputs: dict) -> int:
    """Returns how many rows the metric that verdicts are about is of."""
    if self._written:
      return int(np.sum(outputs.get("generated", 0)))
    return len(next(iter(outputs.values())))

  def _chosen(self, outputs: dict) -> dict:
    """Returns the statistics of the rows that a text was written for."""
    rows = np.asarray(outputs["generated"]) > 0
    return {key: np.asarray(outputs[key])[rows] for key in self.statistics if key in outputs}
