"""Mutants of a module: one small change each, named so that changes elsewhere keep the name.

Only bodies of functions are changed. Texts of errors, assertions, annotations and default values
are left alone: no behaviour that a rule speaks of hangs on them. Conditions are fixed to true and
to false instead of being negated: a test that notices either of these notices the negation too.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType

Function = ast.FunctionDef | ast.AsyncFunctionDef

_BOUNDARY: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
_NEGATED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
_REMOVABLE = (
    ast.Assign,
    ast.AnnAssign,
    ast.AugAssign,
    ast.Break,
    ast.Continue,
    ast.Delete,
    ast.Expr,
    ast.Raise,
    ast.Return,
)
#: Names of functions that are taken for one another.
_TWINS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
#: Codes that programs compare; longer texts are for people.
_CODE = re.compile(r"[a-z]+(_[a-z]+)*")
_CHANGE_CHARS_MAX = 160


@dataclass(frozen=True)
class Mutant:
    """``id`` is ``module:function:operator:number``, the number counted within its function.
    ``change`` is what a person reads, and what shows that an id still means the same. ``digest``
    stands for the whole function: another one, and an old result no longer counts."""

    id: str
    module: str
    function: str
    line: int
    change: str
    digest: str


@dataclass(frozen=True)
class _Site:
    operator: str
    line: int
    change: str
    apply: Callable[[], None]
    undo: Callable[[], None]


@dataclass(frozen=True)
class _Place:
    """Where a node hangs in the tree."""

    node: ast.AST
    parent: ast.AST
    field: str
    index: int | None
    condition: bool

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def mutants(source: str, module: str) -> Iterator[Mutant]:
    """Every mutant of the functions of ``source``, in the order of its text."""
    for name, function in _functions(ast.parse(source).body, ""):
        digest = hashlib.sha256(ast.dump(function).encode()).hexdigest()[:16]
        numbers: Counter[str] = Counter()
        seen = {ast.unparse(function)}
        for site in _sites(function):
            numbers[site.operator] += 1
            # Two ways to the same text are one mutant.
            site.apply()
            text = ast.unparse(function)
            site.undo()
            if text in seen:
                continue
            seen.add(text)
            number = numbers[site.operator]
            identity = f"{module}:{name}:{site.operator}:{number}"
            yield Mutant(identity, module, name, site.line, site.change, digest)


def mutated_code(source: str, filename: str, mutant: Mutant) -> CodeType:
    """The code of the mutant's function, with the change in it."""
    _, name, operator, number = mutant.id.rsplit(":", 3)
    tree = ast.parse(source)
    function = dict(_functions(tree.body, ""))[name]
    matching = [site for site in _sites(function) if site.operator == operator]
    matching[int(number) - 1].apply()
    code = compile(ast.fix_missing_locations(tree), filename, "exec", dont_inherit=True)
    return _find_code(code, name)


def _functions(body: Iterable[ast.stmt], prefix: str) -> Iterator[tuple[str, Function]]:
    """Outermost functions and methods; what is nested in them belongs to them."""
    for statement in body:
        if isinstance(statement, Function):
            yield prefix + statement.name, statement
        elif isinstance(statement, ast.ClassDef):
            yield from _functions(statement.body, f"{prefix}{statement.name}.")


def _find_code(code: CodeType, name: str) -> CodeType:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_qualname == name:
                return constant
            if name.startswith(constant.co_qualname + "."):
                return _find_code(constant, name)
    raise LookupError(f"there is no function {name}")


# ---------------------------------------------------------------- where, and what


def _sites(function: Function) -> list[_Site]:
    found: list[_Site] = []
    for place in _places(function):
        line = getattr(place.node, "lineno", function.lineno)
        for operator, new in _changes(place, function):
            change = f"{_shown(place.node)} -> {_shown(new)}"
            ast.copy_location(new, place.node)
            found.append(
                _Site(
                    operator, line, change, partial(place.put, new), partial(place.put, place.node)
                )
            )
    return found


def _shown(node: ast.AST) -> str:
    if isinstance(node, ast.Pass):
        return "nothing"
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= _CHANGE_CHARS_MAX else text[:_CHANGE_CHARS_MAX] + "…"


def _places(function: Function) -> Iterator[_Place]:
    for index, statement in enumerate(function.body):
        if not _is_text(statement):
            yield from _below(_Place(statement, function, "body", index, False))


def _below(place: _Place) -> Iterator[_Place]:
    node = place.node
    if isinstance(node, ast.Assert | ast.JoinedStr | ast.arguments | ast.cmpop | ast.operator):
        return
    yield place
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "ctx", "op"):
            continue
        condition = _is_condition(place, name)
        nodes = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for index, child in nodes:
            if isinstance(child, ast.AST) and not _is_text(child):
                yield from _below(_Place(child, node, name, index, condition))


