"""One grid on several machines: its plan, its shards, and the merge that makes one run of them."""

import json

import pytest
from gate_records import quality_record, run_records

from veloxbench.cli.app import _run as veloxbench
from veloxbench.errors import UsageError
from veloxbench.records.merge import figures, merged
from veloxbench.records.record import Estimate, Record
from veloxbench.records.selection import read_last_run
from veloxbench.records.store import open_store, read_records
from veloxbench.run.grid import load_grid
from veloxbench.run.plan import Shard, cells


def keep(folder, records):
    with open_store(folder) as store:
        for record in records:
            store.append(record)
    return folder


def test_two_shards_merged_are_one_run(cut_model, grid_file, tmp_path):
    """Figures of the merged folder, byte for byte, are those of a run in one piece, and so are the keys of the run."""
    arguments = ["run", "--profile", str(grid_file), "--models", str(cut_model), "--suites", "perplexity"]
    arguments += ["--methods", "mlx-affine@4"]
    folders = {name: tmp_path / name for name in ("whole", "1", "2")}
    assert veloxbench([*arguments, "--out", str(folders["whole"])]) == 0
    for index in ("1", "2"):
        assert veloxbench([*arguments, "--shard", f"{index}/2", "--out", str(folders[index])]) == 0
    parts = [{record.key for record in read_records(folders[index])} for index in ("1", "2")]
    assert not parts[0] & parts[1]
    assert all(parts)

    out = tmp_path / "merged"
    assert veloxbench(["merge", str(folders["2"]), str(folders["1"]), "--out", str(out)]) == 0

    def lines(folder):
        return sorted(json.dumps(figures(record), sort_keys=True) for record in read_last_run(folder))

    assert lines(out) == lines(folders["whole"])
    before = (out / "records.jsonl").read_bytes()
    assert veloxbench([*arguments, "--out", str(out)]) == 0
    assert (out / "records.jsonl").read_bytes() == before, "the merged run was measured again"


def test_every_cell_is_in_one_shard_and_stays_there():
    """Three parts hold each cell of a profile once; a profile that grows by a suite moves none of them."""
    grid = load_grid("default")
    more = grid.model_copy(update={"suites": (*grid.suites, "exact")})

    def part_of(cell):
        return [index for index in (1, 2, 3) if Shard(index, 3).takes("smollm2-135m", cell)]

    places = {str(cell): part_of(cell) for cell in cells(grid)}
    assert all(len(parts) == 1 for parts in places.values())
    assert places.items() <= {str(cell): part_of(cell) for cell in cells(more)}.items()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_that_is_none_is_refused(text):
    """An index counts from 1 up to the number of parts."""
    with pytest.raises(UsageError, match="2/5"):
        Shard.parse(text)


def test_one_cell_with_two_figures_is_refused(tmp_path):
    """The message names the cell and both values, and the output folder is not made."""
    record = quality_record()
    other = record.model_copy(update={"metrics": record.metrics | {"bits_per_value": Estimate(value=4.5, unit="bits")}})
    other = Record.create(**{name: getattr(other, name) for name in Record.model_fields if name not in ("id", "key")})
    places = [keep(tmp_path / "a", [record]), keep(tmp_path / "b", [other])]
    with pytest.raises(UsageError, match=r"turboquant_mse@4 .*bits_per_value 4\.25 and 4\.5"):
        merged(places)
    assert veloxbench(["merge", *map(str, places), "--out", str(tmp_path / "c")]) == 4
    assert not (tmp_path / "c").exists()


def test_what_stands_in_both_is_there_once(tmp_path):
    """A cell with equal figures in two folders is one record, the earlier one; the order of folders does not matter."""
    records = run_records()
    places = [keep(tmp_path / "a", records[:3]), keep(tmp_path / "b", records[1:])]
    assert merged(places).records == merged(places[::-1]).records == tuple(records)


def test_a_plan_measures_nothing(grid_file, cut_model, tmp_path, capsys):
    """``--plan`` prints cells and minutes, and leaves no folder; a shard's plan has fewer cells."""
    arguments = ["run", "--profile", str(grid_file), "--models", str(cut_model), "--plan"]
    assert veloxbench([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr().out
    # two protocols and one depth, fp16 and three arms each
    assert "12 cells to measure, about" in printed
    assert "download: nothing" in printed
    assert veloxbench([*arguments, "--shard", "1/2"]) == 0
    assert "12 cells" not in capsys.readouterr().out
