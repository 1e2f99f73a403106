"""Refuse in a kernel's text what Metal refuses and a C++ compiler would let pass.

The emulator compiles Metal as C++14, so C++ features that Metal lacks would go unnoticed until a Mac sees them. This
pass finds them in the text. It is deliberately plain: one rule, one pattern, on the text without comments.

A body stands inside the kernel function that MLX writes around it; a header stands before it, at file scope.

Source: Metal Shading Language Specification 3.2, sections 1.4 (restrictions), 4 (address spaces).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_SCALARS = (
    r"bool|char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float|u?int(?:8|16|32|64)_t|b?float16_t|size_t"
)
_TYPES = rf"(?:{_SCALARS})[234]?"
_SPACES = ("device", "constant", "thread", "threadgroup")


@dataclass(frozen=True)
class Finding:
    """One violation: the line (from 1) and the rule it breaks."""

    line: int
    rule: str


class LintError(ValueError):
    """A kernel's text holds something that Metal refuses; ``findings`` lists all of it."""

    def __init__(self, name: str, findings: tuple[Finding, ...]):
        self.findings = findings
        super().__init__("; ".join(f"{name}.metal:{f.line}: {f.rule}" for f in findings))


_FORBIDDEN: dict[str, str] = {
    r"\b(?:long\s+)?double\b": "double: Metal has no 64-bit float",
    r"\d\.\d*(?![\d.]*[fFhH])(?![\w.])": "a literal without f or h is a double",
    r"\btry\b|\bcatch\b|\bthrow\b": "exceptions are not in Metal",
    r"\bnew\b|\bdelete\b|\bmalloc\b|\bfree\s*\(": "Metal cannot allocate memory",
    r"\bgoto\b": "goto is not in Metal",
    r"\bvirtual\b|\bdynamic_cast\b|\btypeid\b": "virtual functions and type information are not in Metal",
    r"\bthread_local\b|\bregister\b|\bnoexcept\b": "thread_local, register and noexcept are not in Metal",
    r"\bstatic\s+(?!const|inline|METAL_FUNC)\w+\s+\w+\s*[=;\[]": "a static variable needs the constant address space",
    r"\[[&=]?\w*\]\s*\([^)]*\)\s*(?:->\s*\w+\s*)?\{": "lambda expressions are not in Metal",
    r"\bstd::": "the C++ standard library is not in Metal",
    r"#\s*include\s*[<\"](?!metal_)": "only metal_* headers can be included",
    r"\bif\s+constexpr\b|\binline\s+constexpr\b": "C++17: Metal follows C++14",
    r"\bauto\s*\[": "structured bindings are C++17",
    r"\bprintf\s*\(|\bassert\s*\(": "printf and assert are not in Metal",
    r"\bquad_\w+\s*\(": "the emulator has no quadgroup functions",
    r"\b__\w+": "a compiler's own names are not portable",
    r"\(\s*\*\s*(?:const\s+)?\w*\s*\)\s*\(": "function pointers are not in Metal",
}  # fmt: skip

_THREADGROUP_ARRAY = re.compile(rf"\bthreadgroup[ ](?:{_TYPES}|[A-Z]\w*)[ ]\w+\[[^\[\];]+\];")
_FILE_SCOPE_VARIABLE = re.compile(r"(?:^|[;}])\s*(?P<type>(?:\w+\s+)+)\w+\s*(?:\[[^\]]*\]\s*)*(?=[=;,])")
_NO_VARIABLE = ("using", "typedef", "struct", "class", "enum", "namespace")
_THREADGROUP_VARIABLE = re.compile(r"\bthreadgroup\s+[\w:]+\s+\w+\s*[;=\[{(]")


def _blanked(pattern: str, text: str, flags: re.RegexFlag) -> str:
    """The text with what matches blanked out, line numbers kept."""
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match.group()), text, flags=flags)


