"""Mutation testing of the ``.metal`` bodies: do the verification's cases notice a wrong kernel?

    python tests/kernels/mutate_kernels.py --seed 1 --count 200 --out tests/kernels/mutations.json

A seeded tool draws small edits of the shipped texts (an index off by one, a wrong shift, a missing barrier, a swapped
scale, a wrong split boundary, ...). Each mutant runs in a worker process through the checked emulator. A mutant is
killed when a case fails, faults or does not end; one that does not compile is discarded and replaced. Verdicts are
kept in OUT.partial as they fall: the same command goes on where it was stopped. A survivor that computes the same is
given an ``equivalent`` note by hand in OUT, which later runs keep.
"""

import argparse
import hashlib
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

TIMEOUT_S = 15
"""Processor time, so that a busy machine kills no mutant."""

OPERATORS = {
    "off by one": [(r"(?<![\w.\[<])(\d+)(?![\w.]|\.\d)", lambda m: str(int(m[1]) + 1))],
    "comparison": [
        (r"(?<= )<(?= )", "<="),
        (r"(?<= )>(?= )", ">="),
        (r"(?<= )>=(?= )", ">"),
        (r"(?<= )==(?= )", "!="),
    ],
    "arithmetic": [
        (r"(?<= )\+(?= )", "-"),
        (r"(?<= )-(?= )", "+"),
        (r"(?<= )\*(?= )", "+"),
        (r"(?<= )/(?= )", "*"),
        (r"(?<= )%(?= )", "/"),
    ],
    "shift": [(r"(?<= )<<(?= )", ">>"), (r"(?<= )>>(?= )", "<<")],
    "bits": [(r"(?<= )&(?= )", "|"), (r"(?<= )\|(?= )", "&"), (r"\|=", "=")],
    "assignment": [(r"\+=", "-="), (r"\*=", "="), (r"(?<=[^+])\+=", "=")],
    "missing barrier": [(r"^\s*(?:threadgroup|simdgroup)_barrier\([^;]*\);", "")],
    "swapped name": [
        (r"\bkey_norm\b(?=\[)", "value_norm"),
        (r"\bvalue_norm\b(?=\[)", "key_norm"),
        (r"\bkey_codebook\b(?=\[read)", "value_codebook"),
        (r"\bscales\[group\]", "zeros[group]"),
        (r"\bgroup_scales\[group\]", "group_zeros[group]"),
        (r"\bn_sinks\b", "n_tail"),
        (r"\bn_packed\b", "n_sinks"),
        (r"\bK_WORDS\b", "V_WORDS"),
        (r"\bV_BITS\b", "K_BITS"),
        (r"\brow\b", "column"),
        (r"\blow\b(?= \+)", "high"),
        (r"\blane\b", "simdgroup"),
        (r"\bsimdgroup\b(?! ==)", "lane"),
    ],
    "function": [(r"\bmax\(", "min("), (r"\bmin\(", "max("), (r"\brint\(", "floor("), (r"\bsimd_max\(", "simd_min(")],
    "condition": [(r"\bpacked \?", "!packed ?"), (r"\bnegative \?", "!negative ?"), (r"if \(packed\)", "if (true)")],
}
"""Edits by kind: a pattern within one line, and its replacement."""


@dataclass(frozen=True)
class Mutant:
    """One edit of one line of one shipped text."""

    stem: str
    line: int
    kind: str
    before: str
    after: str

    def apply(self, text: str) -> str:
        """The mutated text."""
        lines = text.splitlines(keepends=True)
        lines[self.line - 1] = self.after + "\n"
        return "".join(lines)


def mutants_of(stem: str, text: str) -> Iterator[Mutant]:
    """Every edit that an operator allows, comments left alone."""
    for number, line in enumerate(text.splitlines(), start=1):
        code = line.split("//")[0]
        if not code.strip() or code.lstrip().startswith(("#", "template")):
            continue
        for kind, edits in OPERATORS.items():
            for pattern, replacement in edits:
                for match in re.finditer(pattern, code):
                    text_after = replacement(match) if callable(replacement) else replacement
                    after = code[: match.start()] + text_after + code[match.end() :]
                    yield Mutant(stem, number, kind, code.rstrip(), after.rstrip())


def draw(texts: dict[str, str], seed: int) -> list[Mutant]:
    """All mutants in a seeded order that takes the kinds in turn, so that each is represented."""
    rng = np.random.default_rng(seed)
    by_kind: dict[str, list[Mutant]] = {kind: [] for kind in OPERATORS}
    for stem, text in sorted(texts.items()):
        for mutant in mutants_of(stem, text):
            if mutant not in by_kind[mutant.kind]:
                by_kind[mutant.kind].append(mutant)
    for mutants in by_kind.values():
        rng.shuffle(mutants)  # type: ignore[arg-type]
    ordered = []
    while any(by_kind.values()):
        ordered += [mutants.pop() for mutants in by_kind.values() if mutants]
    return ordered


