"""Print and parse: ``parse(show(m), m.arrays()) == m``; errors point at the line with a caret."""

from __future__ import annotations

import functools
import json
import math
import re
import types as python_types
import typing
from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib.resources import files
from typing import Any

import attrs
import lark

from spir.discovery import find
from spir.errors import error, located, unknown
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.types import Current, Encoding, Int, Real, Scale, Spikes, Tensor

_DIGITS = 1000
_SWITCH = {"on": True, "off": False}


def show(module: Module) -> str:
    """The module as text."""
    lines = [f"  input %{module.input.name} : {module.input.type}"]
    lines += [f"  {show_node(node)}{_show_origin(node.origin)}" for node in module.nodes]
    return "\n".join(["module {", *lines, f"  output %{module.output}", "}"]) + "\n"


def show_node(node: Node) -> str:
    """One node without its origin; fields at their default are left out."""
    shown = []
    for field in attrs.fields(type(node.op)):
        value = getattr(node.op, field.name)
        if value != field.default:
            shown.append(f"{field.name} = {_show_field(node.result, field.name, value)}")
    fields = f" {{{', '.join(shown)}}}" if shown else ""
    return f"%{node.result} = {node.op.name} {', '.join(f'%{o}' for o in node.operands)}{fields} : {node.type}"


def _show_field(result: str, name: str, value: Any) -> str:
    if isinstance(value, Array):
        return f"@{result}.{name}#{value.digest}"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, float):
        return repr(float(value))  # a float64 of numpy prints its type
    return json.dumps(value) if isinstance(value, str) and not _bare(value) else str(value)


def _bare(value: str) -> bool:
    return value not in _SWITCH and re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", value) is not None


def _show_origin(origin: Origin) -> str:
    if not origin.path:
        return ""
    return f"  from {json.dumps(origin.path)}" + (f" {json.dumps(origin.place)}" if origin.place else "")


@functools.cache
def _grammar() -> lark.Lark:
    text = files("spir").joinpath("spir.lark").read_text(encoding="utf-8")
    return lark.Lark(text, parser="lalr", lexer="contextual", propagate_positions=True, maybe_placeholders=True)


def caret(lines: Sequence[str], line: int, column: int) -> str:
    """``line 3`` with the line and a caret below the column (both count from 1)."""
    shown = lines[min(line, len(lines)) - 1]
    start = max(0, column - 60)
    return f"line {line}\n{shown[start : start + 110]}\n{' ' * (column - 1 - start)}^"


def parse_with(grammar: lark.Lark, text: str, code: str) -> lark.Tree[lark.Token]:
    """The syntax tree.

    Raises:
        SpirError: of ``code``, at the first token that does not fit, with what would.
    """
    try:
        return grammar.parse(text)
    except lark.exceptions.UnexpectedInput as refusal:
        expected = getattr(refusal, "accepts", None) or getattr(refusal, "allowed", None) or ()
        fix = f"expected {' or '.join(sorted(_terminal(grammar, name) for name in expected))}" if expected else ""
        end = isinstance(refusal, lark.exceptions.UnexpectedToken) and refusal.token.type == "$END"
        line, column = refusal.line, refusal.column
        lines = text.rstrip(" \t\f\r\n").split("\n")  # what the grammar calls blank
        if end or line < 1:
            line, column = len(lines), len(lines[-1]) + 1
        found = "the end of the text" if end else repr(lines[line - 1][column - 1 :][:12].split(" ")[0])
        raise error(code, f"did not expect {found}", at=caret(text.split("\n"), line, column), fix=fix) from None


def _terminal(grammar: lark.Lark, name: str) -> str:
    if name in ("$END", "<END-OF-FILE>"):
        return "the end of the text"
    pattern = next((t.pattern for t in grammar.terminals if t.name == name), None)
    return f"'{pattern.value}'" if isinstance(pattern, lark.lexer.PatternStr) else name.lower()


