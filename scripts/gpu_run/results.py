"""The files that a run leaves: rewritten after every command, and valid whenever the run is killed."""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from .command import Command, Outcome, Stage

LOG_BYTES = 256 << 10  # of the end of each log; the archive has to stay small
LINES_OF_FAILURES, LINE = 30, 120
FILES = ("checks.json", "checks.md", "logs.tar.gz", "benchmarks.json", "benchmarks.md", "kernels.json", "learn.json")


class Results:
    """Outcomes of stages in ``folder``. Those of other stages that an earlier run has left there are kept."""

    def __init__(self, folder: Path, logs: Path, about: dict[str, Any]) -> None:
        self.folder, self.logs, self.about = folder, logs, about
        folder.mkdir(parents=True, exist_ok=True)
        logs.mkdir(parents=True, exist_ok=True)
        self.stages: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or it is something else
            self.stages = json.loads((folder / "checks.json").read_text())["stages"]
        self._outcomes: dict[str, dict[str, Outcome]] = {}

    def begin(self, stage: Stage) -> None:
        """Forgets what an earlier run of this stage has left."""
        commands = [command for step in stage.steps for command in step.commands]
        self._outcomes[stage.name] = {command.name: Outcome() for command in commands}
        self.stages[stage.name] = {"question": stage.question}
        self.write(stage)

    def note(self, stage: Stage, command: Command, outcome: Outcome) -> None:
        self._outcomes[stage.name][command.name] = outcome
        self.write(stage)

    def of(self, stage: Stage) -> dict[str, Outcome]:
        return self._outcomes[stage.name]

    def write(self, stage: Stage) -> None:
        """Everything that is known now, with what the commands of ``stage`` have written so far."""
        entry = self.stages[stage.name]
        entry["commands"] = {name: asdict(outcome) for name, outcome in self.of(stage).items()}
        if stage.found:
            try:
                entry["found"] = stage.found()
            except Exception as error:  # half-written files of a command must not end the run
                entry["found"] = {"problem": f"{type(error).__name__}: {error}"}
        self.save("checks.json", json.dumps(self.about | {"stages": self.stages}, indent=1) + "\n")
        self.save("checks.md", self.markdown() + "\n")
        self.save("logs.tar.gz", archive(self.logs))

    def save(self, name: str, content: str | bytes) -> None:
        """Never leaves half a file."""
        unfinished = self.folder / f".{name}.tmp"
        unfinished.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(unfinished, self.folder / name)

    def table(self) -> str:
        rows = ["| stage | command | result | seconds | |", "|---|---|---|---:|---|"]
        for name, entry in self.stages.items():
            for command, outcome in entry.get("commands", {}).items():
                state = outcome["state"] if outcome["state"] in ("pass", "waiting") else f"**{outcome['state']}**"
                said = str(outcome["said"]).replace("|", "/")
                rows.append(f"| {name} | {command} | {state} | {outcome['seconds']:.0f} | {said} |")
        return "\n".join(rows)

    def markdown(self) -> str:
        title = "Rehearsal of the checks on a GPU, without one" if self.about.get("rehearsal") else "Checks on a GPU"
        parts = [f"# {title}", ", ".join(f"{name} {value}" for name, value in self.about.items()), self.table()]
        for entry in self.stages.values():
            failures = [one for outcome in entry.get("commands", {}).values() for one in outcome["failures"]]
            if failures:
                shown = [f"- `{one['test']}`: {one['error'][:LINE]}" for one in failures[:LINES_OF_FAILURES]]
                more = (
                    [f"- and {len(failures) - len(shown)} more, in checks.json"] if len(failures) > len(shown) else []
                )
                parts += ["## Tests that failed", "\n".join(shown + more)]
            parts += list((entry.get("found") or {}).get("tables", []))
        return "\n\n".join(parts)


def archive(folder: Path) -> bytes:
    """All files of a folder, the ends of the long ones."""
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            try:
                content = path.read_bytes() if path.is_file() else None
            except OSError:
                content = None  # a command has just removed it
            if content is None:
                continue
            entry = tarfile.TarInfo(str(path.relative_to(folder)))
            kept = content if path.suffix in (".png", ".gz") else content[-LOG_BYTES:]
            entry.size = len(kept)
            tar.addfile(entry, BytesIO(kept))
    return packed.getvalue()
