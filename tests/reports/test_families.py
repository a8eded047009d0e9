"""Nets of several widths from one run: who belongs together, their table, and the line through them."""

from __future__ import annotations

import re

import pytest

from edgecl.onboard.bundle import sha256_of_file
from edgecl.reports.collect import collect
from edgecl.reports.families import families_of, family_tables
from edgecl.reports.report import report as report_on
from edgecl.reports.rows import rows_of
from reports.conftest import report

CHECKPOINT = "abc1234567" + "0" * 54
# Width -> p50 ms, params, MACs, and the few-label draws' shift.
NETS = {
    0.5: (0.21, 60_100, 1_300_000, -9.0),
    0.75: (0.33, 130_200, 2_700_000, -4.0),
    1.0: (0.47, 231_400, 4_712_000, 0.0),
}


def draws(shift):
    return [value + shift for value in (56.1, 54.9, 57.8, 55.2, 58.3)]


def write_family(
    make, root, *, made_from=CHECKPOINT, widths=NETS, shifts=None, device="build-box", timed=True, costs=True
):
    """Write a net and a bundle per width; return the directories.

    Args:
        shifts: width -> the few-label draws' shift, instead of those of NETS.
        costs: whether `edgecl cost` was run.
    """
    dirs = []
    for width in widths:
        p50, params, macs, shift = NETS[width]
        shift = (shifts or {}).get(width, shift)
        model = make.model(
            root / f"net-{width:g}",
            width=width,
            macs=macs,
            params=params,
            draws=draws(shift),
            knn=61.5 + shift,
            linear=74.2 + shift,
            made_from=made_from,
        )
        dirs.append(model)
        if not costs:
            (model / "cost.json").unlink()
        if timed:
            dirs.append(
                make.bundle(root / f"bundle-{width:g}", model=model, p50=p50, p99=1.3 * p50, device=device)
            )
    return dirs


@pytest.fixture
def family(make, tmp_path):
    return write_family(make, tmp_path / "nets")


def found_in(dirs):
    collection = collect(dirs)
    return families_of(collection, rows_of(collection))


def test_nets_of_one_checkpoint_are_a_family(family):
    (found,) = found_in(family)
    assert found.widths == [0.5, 0.75, 1.0]
    assert found.checkpoint == CHECKPOINT
    assert found.name == "demo"
    assert len(found.rows) == 3


def test_one_width_is_no_family(make, tmp_path):
    once, again = (write_family(make, tmp_path / name, widths=[0.75]) for name in ("once", "again"))
    assert found_in([*once, *again]) == []


def test_two_families_of_one_name_are_told_apart(make, tmp_path, family):
    other = write_family(make, tmp_path / "other", made_from="f" * 64, widths=[0.5, 1.0])
    assert [found.name for found in found_in([*family, *other])] == ["demo (abc12345)", "demo (ffffffff)"]


def test_fine_tuned_nets_are_a_family_through_what_they_were_made_from(make, tmp_path, family):
    tuned = []
    for width in (0.5, 1.0):
        source = tmp_path / "nets" / f"net-{width:g}"
        tuned.append(
            make.model(
                tmp_path / "tuned" / f"{width:g}",
                origin="finetuned",
                width=width,
                top1=80.0 + width,
                draws=None,
                made_from=sha256_of_file(source / "model.json"),
            )
        )
    carved, found = found_in([*family, *tuned])
    assert (carved.origin, found.origin) == ("pretrained", "finetuned")
    assert found.widths == [0.5, 1.0]
    assert found.name == "demo, fine-tuned"
    # Without the carved nets nothing says that they belong together.
    assert found_in(tuned) == []


def test_the_table_has_width_size_accuracy_and_median_of_each_net(family, tmp_path):
    record = report_on(family, out=tmp_path / "report")
    (table,) = family_tables(record.families, record.rows)
    assert table.title == "demo: 3 widths of one run, on build-box, batch 1, 1 thread"
    assert table.headings == [
        "width", "params", "MACs", "few-label, %", "linear-probe, %", "kNN, %", "fp32 p50, ms",
    ]  # fmt: skip
    assert [row[:3] for row in table.lines] == [
        ["0.5×", "60.1 k", "1.3 M"],
        ["0.75×", "130 k", "2.7 M"],
        ["1×", "231 k", "4.7 M"],
    ]
    assert [row[3].partition(" ")[0] for row in table.lines] == ["47.5", "52.5", "56.5"]
    assert [row[-1] for row in table.lines] == ["0.210", "0.330", "0.470"]


