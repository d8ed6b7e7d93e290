"""Renders chat templates in a process of its own, within limits: this file is its program.

Templates are programs that come with a checkpoint. They run in jinja2's immutable sandbox, see no
clock and no file, and here cannot take more than MEMORY bytes; the system ends the process by
SIGXCPU when an answer takes too much of the processor's time. A line of JSON in, a line out:

    {"template", "tokens", "most", "seconds"}             -> {} | {"invalid": message}
    {"messages", "prompt"}                                -> {"text"} | {"raised" | "large"}
    {"messages", "roles": the roles whose spans to find}  -> {"text", "spans"} | … | {"unclear"}
"""

import json
import math
import re
import resource
import secrets
import signal
import sys

MEMORY = 1 << 30  # bytes of address space


class TooLarge(Exception):
  """The template gives more text than it may."""


class Unclear(Exception):
  """What the template writes of some turns cannot be told from the rest."""


class Template:
  """A chat template.

  Args:
    source: of the template.
    tokens: special tokens by the names that templates know.
    most: characters it may write.

  Raises:
    jinja2.TemplateError: it is not valid.
  """

  def __init__(self, source: str, tokens: dict, most: int):
    import jinja2
    from jinja2 import sandbox

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_block()])
    environment.globals["raise_exception"] = _raiser(jinja2.TemplateError)
    # As transformers does: Jinja's own filter escapes for HTML.
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(
        x, ensure_ascii=False, indent=indent)
    # Marks that no conversation can hold, since they are drawn anew.
    self._marks = environment.marks = tuple(f"\0{secrets.token_hex(8)}{c}" for c in "<>")
    self._template, self._tokens, self._most = environment.from_string(source), tokens, most
    self._marked = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None

  def render(self, messages: list, prompt: bool = False) -> str:
    """Returns the text of messages, ending with the start of a reply if `prompt`."""
    return self._plain(self._render(messages, prompt))[0]

  def spans(self, messages: list, roles) -> tuple[str, list]:
    """Returns the text, and [start, end] in characters of what is said by some roles.

    Those are the template's `{% generation %}` blocks, which mark what the assistant says. In a
    template without them a turn is what the text up to it has more than the text before it, with
    the start of the reply that the template writes itself.

    Raises:
      Unclear: the template writes earlier turns otherwise once there are later ones.
    """
    if self._marked:
      return self._plain(self._render(messages, False))
    text, spans = self.render(messages), []
    for k, message in enumerate(messages):
      if message["role"] in roles:
        before, after = self.render(messages[:k], True), self.render(messages[:k + 1])
        if not after.startswith(before) or not text.startswith(after):
          raise Unclear(k)
        spans.append([len(before), len(after)])
    return text, spans

  def _render(self, messages, prompt) -> str:
    parts, size = [], 0
    for part in self._template.generate(
        messages=messages, add_generation_prompt=prompt, tools=None, documents=None,
        **self._tokens):
      size += len(part)
      if size > self._most:
        raise TooLarge(self._most)
      parts.append(part)
    return "".join(parts)

  def _plain(self, text: str) -> tuple[str, list]:
    """Takes the marks out of a text; returns it and [start, end] of what stood between them."""
    parts, spans, size = [], [], 0
    for part in re.split(f"({'|'.join(map(re.escape, self._marks))})", text):
      if part == self._marks[0]:
        spans.append([size, size])
      elif part == self._marks[1]:
        spans[-1][1] = size
      else:
        parts.append(part)
        size += len(part)
    return "".join(parts), spans


def _raiser(kind):
  def stop(message):
    raise kind(message)

  return stop


def _generation_block():
  """Returns the extension with which `{% generation %}` marks what the assistant says."""
  from jinja2 import ext, nodes

  class Generation(ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller):
      start, end = self.environment.marks
      return f"{start}{caller()}{end}"

  return Generation


def answer(template: Template, request: dict) -> dict:
  """Returns the answer to a request for a text; whatever the template raises is in it."""
  try:
    if "roles" in request:
      text, spans = template.spans(request["messages"], request["roles"])
      return {"text": text, "spans": spans}
    return {"text": template.render(request["messages"], request["prompt"])}
  except (TooLarge, MemoryError) as e:
    return {"large": str(e)}
  except Unclear as e:
    return {"unclear": e.args[0]}
  except Exception as e:  # whatever a program that came with a checkpoint may raise
    return {"raised": str(e) or type(e).__name__}


def serve() -> None:
  """Answers lines of standard input until it ends."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the whole group; the other side decides
  _limit(resource.RLIMIT_CORE, 0)
  _limit(resource.RLIMIT_AS, MEMORY)
  template = None
  for line in sys.stdin.buffer:
    request = json.loads(line)
    if template is None:
      seconds = request["seconds"]
      try:
        template, found = Template(request["template"], request["tokens"], request["most"]), {}
      except Exception as e:  # jinja2's own errors, and those of compiling what it made
        found = {"invalid": str(e) or type(e).__name__}
    else:
      used = resource.getrusage(resource.RUSAGE_SELF)
      _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds))
      found = answer(template, request)
    sys.stdout.buffer.write(json.dumps(found).encode() + b"\n")
    sys.stdout.buffer.flush()


def _limit(kind: int, value: int) -> None:
  """Sets a soft limit, which can be raised again, where the system has it and allows so much."""
  hard = resource.getrlimit(kind)[1]
  try:
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
  except (OSError, ValueError):
    pass


if __name__ == "__main__":
  serve()