def parse(text: str, weights: Mapping[str, Array] | None = None) -> Module:
    """The module that ``text`` describes.

    Args:
        text: what `show` prints.
        weights: arrays under their printed names; without them the module compares and prints, but does not run.

    Raises:
        SpirError[syntax], SpirError[name], SpirError[module], SpirError[type], SpirError[weights]: each with its line.
    """
    tree = parse_with(_grammar(), text, "syntax")
    entry, *nodes, output = typing.cast("list[lark.Tree[lark.Token]]", tree.children)
    reader = _Reader(tuple(text.split("\n")), weights)
    name, declared = entry.children
    result = Value(str(name)[1:], reader.type(declared))
    known = {result.name: result.type}
    read = tuple(reader.node(node, known) for node in nodes)
    target = str(output.children[0])[1:]
    if target not in known:
        refusal = unknown("value called", f"%{target}", (f"%{n}" for n in known), code="module")
        raise refusal.note("at", reader.at(output.children[0]))
    return Module(result, read, target)


@attrs.frozen
class _Reader:
    lines: Sequence[str]
    weights: Mapping[str, Array] | None

    def node(self, tree: Any, known: dict[str, Tensor]) -> Node:
        """One line, checked against what stands above it; its type joins ``known``."""
        head, word, *rest = tree.children
        operands = [t for t in rest if isinstance(t, lark.Token) and t.type == "VALUE"]
        fields = [t for t in rest if isinstance(t, lark.Tree) and t.data == "field"]
        declared = next(t for t in rest if isinstance(t, lark.Tree) and t.data == "type")
        source = next((t for t in rest if isinstance(t, lark.Tree) and t.data == "origin"), None)
        result = str(head)[1:]
        if result in known:
            raise error("module", f"{head} is defined twice", at=self.at(head), fix="rename one of them")
        for operand in operands:
            if str(operand)[1:] not in known:
                refusal = unknown("value called", str(operand), (f"%{n}" for n in known), code="module")
                raise refusal.note("at", self.at(operand))
        with located(at=self.at(word)):
            owner = find("ops", str(word))
        op = self.op(owner, word, fields)
        spelled = self.type(declared)
        path, place = [self.string(t) if t else "" for t in source.children] if source else ("", "")
        names = tuple(str(o)[1:] for o in operands)
        found = spelled
        if all(a.data is not None for a in op.arrays().values()) and all(known[n].known for n in names):
            with located(at=self.at(word), from_=str(Origin(path, place))):
                found = infer(op, tuple(known[n] for n in names))
            if found != spelled:
                raise error("type", f"{head} is {found}, and the text says {spelled}", at=self.at(declared))
        known[result] = found
        return Node(result, op, names, found, Origin(path, place))

    def op(self, owner: type[Op], word: Any, fields: list[Any]) -> Op:
        """An op from its fields."""
        known = {a.name: a for a in attrs.fields(owner)}
        hints = typing.get_type_hints(owner)
        values: dict[str, Any] = {}
        for field in fields:
            label, value = field.children
            with located(at=self.at(label)):
                if str(label) not in known:
                    raise unknown(f"field of {owner.name} called", str(label), known, code="module")
                if str(label) in values:
                    raise error("module", f"{owner.name} is given {label} twice")
                values[str(label)] = self.field(value, hints[str(label)], f"{owner.name}.{label}")
        missing = [n for n, a in known.items() if a.default is attrs.NOTHING and n not in values]
        if missing:
            raise error("module", f"{owner.name} needs {' and '.join(missing)}", at=self.at(word))
        return owner(**values)

    def field(self, value: Any, hint: Any, label: str) -> Any:
        """A field's value, of the kind that its op declares."""
        kinds = typing.get_args(hint) if isinstance(hint, python_types.UnionType) else (hint,)
        if isinstance(value, lark.Tree):
            read: Any = tuple(self.whole(t) for t in value.children if t is not None)
        elif value.type == "ARRAY":
            read = self.array(str(value))
        elif value.type == "STRING":
            read = self.string(value)
        elif value.type == "WORD":
            read = _SWITCH.get(str(value), str(value))
        elif value.type == "FLOAT" or float in kinds:
            read = float(value)
            if not math.isfinite(read):
                raise error("module", f"{label} = {value} is no finite float64")
        else:
            read = self.whole(value)
        wanted = [typing.get_origin(k) or k for k in kinds]
        if type(read) not in wanted:
            names = " or ".join(k.__name__ for k in wanted if k is not type(None))
            raise error("module", f"{label} takes {names}, not {type(read).__name__}")
        lengths = [len(a) for k in kinds if ... not in (a := typing.get_args(k)) and a]
        if isinstance(read, tuple) and lengths and len(read) not in lengths:
            raise error("module", f"{label} takes {lengths[0]} integers, not {len(read)}")
        return read

    def whole(self, text: Any) -> int:
        """An integer."""
        if len(text) > _DIGITS:
            raise error("syntax", f"a number of {len(text)} digits, and {_DIGITS} are the most", fix="a smaller number")
        return int(text)

    def string(self, token: Any) -> str:
        """What stands between quotes."""
        try:
            return str(json.loads(token))
        except json.JSONDecodeError as refusal:
            raise error(
                "syntax",
                f"a string that does not read: {refusal.msg.lower()}",
                at=self.at(token),
                fix="write strings as JSON does: \\\\ is a backslash",
            ) from None

    def array(self, text: str) -> Array:
        """The array behind ``@name#digest``."""
        name, digest = text[1:].split("#")
        if self.weights is None:
            return Array(digest)
        if name not in self.weights:
            raise error("weights", f"there is no array @{name} in the weights", fix="give the weights of this module")
        array = self.weights[name]
        if array.digest != digest:
            raise error(
                "weights",
                f"the array @{name} has digest #{array.digest}, and the text was written for #{digest}",
                fix="give the weights that were saved with this text",
            )
        return array

    def type(self, tree: Any) -> Tensor:
        """A type annotation."""
        shape, encoding = tree.children
        with located(at=self.at(tree)):
            return Tensor(tuple(self.whole(d) for d in str(shape).split("x")), self.encoding(encoding))

    def encoding(self, tree: Any) -> Encoding:
        """The encoding inside a type."""
        if tree.data == "real":
            return Real()
        *head, last = tree.children
        scale = self.scale(last)
        if tree.data == "integer":
            return Int(self.whole(head[0]), self.whole(head[1]), scale)
        steps, code, value, *frame = head
        lo, hi = self.ends(value)
        if tree.data == "spikes":
            net = None if frame[0] is None else self.ends(frame[0])
            return Spikes(self.whole(steps), str(code), lo, hi, scale, net)
        low, high = self.ends(frame[0])
        return Current(self.whole(steps), str(code), lo, hi, low, high, scale)

    def ends(self, token: Any) -> tuple[int, int]:
        """A range ``lo..hi``."""
        low, high = (self.whole(end) for end in str(token).split(".."))
        return low, high

    def scale(self, tree: Any) -> Scale:
        """A scale, or the digest of one per channel."""
        first, *rest = tree.children
        if rest:
            size = self.whole(first)
            if size < 2:
                raise error("type", f"a scale per channel has two or more channels, not {size}")
            return Scale(size, str(rest[0])[1:])
        if "/" not in first and not first.isdigit():
            return Scale.of(float(first))
        above, _, below = str(first).partition("/")
        divisor = self.whole(below or "1")
        if not divisor:
            raise error("type", f"a scale is a positive finite number, not {first}")
        return Scale.of(Fraction(self.whole(above), divisor))

    def at(self, where: Any) -> str:
        """The line with a caret."""
        place = where.meta if isinstance(where, lark.Tree) else where
        return caret(self.lines, place.line, place.column)