def _without_comments(text: str) -> str:
    return _blanked(r"//[^\n]*|/\*.*?\*/", text, re.DOTALL)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _unqualified_pointers(text: str) -> Iterator[Finding]:
    named = re.findall(r"\b(?:typename|class|struct)\s+(\w+)", text)
    types = "|".join([_TYPES, "auto", *map(re.escape, named)])
    pattern = re.compile(rf"(?P<before>(?:\b\w+\s+)*)\b(?:{types})\s*(?P<mark>[*&])\s*(?:const\s+)?\w*\s*[,()=;\[>]")
    for match in pattern.finditer(text):
        words = match["before"].split()
        if not any(space in words for space in _SPACES):
            kind = "pointer" if match["mark"] == "*" else "reference"
            yield Finding(_line(text, match.start("mark")), f"a {kind} needs an address space")


def _functions(text: str) -> Iterator[tuple[str, str, int]]:
    """Name, body and position of each function defined in the text."""
    for match in re.finditer(r"\b(\w+)\s*\(([^(){};]*)\)\s*(?:const\s*)?\{", text):
        if match[1] in ("if", "for", "while", "switch"):
            continue
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield match[1], text[match.end() : end], match.start()


def _file_scope(text: str) -> Iterator[Finding]:
    """Variables of a header outside of every function, in another address space than constant."""
    code = _blanked(r"^\s*#.*|\btemplate\s*<[^>]*>", text, re.MULTILINE)
    depth, outside = 0, []
    for character in code:  # what stands in brackets is blanked out, the outermost brackets stay
        depth -= character in ")}"
        outside.append(character if depth == 0 or character == "\n" else " ")
        depth += character in "({"
    code = "".join(outside)
    for match in _FILE_SCOPE_VARIABLE.finditer(code):
        words = match["type"].split()
        if words[0] not in _NO_VARIABLE and "constant" not in words:
            yield Finding(_line(code, match.start("type")), "a variable at file scope needs the constant address space")


def _threadgroup_in_functions(text: str) -> Iterator[Finding]:
    for _, body, position in _functions(text):
        if _THREADGROUP_VARIABLE.search(body):
            yield Finding(_line(text, position), "only the kernel itself can declare threadgroup memory")


def _recursion(text: str) -> Iterator[Finding]:
    functions = list(_functions(text))
    calls = {
        name: {other for other, _, _ in functions if re.search(rf"\b{other}\s*(?:<[^;(){{}}]*>)?\(", body)}
        for name, body, _ in functions
    }
    for name, _, position in functions:
        reached, frontier = set[str](), calls[name]
        while frontier:
            reached |= frontier
            frontier = {callee for caller in frontier for callee in calls[caller]} - reached
        if name in reached:
            yield Finding(_line(text, position), f"recursion: {name} reaches itself")


def findings(text: str, *, header: bool = False) -> tuple[Finding, ...]:
    """Everything in a kernel's body, or in a ``header``, that Metal refuses, in the order of the lines."""
    code = _without_comments(text)
    refused = [
        Finding(_line(code, match.start()), rule)
        for pattern, rule in _FORBIDDEN.items()
        for match in re.finditer(pattern, code)
    ]
    plain = {match.start() for match in _THREADGROUP_ARRAY.finditer(code)}
    refused += [
        Finding(_line(code, match.start()), "declare threadgroup memory as: threadgroup type name[count];")
        for match in _THREADGROUP_VARIABLE.finditer(code)
        if match.start() not in plain
    ]
    refused += _unqualified_pointers(code)
    refused += _threadgroup_in_functions(code)
    refused += _file_scope(code) if header else ()
    refused += _recursion(code)
    return tuple(sorted(set(refused), key=lambda finding: (finding.line, finding.rule)))


def check(name: str, text: str, *, header: bool = False) -> None:
    """Raise :class:`LintError` unless ``text`` is free of :func:`findings`."""
    refused = findings(text, header=header)
    if refused:
        raise LintError(name, refused)