def test_each_device_has_a_table_and_each_precision_a_column(make, tmp_path):
    dirs = write_family(make, tmp_path / "nets")
    for width, (p50, *_) in NETS.items():
        make.bench(
            tmp_path / "nets" / f"bundle-{width:g}",
            device="board",
            power_mode="15W",
            measurements=[make.measurement("fp32", 4 * p50), make.measurement("fp16", 2 * p50)],
        )
    record = report_on(dirs, out=tmp_path / "report")
    tables = {
        table.title.partition(", on ")[2]: table for table in family_tables(record.families, record.rows)
    }
    assert len(record.families[0].rows) == 9
    assert tables.keys() == {"build-box, batch 1, 1 thread", "board, 15W, batch 1, 1 thread"}
    board = tables["board, 15W, batch 1, 1 thread"]
    assert board.headings[-2:] == ["fp32 p50, ms", "fp16 p50, ms"]
    assert [row[-2:] for row in board.lines] == [["0.840", "0.420"], ["1.32", "0.660"], ["1.88", "0.940"]]


def test_precisions_have_lines_of_their_own_and_a_rejected_one_none(make, tmp_path):
    dirs = []
    for width, (p50, *_) in NETS.items():
        model = make.model(tmp_path / f"{width:g}", width=width, made_from=CHECKPOINT)
        rejected = {"kept": False, "words": "rejected because it gains no time", "kept_nodes": []}
        bundle = make.bundle(
            tmp_path / f"b{width:g}",
            model=model,
            p50=None,
            precisions={"fp32": make.precision("fp32"), "fp16": make.precision("fp16", decision=rejected)},
        )
        make.bench(
            bundle,
            device="box",
            measurements=[make.measurement("fp32", p50), make.measurement("fp16", p50 / 2)],
        )
        dirs += [model, bundle]
    record = report(dirs, out=tmp_path / "report")
    (group,) = record["trade_off"]["groups"]
    assert len(group["rows"]) == 6
    assert [{record["rows"][index]["precision"] for index in line["rows"]} for line in group["families"]] == [
        {"fp32"}
    ]


