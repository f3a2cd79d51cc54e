"""``python -m mutate``: changes one place of the sources at a time and sees whether the tests notice.

Each part has a copy of the working tree in ``build/mutate``, which alone is changed. Results are added to the record,
and a later run goes on behind them. A mutant that no test noticed is judged in the record, under ``judged``:
``equivalent``, ``slower``, ``text`` (all three with a reason), or nothing: then a test is missing.
mutmut and cosmic-ray are for Python alone and have no place for kernels that are compiled, so this takes all parts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .find import Mutant, find
from .parts import PARTS, ROOT

RECORD = ROOT / "docs" / "reliability" / "mutants.jsonl"
NOT_COUNTED = ("equivalent", "slower", "text")
LIMIT = 600.0  # seconds of the tests of a mutant; one that hangs is noticed
MEMORY = 20 << 30  # of a process that runs tests: a mutant may ask for anything; the race checker reserves more


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def tracked() -> list[str]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return [
        name for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines() if (ROOT / name).is_file()
    ]


class Tree:
    """The copy of the working tree that the mutants of a part change."""

    def __init__(self, part: str) -> None:
        self.name, self.part, self.folder = part, PARTS[part], ROOT / "build" / "mutate" / part
        self.passed: set[str] = set()  # tests, without a mutant
        for name in tracked():
            to = self.folder / name
            to.parent.mkdir(parents=True, exist_ok=True)
            if not to.exists() or to.read_bytes() != (ROOT / name).read_bytes():
                shutil.copy(ROOT / name, to)
        if not (self.folder / ".venv").exists():
            (self.folder / ".venv").symlink_to((ROOT / ".venv").resolve())
        for library in [*(ROOT / "pixcontrast").glob("_C*.so"), ROOT / "pixcontrast" / "_built.py"]:
            shutil.copy2(library, self.folder / "pixcontrast" / library.name)
        self.part.build(self.folder)
        self.kept = self.folder.with_name(f"{part}-built")
        self.copy_built(self.folder, self.kept)

    def copy_built(self, source: Path, target: Path) -> None:
        """Objects with their times, so that the next mutant compiles nothing but itself."""
        for name in ("build", "pixcontrast"):
            shutil.rmtree(target / name, ignore_errors=True)
            if (source / name).exists():
                shutil.copytree(source / name, target / name)

    def test(self, tests: tuple[str, ...], limit: float | None = None) -> tuple[int | None, str]:
        """Exit status of pytest, ``None`` beyond the limit of seconds, and the end of what it said."""
        environment = os.environ | dict(self.part.environment) | {
            "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_WAIT_POLICY": "passive",
            "COLUMNS": "1000",  # so that pytest shortens no name of a test
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short", *tests]
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
            preexec_fn=None if self.name == "cuda" else limit_memory,
        )  # fmt: skip
        try:
            said = process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None, ""
        return process.returncode, said

    def passes(self, test: str) -> bool:
        """Whether a test passes without a mutant; only then it has noticed one."""
        if test not in self.passed and self.test((test,))[0] == 0:
            self.passed.add(test)
        return test in self.passed

    def verdict(self, path: Path, mutant: Mutant, tests: tuple[str, ...]) -> tuple[str, str]:
        """``noticed``, ``survived`` or ``no code``, and the test that noticed."""
        file = self.folder / path
        text, times = file.read_text(), (file.stat().st_atime, file.stat().st_mtime)
        try:
            file.write_text(mutant.apply(text))
            try:
                self.part.build(self.folder)
            except subprocess.CalledProcessError:
                return "no code", ""
            status, said = self.test(tests, LIMIT)
        finally:
            file.write_text(text)
            os.utime(file, times)
            self.copy_built(self.kept, self.folder)
        if "CompileError" in said:
            return "no code", ""
        if status == 0:
            return "survived", ""
        failed = [
            line.split(" - ")[0].split(" ", 1)[1]
            for line in said.splitlines()
            if line.startswith(("FAILED ", "ERROR "))
        ]
        by = failed[0] if failed else tests[0]
        if not self.passes(by.split("[")[0] if " " in by else by):
            sys.exit(f"{by} also fails without a mutant; with {mutant} in {path}:\n{said[-3000:]}")
        return "noticed", by if failed else "no end" if status is None else "the process ended"


def describe(part: str, path: Path, mutant: Mutant, text: str) -> dict[str, Any]:
    """Where a mutant is, so that it is found again when lines above it have changed."""
    first = text.rfind("\n", 0, mutant.offset) + 1
    line = text[first:].split("\n", 1)[0]
    above = text[:first].split("\n")
    return {
        "part": part, "file": str(path), "line": len(above), "kind": mutant.kind, "old": mutant.old, "new": mutant.new,
        "text": line, "column": mutant.offset - first, "same_lines_above": above.count(line),
    }  # fmt: skip


def identity(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[key] for key in ("part", "file", "text", "same_lines_above", "column", "old", "new"))


def drawn(part: str, seed: int) -> Iterator[tuple[Path, Mutant, str]]:
    """All mutants of a part, one of each kind in turn, in an order that follows from the seed."""
    kinds: dict[str, list[tuple[Path, Mutant, str]]] = {}
    for path in PARTS[part].files():
        text = (ROOT / path).read_text()
        for mutant in find(path.name, text) if PARTS[part].tests(path) else ():
            kinds.setdefault(mutant.kind, []).append((path, mutant, text))
    for kind, mutants in kinds.items():
        random.Random(f"{seed} {part} {kind}").shuffle(mutants)
    for turn in itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds))):
        yield from filter(None, turn)


def again(record: list[dict[str, Any]], part: str) -> Iterator[tuple[Path, Mutant, str]]:
    """Mutants of the record that survived and that nobody judged."""
    for entry in record:
        if entry["part"] == part and entry["verdict"] == "survived" and not entry["judged"].startswith(NOT_COUNTED):
            text = (ROOT / entry["file"]).read_text()
            for mutant in find(entry["file"], text):
                if identity(describe(part, Path(entry["file"]), mutant, text)) == identity(entry):
                    yield Path(entry["file"]), mutant, text


def read() -> list[dict[str, Any]]:
    """The record; of two entries of one mutant, the later one."""
    lines = RECORD.read_text().splitlines() if RECORD.exists() else []
    return list({identity(entry): entry for entry in map(json.loads, lines)}.values())


def table(record: list[dict[str, Any]]) -> str:
    lines = [
        "| part | mutants | noticed | equivalent | slower | text | not noticed | share noticed |",
        "| --- |" + " ---: |" * 7,
    ]
    for part in (*PARTS, "all"):
        own = [entry for entry in record if part in (entry["part"], "all") and entry["verdict"] != "no code"]
        noticed = sum(entry["verdict"] == "noticed" for entry in own)
        judged = [sum(entry["judged"].startswith(word) for entry in own) for word in NOT_COUNTED]
        counted = len(own) - sum(judged)
        share = f"{100 * noticed / counted:.1f} %" if counted else ""
        lines.append("| " + " | ".join(map(str, (part, len(own), noticed, *judged, counted - noticed, share))) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("python -m mutate", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--count", type=int, default=50, help="mutants of a part, with those of the record")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all parts together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="only the survivors that are not judged, once more")
    parser.add_argument("--table", action="store_true", help="only print the table of the record")
    options = parser.parse_args()
    for part in [] if options.table else options.part:
        end = time.monotonic() + options.minutes * 60 / len(options.part)
        tree, record = Tree(part), read()
        known = {identity(entry) for entry in record}
        count = sum(entry["part"] == part and entry["verdict"] != "no code" for entry in record)
        for path, mutant, text in again(record, part) if options.again else drawn(part, options.seed):
            entry = describe(part, path, mutant, text)
            if not options.again and (count >= options.count or identity(entry) in known):
                continue
            if time.monotonic() > end:
                break
            start = time.monotonic()
            verdict, by = tree.verdict(path, mutant, tuple(PARTS[part].tests(path)))
            seconds = round(time.monotonic() - start)
            count += verdict != "no code"
            with RECORD.open("a") as file:
                file.write(json.dumps(entry | {"verdict": verdict, "by": by, "seconds": seconds, "judged": ""}) + "\n")
            print(f"{verdict} {path}:{entry['line']} {mutant.old!r} -> {mutant.new!r} {by} ({seconds} s)", flush=True)
        print(f"{part}: {count} mutants in the record", flush=True)
    print(table(read()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
