"""Chat templates, which are programs that came with a checkpoint, within bounds of time and memory.

Jinja's sandbox keeps a template from the machine. It does not keep it from running for hours, or
from building a text of 100 GB in one expression. Here every loop, macro, call, filter, operator
and output looks at the clock, and is charged for what it makes before it makes it.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from mlx_dgemma.errors import CheckpointError, InputError

SECONDS = 8.0  # of a rendering; a conversation of 1,000 messages takes half of it
_LEAST = 16 << 20  # bytes that a rendering may build, however short its input
_PER_CHARACTER = 128  # and for each character of it
_MOST_SOURCE = 1 << 20
_WIDEST = 10_000  # characters to pad or wrap to, items of a batch
_WIDTH = re.compile(r"\*|\d{5,}|\{[^{}]*\{")  # given as an argument, or large
_STRIDE = 100  # values between two looks at the clock
_PIECE = 64  # bytes of a short text of its own
_WIDTH_TAKERS = frozenset(
    {"batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice", "to_bytes",
     "wordwrap", "zfill"}
)  # fmt: skip


class TemplateLimitError(Exception):
    """The template ran too long or built too much."""


class _Left(threading.local):
    """What the rendering on this thread may still take."""

    deadline = float("inf")  # of this thread's own time: other work must not count
    room = float("inf")
    ticks = 0

    def tick(self) -> None:
        self.ticks += 1
        if self.ticks % 16 == 0 and time.thread_time() > self.deadline:
            raise TemplateLimitError(f"it ran for more than {SECONDS:g} seconds")

    def build(self, nbytes: float) -> None:
        self.tick()
        self.room -= nbytes
        if self.room < 0:
            raise TemplateLimitError("it builds too much text")


_left = _Left()


def render(source: str, origin: str, **variables: Any) -> str:
    """A template's text. origin: the file beside which it lies, for messages.

    Raises CheckpointError for a template that is none, and InputError for messages that it cannot
    render: mostly those that it complains of itself, and those with which it exceeds its bounds.
    """
    try:
        template = _compile(source)
    except Exception as error:  # of Jinja's parser, or of Python's compiler after it
        raise CheckpointError(
            f"The chat template beside {origin} is not valid Jinja: {_said(error)}."
        ) from error
    try:
        with _limited(variables):
            return template.render(**variables)
    except TemplateLimitError as error:
        raise InputError(
            f"The chat template beside {origin} was stopped, because {error}: send fewer messages, "
            "or take the template of the original repository."
        ) from error
    except Exception as error:
        # A template is a program over the caller's data: its complaints are about that data.
        raise InputError(
            f"The chat template cannot render these messages: {_said(error)}."
        ) from error


def check_template(source: str) -> None:
    """InputError for a template that is none."""
    try:
        _compile(source)
    except Exception as error:
        raise InputError(f"The chat template given is not valid Jinja: {_said(error)}.") from error


@contextmanager
def _limited(variables: Mapping[str, Any]) -> Iterator[None]:
    size = weight(variables)
    _left.deadline = time.thread_time() + SECONDS
    _left.room = _LEAST + _PER_CHARACTER * size
    try:
        yield
    finally:
        _left.deadline = _left.room = float("inf")


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text[:300] or type(error).__name__


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    if len(source) > _MOST_SOURCE:
        raise TemplateLimitError(f"it is longer than {_MOST_SOURCE:,} characters")
    return _Environment().from_string(source)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox and the settings with which chat templates are written to run."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols],
            optimized=False,  # nothing is computed while compiling, where no limits hold
            finalize=_output,
        )
        self.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        self.filters = {name: _charged(name, made) for name, made in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        del self.globals["lipsum"]

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        kept = []
        for part in parts:
            _left.build(len(part))
            kept.append(part)
        return "".join(kept)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        whole = _Charging().visit(super()._parse(source, name, filename))
        assert isinstance(whole, nodes.Template)
        return whole

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _left.build(_made_by(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if function is tick or function is watched:
            _left.tick()
            return function(*args)
        # The sandbox wraps `str.format`.
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        values = [*args, *kwargs.values()]
        if isinstance(owner, str | bytes | int):
            values.insert(0, owner)
        _charge_call(getattr(function, "__name__", ""), values)
        return super().call(context, function, *args, **kwargs)


class _Charging(NodeTransformer):
    """Makes loops, macros, joined texts and literals of a template say what they do."""

    def get_visitor(self, node: nodes.Node) -> Callable[..., nodes.Node] | None:
        visitors: dict[type[nodes.Node], Callable[..., nodes.Node]] = {
            nodes.For: self._watching,
            nodes.Macro: self._ticking,
            nodes.CallBlock: self._ticking,
            nodes.Concat: self._joining,
            nodes.List: self._counted,
            nodes.Tuple: self._counted,
            nodes.Dict: self._counted,
        }
        return visitors.get(type(node))

    def _watching(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _called("watched", node.iter)
        kept: nodes.Node = node
        return kept

    def _ticking(self, node: Any) -> nodes.Node:
        inside: nodes.Node = self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_called("tick"), lineno=node.lineno))
        return inside

    def _joining(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _called("concat", *node.nodes)

    def _counted(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") == "load":
            return _called("charge", node)
        kept: nodes.Node = node  # names to assign to
        return kept


def _called(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.ImportedName(f"{__name__}.{name}"), list(arguments), [], None, None)


def tick() -> None:
    """In every macro; `call` looks at the clock instead."""


def watched(items: Iterable[Any]) -> Iterator[Any]:
    """What a loop goes through."""
    for number, item in enumerate(items):
        if number % 16 == 0:
            _left.tick()
        yield item


def charge(value: Any) -> Any:
    """A literal, whose parts were charged as arguments of this call."""
    return value


def concat(*values: Any) -> str:
    """Jinja's `~`."""
    return "".join(map(str, values))