def _is_condition(place: _Place, field: str) -> bool:
    """Whether the node's ``field`` decides where the program goes on."""
    node = place.node
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        return field == "test"
    if isinstance(node, ast.comprehension):
        return field == "ifs"
    return place.condition and isinstance(node, ast.BoolOp | ast.UnaryOp)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _changes(place: _Place, function: Function) -> Iterator[tuple[str, ast.AST]]:
    node = place.node
    if isinstance(node, ast.stmt):
        yield from _statement(node, node is function.body[-1])
    if isinstance(node, ast.expr) and place.condition:
        yield from _condition(place)
    if isinstance(node, ast.Compare):
        yield from _compare(node, place.condition)
    elif isinstance(node, ast.BoolOp):
        yield from _boolean(node)
    elif isinstance(node, ast.UnaryOp):
        yield from _unary(node, place.condition)
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        yield "arithmetic", ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.Constant):
        yield from _constant(node, place)
    elif isinstance(node, ast.Call):
        yield from _call(node)
    elif isinstance(node, ast.Slice):
        yield from _slice(node)


def _statement(node: ast.stmt, last: bool) -> Iterator[tuple[str, ast.stmt]]:
    if isinstance(node, ast.Return):
        if node.value is not None and not _is_none(node.value):
            yield "return", ast.Return(ast.Constant(None))
    says_nothing = isinstance(node, ast.AnnAssign) and node.value is None
    ends_anyway = last and isinstance(node, ast.Return)
    if isinstance(node, _REMOVABLE) and not says_nothing and not ends_anyway:
        yield "remove", ast.Pass()
    if isinstance(node, ast.Continue):
        yield "jump", ast.Break()
    elif isinstance(node, ast.Break):
        yield "jump", ast.Continue()
    elif isinstance(node, ast.AugAssign) and type(node.op) in _ARITHMETIC:
        op = _ARITHMETIC[type(node.op)]()
        yield "arithmetic", ast.AugAssign(node.target, op, node.value)


def _condition(place: _Place) -> Iterator[tuple[str, ast.expr]]:
    # Of a part of ``and``, ``or`` and ``not`` it is the same as of the whole, or as leaving it out.
    if isinstance(place.parent, ast.BoolOp | ast.UnaryOp) or isinstance(place.node, ast.Constant):
        return
    if not isinstance(place.parent, ast.While):
        yield "always", ast.Constant(True)
    yield "never", ast.Constant(False)


def _compare(node: ast.Compare, condition: bool) -> Iterator[tuple[str, ast.expr]]:
    for index, op in enumerate(node.ops):
        swaps = [("boundary", _BOUNDARY)]
        if not condition or len(node.ops) > 1:
            swaps.append(("negate", _NEGATED))
        for operator, table in swaps:
            if type(op) in table:
                ops = [*node.ops[:index], table[type(op)](), *node.ops[index + 1 :]]
                yield operator, ast.Compare(node.left, ops, node.comparators)


def _boolean(node: ast.BoolOp) -> Iterator[tuple[str, ast.expr]]:
    other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield "andor", ast.BoolOp(other, node.values)
    for index in range(len(node.values)):
        left = [*node.values[:index], *node.values[index + 1 :]]
        yield "operand", left[0] if len(left) == 1 else ast.BoolOp(node.op, left)


def _unary(node: ast.UnaryOp, condition: bool) -> Iterator[tuple[str, ast.expr]]:
    if not (condition and isinstance(node.op, ast.Not)):
        yield "unary", node.operand


def _constant(node: ast.Constant, place: _Place) -> Iterator[tuple[str, ast.expr]]:
    value = node.value
    if isinstance(place.parent, ast.keyword) and place.parent.arg == "strict":
        return  # of ``zip``: an assertion like others
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int):
        yield "constant", ast.Constant(value + 1)
        if value > 0:
            yield "constant", ast.Constant(value - 1)
    elif isinstance(value, str) and _CODE.fullmatch(value):
        if not isinstance(place.parent, ast.FormattedValue):
            yield "code", ast.Constant(value + "_")


def _call(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node.func, ast.Name) and node.func.id in _TWINS:
        twin = ast.Name(_TWINS[node.func.id], ast.Load())
        keywords = [] if twin.id == "list" else node.keywords
        yield "twin", ast.Call(twin, node.args, keywords)
        if twin.id in ("min", "max"):
            return
    for index in range(len(node.args) - 1):
        pair = node.args[index : index + 2]
        if all(isinstance(arg, ast.Name | ast.Attribute | ast.Constant) for arg in pair):
            args = [*node.args[:index], *reversed(pair), *node.args[index + 2 :]]
            yield "swap", ast.Call(node.func, args, node.keywords)


def _slice(node: ast.Slice) -> Iterator[tuple[str, ast.AST]]:
    for bound in ("lower", "upper", "step"):
        if getattr(node, bound) is not None:
            left = {name: getattr(node, name) for name in ("lower", "upper", "step")}
            yield "slice", ast.Slice(**(left | {bound: None}))


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
