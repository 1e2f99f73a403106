"""Growth: a folder of a million records of a hundred runs, and what the last run's page, gate and resume cost there.

``python tests/growth.py --records 1000000 --runs 100 --folder DIR`` makes the folder and measures it. Each step runs in
a process of its own; its processor seconds (starting Python included) and its peak of resident memory are printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "veloxbench"))

STEPS = {
    "page": "from veloxbench.cli.app import _run; code = _run(['report', '{folder}', '--out', '{folder}/page.md'])",
    "gate": "from veloxbench.cli.app import _run; code = _run(['gate', '--records', '{folder}', '--profile', 'gate', "
    "'--baseline', '{folder}/baselines', '--unknown-machine', 'fail'])",
    "resume": "from pathlib import Path; import json; from veloxbench.records.store import open_store\n"
    "keys = json.loads(Path('{folder}/last-run.json').read_text())['keys']\n"
    "with open_store(Path('{folder}')) as store:\n    store.begin(keys); code = int(None in map(store.get, keys))",
}
MEASURED = """
import json, resource, sys, time
{step}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({{"cpu_seconds": time.process_time(), "peak_gib": peak, "exit": code}}), file=sys.stderr)
"""


def parts_of(content: dict[str, Any]) -> tuple[str, str, str]:
    """Subject, what stands before the id, and the rest of a record's line, with places to fill in."""
    content["subject"]["model"]["name"], content["subject"]["harness"] = "MODEL", "HARNESS"
    content["provenance"]["started"] = "STARTED"
    del content["id"], content["key"]
    subject, engagement = content.pop("subject"), {"engagement": content.pop("engagement")}
    parts = [json.dumps(part, sort_keys=True, separators=(",", ":")) for part in (subject, engagement, content)]
    return parts[0], parts[1][1:-1], parts[2][1:-1]


def make(folder: Path, n_records: int, n_runs: int) -> None:
    """Runs of the same rows by other states of the code; the last run's is the code that is here."""
    from gate_records import ARMS, NOW, OURS, THEIRS, damage, quality_record

    folder.mkdir(parents=True, exist_ok=True)
    per_run = n_records // n_runs
    arms = [quality_record("fp16", None, bits=16.0, implementation=THEIRS)]
    for i, (method, target) in enumerate(ARMS):
        code = THEIRS if method == "mlx-affine" else OURS
        arms.append(quality_record(method, target, kld=damage(0.05, i), implementation=code))
    forms = [parts_of(arm.model_dump(mode="json")) for arm in arms]
    keys = []
    with (folder / "records.jsonl").open("w", encoding="utf-8") as journal:
        for run in range(n_runs):
            last = run == n_runs - 1
            harness = arms[0].subject.harness if last else hashlib.sha256(bytes([run])).hexdigest()
            started = (NOW - timedelta(hours=n_runs - run)).isoformat().replace("+00:00", "Z")
            for row in range(per_run):
                subject, before, after = forms[row % len(forms)]
                subject = subject.replace("HARNESS", harness).replace("MODEL", f"model-{row // len(forms)}")
                key = hashlib.sha256(subject.encode()).hexdigest()
                rest = f'"key":"{key}",{after.replace("STARTED", started)},"subject":{subject}}}'
                content = rest.replace('"model_licence":null,', "").replace('"project_commit":null,', "")
                content = content.replace('"project_dirty":null,', "").replace('"text_licence":null,', "")
                digest = hashlib.sha256(f"{{{before},{content}".encode()).hexdigest()
                journal.write(f'{{{before},"id":"{digest}",{rest}\n')
                if last:
                    keys.append(key)
    (folder / "last-run.json").write_text(json.dumps({"keys": keys, "planned": True}))


def approve(folder: Path) -> None:
    """Baselines of the last run, so that its gate has something to compare with."""
    from veloxbench.cli.app import _run

    places = ["--records", str(folder), "--baseline", str(folder / "baselines"), "--profile", "gate"]
    if _run(["baseline", "approve", "--reason", "growth", "--unknown-checkout", *places]) != 0:
        raise SystemExit("the last run could not be approved")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="kept, and used again where it is there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        if not (folder / "last-run.json").exists():
            make(folder, asked.records, asked.runs)
            approve(folder)
        measured = {"records": asked.records, "runs": asked.runs}
        measured["journal_gb"] = round((folder / "records.jsonl").stat().st_size / 1e9, 2)
        for name, step in STEPS.items():
            command = [sys.executable, "-c", MEASURED.format(step=step.format(folder=folder))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            measured[name] = json.loads(done.stderr.splitlines()[-1])
        print(json.dumps(measured))


if __name__ == "__main__":
    main()
