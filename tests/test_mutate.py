"""The mutants that ``make mutate`` draws from."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutate.find import find
from mutate.parts import PARTS, ROOT

CPP = """#ifdef PIXCONTRAST_WITH_CUDA
int hidden() { return 1 + 2; }
#endif
template <class T>
void f(const T* a, int n) {
  // a + b
  for (int i = 0; i < n && !a; ++i) {
    sum += std::min(a[i], 3.0f);
    __syncthreads();
    log("a < b");
  }
}
"""


def changed(name: str, text: str) -> set[tuple[str, str, str]]:
    return {(mutant.kind, mutant.old, mutant.new) for mutant in find(name, text)}


def test_operators_bounds_constants_barriers_and_statements_of_cpp() -> None:
    found = changed("x.cpp", CPP)
    assert found == {
        ("comparison", "<", "<="), ("logic", "&&", "||"), ("logic", "!", ""), ("assignment", "+=", "-="),
        ("bound", "min", "max"), ("constant", "0", "1"), ("constant", "3.0f", "(2 * 3.0f)"),
        ("barrier", "__syncthreads();", ";"), ("statement", "sum += std::min(a[i], 3.0f);", ";"),
        ("statement", 'log("a < b");', ";"),
    }  # fmt: skip


def test_those_of_python_leave_messages_and_types_alone() -> None:
    text = '"""1 + 1"""\ndef f(a: list[int], b=2):\n    if a and b < 3:\n        raise ValueError(f"{a + 1}")\n'
    text += "    a[0] = max(a)\n"
    assert {old for _, old, _ in changed("x.py", text)} == {
        "2",
        "and",
        "<",
        "3",
        "a and b < 3",
        "a[0] = max(a)",
        "0",
        "max",
    }


@pytest.mark.parametrize("part", PARTS)
def test_every_mutant_changes_one_place_and_python_stays_python(part: str) -> None:
    for path in PARTS[part].files():
        text = (ROOT / path).read_text()
        for mutant in find(path.name, text)[::7]:
            result = mutant.apply(text)
            assert result != text
            if path.suffix == ".py":
                ast.parse(result)


def test_sources_have_tests_that_should_notice() -> None:
    without = {str(path) for part in PARTS.values() for path in part.files() if not part.tests(path)}
    assert all(Path(name).name in ("__init__.py", "__main__.py", "functional.py", "errors.py") for name in without), (
        without
    )