def _worker(pipe) -> None:  # type: ignore[no-untyped-def]
    from veloxquant_kernels import kernel, verify

    original = kernel.metal_text
    cases = list(verify.cases())
    users = _users()
    while True:
        mutant = pipe.recv()
        if mutant is None:
            return
        kernel.metal_text = lambda stem, m=mutant: m.apply(original(stem)) if stem == m.stem else original(stem)
        reason = None
        for case in cases:
            if case.kernel not in users[mutant.stem]:
                continue
            outcome = verify.run_case(case, "emulator", seed=3)
            if "error:" in outcome.detail and "\n" in outcome.detail:
                reason = "does not compile"
                break
            if not outcome.passed:
                reason = outcome.detail.split(" (threadgroup")[0] or f"error {outcome.error:.3g} x bound"
                break
        kernel.metal_text = original
        pipe.send(reason)


def _users() -> dict[str, set[str]]:
    """For each text the kernels whose cases run it."""
    from veloxquant_kernels.kernel import shipped_kernels

    users: dict[str, set[str]] = {}
    for kernel in shipped_kernels():
        for stem in (kernel.stem, *kernel.headers):
            users.setdefault(stem, set()).add(kernel.stem.removesuffix("_merge"))
    return users


class Worker:
    """A process that judges mutants, restarted when one does not end."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self._pipe, other = self._context.Pipe()
        self._process = self._context.Process(target=_worker, args=(other,), daemon=True)
        self._process.start()

    def judge(self, mutant: Mutant) -> str | None:
        """Why the mutant was killed, or None if it survived."""
        self._pipe.send(mutant)
        process = psutil.Process(self._process.pid)
        before = process.cpu_times().user
        try:
            while process.cpu_times().user - before < TIMEOUT_S:
                if self._pipe.poll(0.5):
                    return self._pipe.recv()
            reason = f"did not end within {TIMEOUT_S} s"
        except (EOFError, psutil.Error):
            reason = "crashed"
        self.stop()
        self._start()
        return reason

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def text_hashes(texts: dict[str, str]) -> dict[str, str]:
    """What a table is about: sha256 of every shipped text."""
    return {stem: hashlib.sha256(text.encode()).hexdigest() for stem, text in sorted(texts.items())}


class Journal:
    """Verdicts as they fall, so that a stopped run goes on; started anew when a text or the seed has changed."""

    def __init__(self, path: Path, subject: dict[str, object]) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        header = json.dumps(subject, sort_keys=True)
        if not lines or lines[0] != header:
            path.write_text(header + "\n")
            lines = [header]
        self._path = path
        self._verdicts = {Mutant(**row["mutant"]): row["reason"] for row in map(json.loads, lines[1:])}

    def verdict(self, mutant: Mutant, judge: Callable[[Mutant], str | None]) -> str | None:
        """The verdict on a mutant: the kept one, or ``judge``'s, which is kept."""
        if mutant not in self._verdicts:
            self._verdicts[mutant] = judge(mutant)
            with self._path.open("a") as file:
                file.write(json.dumps({"mutant": asdict(mutant), "reason": self._verdicts[mutant]}) + "\n")
        return self._verdicts[mutant]


def _notes(path: Path) -> dict[tuple[str, str, str], str]:
    """The notes on survivors in a committed table, by text and edit (a line may have moved)."""
    rows = json.loads(path.read_text())["table"] if path.exists() else []
    return {(row["stem"], row["before"], row["after"]): row["equivalent"] for row in rows if "equivalent" in row}


def main() -> None:
    """Judge mutants and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    from veloxquant_kernels.kernel import FOLDER

    texts = {path.stem: path.read_text() for path in FOLDER.glob("*.metal")}
    subject = {"seed": arguments.seed, "texts": text_hashes(texts)}
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    journal, notes = Journal(partial, subject), _notes(arguments.out)
    worker, table, started = Worker(), [], time.monotonic()
    for mutant in draw(texts, arguments.seed):
        if len(table) == arguments.count:
            break
        reason = journal.verdict(mutant, worker.judge)
        if reason == "does not compile":
            continue
        note = notes.get((mutant.stem, mutant.before, mutant.after)) if reason is None else None
        table.append({**asdict(mutant), "killed_by": reason, **({"equivalent": note} if note else {})})
        print(f"{len(table):4d} {time.monotonic() - started:6.0f} s  {mutant.stem}:{mutant.line} {mutant.kind}: "
              f"{mutant.before.strip()} -> {mutant.after.strip()}: {reason or 'SURVIVED'}", flush=True)  # fmt: skip
    worker.stop()
    killed = sum(row["killed_by"] is not None for row in table)
    document = {**subject, "mutants": len(table), "killed": killed, "table": table}
    arguments.out.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    partial.unlink()
    print(f"{killed} of {len(table)} killed")


if __name__ == "__main__":
    main()