def weight(value: Any) -> int:
    """Characters and items of a value, counted as often as it holds them: what a text of it
    would take. TemplateLimitError beyond what may be built."""
    if isinstance(value, str):
        return len(value) + 1
    total, seen, waiting = 0, 0, [value]
    while waiting:
        one = waiting.pop()
        total += 1
        if isinstance(one, str | bytes | range):
            total += len(one)
        elif isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
        elif isinstance(one, Namespace):
            waiting.append(object.__getattribute__(one, "_Namespace__attrs"))
        elif isinstance(one, int):
            total += one.bit_length() // 8
        if total > _left.room:
            raise TemplateLimitError("it builds too much text")
        seen += 1
        if seen % _STRIDE == 0:
            _left.tick()
    return total


def _output(value: Any) -> Any:
    """What a template writes; Jinja then makes it text."""
    _left.build(weight(value))
    return value


def _charged(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(made)
    def charged(*args: Any, **kwargs: Any) -> Any:
        # Filters such as `join` get the environment first, and may get what `map` will make.
        args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
        _charge_call(name, [*args, *kwargs.values()])
        return made(*args, **kwargs)

    return charged


def _charge_call(name: str, values: list[Any]) -> None:
    """Charges a call for its arguments, and for what the methods that multiply them make."""
    _left.build(sum(map(weight, values)))
    texts = [value for value in values if isinstance(value, str | bytes)]
    numbers = [value for value in values if isinstance(value, int)]
    width = max(map(abs, numbers), default=0)
    if name in _WIDTH_TAKERS and width > _WIDEST:
        raise TemplateLimitError(f"it asks {name} for more than {_WIDEST}")
    if name in _WIDTH_TAKERS:
        _left.build(width)
    if not texts:
        return
    text: Any = texts[0]
    if "format" in name:
        _check_widths(texts)
    elif name == "replace" and len(texts) > 2:
        found: Any = texts[1]
        _left.build((text.count(found) if found else len(text) + 1) * len(texts[2]))
    elif name in ("indent", "expandtabs", "wordwrap", "translate"):
        _left.build(len(text) * max(1, width, *(weight(v) for v in values[1:])))
    elif name == "join":
        _left.build(len(texts[-1] if len(values) > 1 else text) * weight(values))
    elif "split" in name or name in ("list", "urlize", "striptags", "title", "wordcount"):
        _left.build(_PIECE * len(text) // 8)


def _check_widths(texts: list[Any]) -> None:
    for text in texts:
        if isinstance(text, str) and _WIDTH.search(text):
            raise TemplateLimitError("it asks for a very wide format")


def _made_by(operator: str, left: Any, right: Any) -> int:
    """Bytes that an operator's result takes, at most."""
    if operator == "%" and isinstance(left, str | bytes):
        if isinstance(left, str):
            _check_widths([left])
        return weight(left) + 8 * weight(right)
    if operator == "**":
        exponent = right if isinstance(right, int) else 1
        return left.bit_length() * max(exponent, 0) // 8 if isinstance(left, int) else 8
    if operator == "*":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, int) and not isinstance(other, int | float):
                return max(one, 0) * weight(other)
    return weight(left) + weight(right)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
