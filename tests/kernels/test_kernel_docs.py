"""docs/kernels.md agrees with the code."""

import json
import re
from pathlib import Path

from veloxquant_kernels.kernel import FOLDER
from veloxquant_kernels.pack_codes import packed_words

PAGE = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()


def test_the_roofline_follows_from_the_format():
    """Every figure of the table: 28 layers x 8 heads x 32768 tokens x bytes, over the bandwidth in its column."""
    header = next(line for line in PAGE.splitlines() if line.startswith("| cache | bytes"))
    bandwidths = [float(number) for number in re.findall(r"\((\d+)(?: GB/s)?\)", header)]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in PAGE.splitlines()
        if re.match(r"\| (fp16|\d bits) \|", line)
    ]
    assert len(bandwidths) == 7
    assert len(rows) == 6
    for name, per_token, gigabytes, *times in rows:
        code_bits = re.match(r"\d", name)
        expected = 2 * (4 * packed_words(128, int(code_bits[0])) + 2) if code_bits else 2 * 128 * 2
        assert int(per_token) == expected
        total = 28 * 8 * 32768 * expected / 1e9
        assert float(gigabytes) == round(total, 2)
        for time, bandwidth in zip(times, bandwidths, strict=True):
            assert abs(float(time) - 1000 * total / bandwidth) < 0.051


def test_every_kernel_is_documented():
    """Each body with a wrapper of its name has its row."""
    stems = [path.stem for path in FOLDER.glob("*.metal") if path.with_suffix(".py").exists()]
    assert [stem for stem in stems if stem != "rotation" and f"`{stem}`" not in PAGE] == []


def test_the_committed_mutants_are_killed_or_explained():
    """At least 40 seeded mutants; of those that compute something else, 95% are killed; survivors say why not."""
    document = json.loads((Path(__file__).parent / "mutations.json").read_text())
    rows = document["table"]
    killed = [row for row in rows if row["killed_by"] is not None]
    equivalent = [row for row in rows if row["killed_by"] is None and row.get("equivalent")]
    assert len(rows) == document["mutants"] >= 40
    assert len(killed) == document["killed"]
    assert len(killed) >= 0.95 * (len(rows) - len(equivalent))
    assert len(killed) >= 0.90 * len(rows)
    assert {row["kind"] for row in rows} >= {"off by one", "shift", "missing barrier", "swapped name", "comparison"}
    texts = {path.stem: path.read_text().splitlines() for path in FOLDER.glob("*.metal")}
    stale = [row for row in rows if texts[row["stem"]][row["line"] - 1].split("//")[0].rstrip() != row["before"]]
    assert stale == []
