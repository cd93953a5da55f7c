"""Table, CSV and plot from a saved run."""

import csv
import json

import matplotlib.image
import pytest

from benchmarks.layers import report
from benchmarks.layers.results import Run
from benchmarks.layers.table import markdown
from benchmarks.layers.targets import outcomes

A, B = "2048x768x768-fp32", "512x384x384-fp32"


def entry(case, variant, mode, median, matches=None, roofline_share=0.5):
    rows, k, n = case.split("-")[0].split("x")
    return {
        "params": {"case": case, "variant": variant, "mode": mode},
        "stats": {"median": median, "q1": median * 0.99, "q3": median * 1.01, "rounds": 11},
        "extra_info": {
            "rows": int(rows),
            "in_features": int(k),
            "out_features": int(n),
            "matches_reference": matches,
            "gflop_per_second": 2000.0,
            "gbyte_per_second": 3.0,
            "roofline_share": roofline_share,
            "saved_bytes": 5_000_000,
        },
    }


def layer(case, variant, forward, backward, **options):
    times = {"forward": forward, "backward": backward, "both": forward + backward}
    return [entry(case, variant, mode, seconds, **options) for mode, seconds in times.items()]


def saved(tmp_path, entries, device_type="cpu"):
    machine = {
        "device": "Machine X",
        "device_type": device_type,
        "threads": 2,
        "torch": "2.13.0",
        "mixout_kernels": "0.1.0",
        "bytes_per_second": 2e10,
        "flops_per_second": {"fp32": 2e11},
    }
    path = tmp_path / "machine-x.json"
    document = {
        "machine_info": {"layers": machine},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": entries,
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def cpu_json(tmp_path):
    entries = [
        *layer(A, "linear", 0.010, 0.030),
        *layer(A, "dropout-p0.1", 0.020, 0.030),
        *layer(A, "mixout-neuron-p0.9", 0.011, 0.017, matches=True),
        *layer(B, "linear", 0.001, 0.003),
        *layer(B, "mixout-neuron-p0.9", 0.0001, 0.0001, matches=False),
    ]
    return saved(tmp_path, entries)


def rows(text, first_cell):
    lines = [line for line in text.splitlines() if line.startswith(f"| {first_cell} ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_gives_times_and_ratios_of_medians(cpu_json):
    text = markdown(Run.load(cpu_json))
    summary, in_a, in_b = rows(text, "mixout-neuron-p0.9")
    assert summary == ["mixout-neuron-p0.9", "0.70", "**wrong**"]
    assert in_a[:9] == ["mixout-neuron-p0.9", "yes", "11", "1.10", "17", "0.57", "28", "0.70", "0.56"]
    assert in_a[9:] == ["2000", "3", "50%", "5"]
    # However fast a layer is, there is no ratio for a wrong result.
    assert in_b[1] == "**NO**"
    assert [in_b[i] for i in (3, 5, 7, 8)] == ["**wrong**"] * 4


def test_targets_are_judged_by_the_run(cpu_json):
    judged = {(o.case, o.target.variant, o.target.baseline): (o.ratio, o.reached) for o in outcomes(Run.load(cpu_json))}
    assert judged == {
        (A, "mixout-neuron-p0.9", "linear"): (pytest.approx(0.7), True),
        (A, "mixout-neuron-p0.9", "dropout-p0.1"): (pytest.approx(0.56), True),
        (B, "mixout-neuron-p0.9", "linear"): (None, False),
    }


def test_a_target_is_missed_above_its_limit(tmp_path):
    entries = layer(A, "linear", 0.5, 0.5) + layer(A, "mixout-neuron-p0.9", 0.5, 0.2201, matches=True)
    missed = outcomes(Run.load(saved(tmp_path, entries)))
    assert [o.reached for o in missed] == [False]


def test_gpu_targets_everywhere_and_of_the_roofline(tmp_path):
    fast, slow, small = "4096x1024x1024-bf16", "16x768x768-bf16", "64x4096x4096-bf16"
    entries = []
    for case, compiled in ((fast, 2.0), (slow, 1.0)):
        entries += layer(case, "linear", 0.5, 0.5)
        entries += layer(case, "compiled-neuron-p0.7", compiled / 2, compiled / 2)
        entries += layer(case, "mixout-neuron-p0.7", 0.45, 0.45, matches=True)
    entries += layer(small, "linear", 1.0, 1.0)
    entries.append(entry(small, "mixout-cuda-fused-neuron-p0.9", "forward", 0.5, matches=True, roofline_share=0.8))
    run = Run.load(saved(tmp_path, entries, device_type="cuda"))
    judged = {(o.case, o.target.baseline): (o.ratio, o.reached) for o in outcomes(run)}
    assert judged[slow, "compiled-neuron-p0.7"] == (pytest.approx(0.9), False)
    assert judged[small, "roofline"] == (pytest.approx(1.25), False)
    assert judged[fast, "linear"] == (pytest.approx(0.9), True)
    assert "| TFLOP/s |" in markdown(run)


def test_a_noisy_run_says_so(tmp_path):
    entries = layer(A, "linear", 0.5, 0.5)
    assert "Too noisy" not in markdown(Run.load(saved(tmp_path, entries)))
    entries[-1]["stats"]["q3"] = 1.3
    assert "Too noisy" in markdown(Run.load(saved(tmp_path, entries)))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_command_writes_all_files_from_a_json(tmp_path, capsys, device_type):
    entries = []
    for case in ("512x384x384-fp32", "64x384x384-fp32", "2048x768x768-bf16"):
        entries += layer(case, "linear", 0.5, 0.5)
        entries += layer(case, "mixout-neuron-p0.9", 0.4, 0.3, matches=True)
    path = saved(tmp_path, entries, device_type)
    output = tmp_path / "new" / "folder"
    assert report.main([str(path), "--output", str(output)]) == 0
    assert capsys.readouterr().out.split() == [str(output / f"machine-x.{kind}") for kind in ("md", "csv", "png")]

    with (output / "machine-x.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(entries)
    assert {row["ratio_to_linear"] for row in written if row["variant"] != "linear" and row["mode"] == "both"} == {
        "0.7"
    }

    picture = matplotlib.image.imread(output / "machine-x.png")[..., :3]
    blue = (picture[..., 2] > 0.6) & (picture[..., 0] < 0.1)  # the marks of mixout-neuron-p0.9
    assert blue.any()


@pytest.mark.parametrize("content", ["", "[]", '{"benchmarks": []}'])
def test_a_file_that_is_no_run_is_one_clear_line(tmp_path, capsys, content):
    path = tmp_path / "broken.json"
    path.write_text(content)
    assert report.main([str(path), "--output", str(tmp_path)]) == 1
    assert f"{path}: expected the JSON of python -m benchmarks.layers" in capsys.readouterr().err
