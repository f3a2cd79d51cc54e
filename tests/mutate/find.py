"""Every mutant of a source file: one operator, bound, constant, barrier or statement that is changed."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "%": "*", "//": "*"}
COMPARISON = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
LOGIC = {"&&": "||", "||": "&&", "and": "or", "or": "and"}
ASSIGNMENT = {"+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "|=": "=", "&=": "="}
BOUND = {"min": "max", "max": "min", "fminf": "fmaxf", "fmaxf": "fminf"}
TRUTH = {"true": "false", "false": "true", "True": "False", "False": "True"}


@dataclass(frozen=True)
class Mutant:
    """``old`` at ``offset`` of the file's text becomes ``new``."""

    kind: str
    offset: int
    old: str
    new: str

    def apply(self, text: str) -> str:
        end = self.offset + len(self.old)
        if text[self.offset : end] != self.old:
            raise ValueError(f"no {self.old!r} at {self.offset}")
        return text[: self.offset] + self.new + text[end:]


def find(name: str, text: str) -> list[Mutant]:
    return list(of_python(text) if name.endswith(".py") else of_cpp(text))


def number(old: str) -> str:
    """Another number: integers one away, whatever else doubled."""
    if re.fullmatch(r"\d+", old):
        away = 1 if int(old) < 2 else random.Random(old).choice((-1, 1))
        return str(int(old) + away)
    return f"(2 * {old})" if float(old.rstrip("fF")) else old.replace("0", "1", 1)


# C++ and CUDA. clang-format puts blanks around binary operators and none into template arguments or types.
SILENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', re.DOTALL)
# not compiled here: CUDA in files of the CPU, the real CUDA in headers that the emulation shares
INACTIVE = re.compile(r"^#ifdef (?:PIXCONTRAST_WITH_CUDA|__CUDACC__)$.*?^#(?:else|endif)", re.DOTALL | re.MULTILINE)
DIRECTIVE = re.compile(r"^#(?:\\\n|[^\n])*", re.MULTILINE)
TOKENS = {
    "arithmetic": (re.compile(r"(?<= )[-+*/%](?=[ \n])"), ARITHMETIC),
    "comparison": (re.compile(r"(?<= )(?:<=|>=|==|!=|<|>)(?=[ \n])"), COMPARISON),
    "logic": (re.compile(r"(?<= )(?:&&|\|\|)(?=[ \n])"), LOGIC),
    "assignment": (re.compile(r"(?<= )[-+*/|&]=(?=[ \n])"), ASSIGNMENT),
    "bound": (re.compile(r"\b(?:min|max|fminf|fmaxf)\b(?=[(<])"), BOUND),
    "truth": (re.compile(r"\b(?:true|false)\b"), TRUTH),
}
NEGATION = re.compile(r"(?<=[( ])!(?=[\w(])")
NUMBER = re.compile(r"(?<![\w.])(?:\d+\.\d*(?:e-?\d+)?f?|\d+e-?\d+f?|\d+)(?![\w.])")
BARRIER = re.compile(r"\b(?:__syncthreads|__syncwarp|__threadfence|cu_cp_async_wait)\b(?:<[^;]*>)?\([^;]*?\);")
STATEMENT = re.compile(
    r"(?<=\n)[ ]+((?:[\w:.>\[\]()*-]+ [-+*/|&]?= |[\w:.>-]+(?:<[\w, :]+>)?\()[^;{}]*;|break;|continue;)"
)
DECLARED = re.compile(r"return|const|auto|using|static|delete|throw|template")


def blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def of_cpp(text: str) -> Iterator[Mutant]:
    code = SILENT.sub(blank, text)
    for pattern in (INACTIVE, DIRECTIVE):
        code = pattern.sub(blank, code)
    # a string leaves its quotes, so that an operator beside it is no sign
    for kind, (pattern, other) in TOKENS.items():
        for match in pattern.finditer(code):
            yield Mutant(kind, match.start(), match[0], other[match[0]])
    for match in NEGATION.finditer(code):
        yield Mutant("logic", match.start(), "!", "")
    for match in NUMBER.finditer(code):
        yield Mutant("constant", match.start(), match[0], number(match[0]))
    for match in BARRIER.finditer(code):
        yield Mutant("barrier", match.start(), text[match.start() : match.end()], ";")
    for match in STATEMENT.finditer(code):
        whole, before = text[match.start(1) : match.end(1)], code[: match.start()].rstrip()
        if before[-1:] in (";", "{", "}", ")", ":") and not DECLARED.match(whole) and not BARRIER.match(match[1]):
            yield Mutant("statement", match.start(1), whole, ";")


# Python
SIGNS: dict[type[ast.AST], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Lt: "<",
    ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.And: "and", ast.Or: "or",
}  # fmt: skip


class Python(ast.NodeVisitor):
    """Leaves out what only says something: annotations, docstrings, messages, text in ``/`` and ``%``."""

    def __init__(self, text: str) -> None:
        self.text, self.found = text, list[Mutant]()
        lines = text.encode().splitlines(keepends=True)
        self.starts = [sum(map(len, lines[:i])) for i in range(len(lines))]

    def at(self, line: int | None, column: int | None) -> int:
        assert line is not None and column is not None
        return len(self.text.encode()[: self.starts[line - 1] + column].decode())

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self.at(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt) -> int:
        return self.at(node.end_lineno, node.end_col_offset)

    def between(self, kind: str, left: ast.expr, right: ast.expr, sign: str, other: dict[str, str]) -> None:
        """The sign between two nodes, behind and before brackets."""
        start = self.end(left)
        match = re.search(
            rf"(?<![\w<>=]){re.escape(sign)}(?![\w<>=])|(?<=\)){re.escape(sign)}", self.text[start : self.start(right)]
        )
        if sign in other and match:
            self.found.append(Mutant(kind, start + match.start(), sign, other[sign]))

    def drop(self, node: ast.stmt) -> None:
        self.found.append(Mutant("statement", self.start(node), self.text[self.start(node) : self.end(node)], "pass"))

    def visit_BinOp(self, node: ast.BinOp) -> None:
        said = any(
            isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str)
            for side in (node.left, node.right)
        )
        if not said:
            self.between("arithmetic", node.left, node.right, SIGNS.get(type(node.op), "@"), ARITHMETIC)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, sign, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            self.between("comparison", left, right, SIGNS.get(type(sign), "is"), COMPARISON)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between("logic", left, right, SIGNS[type(node.op)], LOGIC)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self.found.append(
                Mutant("logic", self.start(node), "not", "bool" if self.text[self.start(node) + 3] == "(" else "")
            )
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if not isinstance(node.test, ast.Name) or node.test.id != "TYPE_CHECKING":
            old = self.text[self.start(node.test) : self.end(node.test)]
            self.found.append(Mutant("logic", self.start(node.test), old, f"not ({old})"))
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.between("assignment", node.target, node.value, SIGNS.get(type(node.op), "@") + "=", ASSIGNMENT)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        old = self.text[self.start(node) : self.end(node)]
        if isinstance(node.value, bool):
            self.found.append(Mutant("truth", self.start(node), old, TRUTH[old]))
        elif isinstance(node.value, (int, float)) and re.fullmatch(r"[\d.e-]+", old):
            self.found.append(Mutant("constant", self.start(node), old, number(old)))

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in BOUND:
            self.found.append(Mutant("bound", self.end(node.func) - len(name), name, BOUND[name]))
        if name != "print":
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, (ast.Constant, ast.Yield)):
            self.drop(node)
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
            self.drop(node)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None:
        pass

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not re.match(r"[A-Z]|list|dict|tuple|type", self.text[self.start(node) :]):  # a type
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for child in [*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body]:
            self.visit(child)


def of_python(text: str) -> Iterator[Mutant]:
    visitor = Python(text)
    visitor.visit(ast.parse(text))
    yield from visitor.found