def test_page_text_and_record_name_the_family(family, tmp_path):
    record = report(family, out=tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "demo, one run: widths 0.5 to 1" in page
    assert "A solid line joins the nets of one run" in page
    assert "<h2>Widths of one run</h2>" in page
    assert "## demo: 3 widths of one run" in text
    assert "| 0.75× | 130 k | 2.7 M |" in text
    assert record["support"][-1] == (
        "One run gave 3 nets (demo), from width 0.5 to 1: 47.5 to 56.5 % few-label top-1, 1.3 M to 4.7 M MACs."
    )


def test_the_line_is_drawn_through_the_points(family, tmp_path):
    """The path of the family's line ends where the markers of the narrowest and the widest net are."""
    report(family, out=tmp_path / "report")
    _, chart = chart_of(tmp_path / "report")
    number = r"(-?[\d.]+)"
    lines = re.findall(rf'd="M {number} {number}\s+L {number} {number}\s+L {number} {number}\s*"', chart)
    marks = re.findall(rf'<use[^>]* x="{number}" y="{number}"', chart)
    places = {(float(x), float(y)) for x, y in marks}
    joined = [line for line in lines if {(float(line[i]), float(line[i + 1])) for i in (0, 2, 4)} <= places]
    assert len(joined) == 1
    xs, ys = [float(x) for x in joined[0][::2]], [float(y) for y in joined[0][1::2]]
    assert xs == sorted(xs)
    assert ys == sorted(ys, reverse=True)


@pytest.mark.parametrize(
    ("shifts", "said"),
    [
        # The wider net may be the worse one.
        ({0.5: 0.0, 0.75: -4.0, 1.0: -9.0}, "56.5 to 47.5 % few-label top-1,"),
        ({0.5: -9.0, 0.75: 2.0, 1.0: 0.0}, "47.5 to 56.5 % few-label top-1 (up to 58.5 % at 0.75),"),
        ({0.5: 0.0, 0.75: -20.0, 1.0: -9.0}, "56.5 to 47.5 % few-label top-1 (as low as 36.5 % at 0.75),"),
        ({0.5: 0.0, 0.75: 0.01, 1.0: -9.0}, "56.5 to 47.5 % few-label top-1,"),
    ],
)
def test_the_sentence_pairs_each_end_with_its_own_accuracy(make, tmp_path, shifts, said):
    record = report(write_family(make, tmp_path, shifts=shifts), out=tmp_path / "report")
    assert record["support"][-1].startswith(f"One run gave 3 nets (demo), from width 0.5 to 1: {said} 1.3 M")


def chart_of(out):
    page = (out / "report.html").read_text(encoding="utf-8")
    charts = [svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if "one run: widths" in svg]
    assert len(charts) == 1
    return page, charts[0]


def test_a_family_that_was_not_timed_is_drawn_over_macs(make, tmp_path):
    record = report(write_family(make, tmp_path / "nets", timed=False)[::-1], out=tmp_path / "report")
    trade = record["size_trade_off"]
    assert record["trade_off"] is None
    assert (trade["cost"], trade["accuracy"]) == ("macs", "few_label")
    ((line,),) = [group["families"] for group in trade["groups"]]
    assert [record["rows"][index]["width"] for index in line["rows"]] == [0.5, 0.75, 1.0]
    page, chart = chart_of(tmp_path / "report")
    assert "<h2>Accuracy against MACs</h2>" in page
    assert ">MACs, millions<" in chart
    assert "net-0.5 1.30 M, 47.5 %; " in "".join(re.findall(r'aria-label="([^"]*)"', chart)) + "; "
    assert "latency" not in chart
    assert "A solid line joins the nets of one run" in page
    assert "Nothing was timed" in page


def test_without_macs_it_is_drawn_over_parameters(make, tmp_path):
    record = report(write_family(make, tmp_path / "nets", timed=False, costs=False), out=tmp_path / "report")
    assert record["size_trade_off"]["cost"] == "params"
    page, chart = chart_of(tmp_path / "report")
    assert "<h2>Accuracy against parameters</h2>" in page
    assert ">parameters, thousands<" in chart
    assert "`edgecl cost MODEL_DIR` counts MACs" in page
    assert record["support"][-1].endswith("47.5 to 56.5 % few-label top-1, 60.1 k to 231 k parameters.")


def test_an_exported_family_that_was_not_timed_has_one_point_per_net(make, tmp_path):
    dirs = write_family(make, tmp_path / "nets", timed=False)
    precisions = {name: make.precision(name) for name in ("int8", "fp32")}
    exported = [
        make.bundle(tmp_path / f"b{place}", model=model, p50=None, precisions=precisions)
        for place, model in enumerate(dirs)
    ]
    record = report([*dirs, *exported], out=tmp_path / "report")
    assert len(record["rows"]) == 6
    ((shown,),) = [[group["rows"]] for group in record["size_trade_off"]["groups"]]
    assert sorted(record["rows"][index]["width"] for index in shown) == [0.5, 0.75, 1.0]
    _, chart = chart_of(tmp_path / "report")
    assert "int8" not in chart


def test_the_legend_names_the_widths_that_are_drawn(make, tmp_path):
    dirs = write_family(make, tmp_path / "nets", timed=False)
    (dirs[-1] / "probe.json").unlink()
    record = report(dirs, out=tmp_path / "report")
    assert record["families"][0]["widths"] == [0.5, 0.75, 1.0]
    assert "one run: widths 0.5 to 0.75<" in chart_of(tmp_path / "report")[1]


def test_a_family_without_an_accuracy_has_no_chart(make, tmp_path):
    dirs = write_family(make, tmp_path / "nets", timed=False)
    for model in dirs:
        (model / "probe.json").unlink()
    record = report(dirs, out=tmp_path / "report")
    assert record["families"]
    assert record["size_trade_off"] is None
