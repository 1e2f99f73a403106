"""docs/kernels.md agrees with the code."""

import re
from pathlib import Path

from veloxbench.records.selection import table_rows
from veloxbench.records.store import read_records
from veloxquant_kernels.kernel import shipped_kernels
from veloxquant_kernels.packing import packed_words

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text()


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
    """Each kernel has its place in the tables: what it takes and gives, and which caches run it."""
    assert [kernel.stem for kernel in shipped_kernels() if PAGE.count(f"`{kernel.stem}`") < 2] == []


def test_the_plain_path_on_a_cpu_stays_within_its_limits(record_property):
    """The committed records, each arm timed beside fp16 in one run: at 2048 tokens the 4-bit cache takes at most 2.0
    times the fp16 step and 1.3 times its prefill, and other widths are recorded too."""
    timed = {
        r.subject.method.target: r
        for r in table_rows(read_records(ROOT / "records"))
        if r.subject.suite == "throughput"
        and r.subject.settings["depth"] == 2048
        and r.subject.method.label.startswith("turboquant_mse")
        and r.subject.model.name == "smollm2-135m"
    }
    assert set(timed) >= {4.0, 3.0, 2.0, 1.0}
    for bits, record in sorted(timed.items(), reverse=True):
        record_property(f"decode over fp16 at {bits:g} bits", f"{1 / record.metrics['decode_speed_ratio'].value:.2f}x")
    four = timed[4.0]
    record_property("prefill over fp16 at 4 bits", f"{1 / four.metrics['prefill_speed_ratio'].value:.2f}x")
    assert four.provenance.hardware["device"] == "cpu"
    assert 1 / four.metrics["decode_speed_ratio"].value <= 2.0
    assert 1 / four.metrics["prefill_speed_ratio"].value <= 1.3
    assert len(four.samples["decode_arm"]) == len(four.samples["decode_fp16"]) >= 10
