"""Records into numbers, pictures and one page."""

import base64
import copy
import csv
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import made_records
import pytest

from terncomm.report import looks, page, pictures, plans, training, verdicts
from terncomm.report.words import mixed
from terncomm.simulator import records


def run(codec="none", seed=0, accuracies=(0.1, 0.5, 0.9), losses=None, sent=(0, 100, 200), steps=(0, 10, 20), **more):
    """A simulated run on one link, 0.5 s a step."""
    losses = losses or [2.0 - a if a is not None else 2.0 for a in accuracies]
    history = [
        {"epoch": n, "step": step, "train_loss": None, "test_loss": loss, "test_accuracy": a, "sent_bytes": count}
        for n, (step, loss, a, count) in enumerate(zip(steps, losses, accuracies, sent, strict=True))
    ]
    config = {"data": "digits", "codec": codec, "accumulate": 1, "workers": 4, "seed": seed, **more}
    parts = {"compute_s": 0.1, "encode_s": 0.05, "exchange_s": 0.3, "decode_s": 0.05}
    link = {"link": "100mbit", "bits_per_s": 1e8, "delay_s": 0.0, "step_s": 0.5, **parts}
    return {
        "mode": "simulate",
        "config": config,
        "provenance": made_records.provenance(),
        "parameters": 1000,
        "history": history,
        "links": [link],
    }


def plan(codec, rate, step_s, workers=4):
    parts = {"compute_s": step_s / 2, "encode_s": 0.0, "exchange_s": step_s / 2, "decode_s": 0.0}
    return {
        "mode": "plan",
        "config": {"network": "resnet50", "workers": workers, "codec": codec, "link": f"{rate / 1e6:g}mbit"},
        "provenance": made_records.provenance(),
        "parameters": 1000,
        "sent_bytes": 1500,
        "step_s": step_s,
        **parts,
        "samples_per_s": 32 * workers / step_s,
    }


def only(found):
    (one,) = found
    return one


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pick(table, **wanted):
    return only(row for row in table if all(row[name] == value for name, value in wanted.items()))


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.words, self.tags = [], [], [], set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Pictures are made but not drawn, except where a test asks for `drawn`: that takes half a second each."""
    if "drawn" not in request.fixturenames:

        def save(self, target, **_):
            (target.write if hasattr(target, "write") else target.write_bytes)(b"drawn")

        monkeypatch.setattr(pictures.Figure, "savefig", save)


@pytest.fixture
def drawn():
    """For tests that need the pictures themselves."""


def written(found, tmp_path, **more):
    paths = page.write_report(found, tmp_path / "out", **more)
    assert all(path.stat().st_size > 0 for path in paths)
    assert {path.suffix for path in paths} == {".html", ".png", ".csv"}
    text = paths[0].read_text()
    html = Page(text)
    assert all(source.startswith("data:") for source in html.sources)
    assert text.count("<img ") == len([path for path in paths if path.suffix == ".png"]) == (len(paths) - 1) / 2
    assert "@import" not in text
    assert "url(" not in text
    assert not html.tags & {"script", "link", "iframe", "object"}
    for source in html.sources:
        kind, _, content = source.removeprefix("data:").partition(";base64,")
        assert kind in ("image/svg+xml", "text/csv")
        assert base64.b64decode(content, validate=True)
    return {path.name: path for path in paths}, " ".join(html.words)


# Records


def test_records_of_files_and_folders(tmp_path):
    first, second = run(), plan("none", 1e8, 1.0)
    (tmp_path / "b.jsonl").write_text(json.dumps(first) + "\n\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(second))
    (tmp_path / "notes.txt").write_text("no record")
    assert records.load(tmp_path) == [second, first]
    assert records.load([tmp_path / "b.jsonl", tmp_path]) == [first, second]  # named twice, read once
    assert records.load(made_records_file(tmp_path)) == made_records.many()


def made_records_file(folder):
    path = folder / "many.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in made_records.many()))
    return path


def changed(record, path, value):
    record = copy.deepcopy(record)
    place = record
    for name in path[:-1]:
        place = place[name]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return record


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["mode"], None, "mode: wanted one of simulate, plan, cluster, got None"),
        (["config"], None, "config is missing"),
        (["provenance"], None, "provenance is missing"),
        (["config", "codec"], None, "config.codec is missing"),
        (["config", "workers"], 0, "config.workers: wanted an integer of at least 1, got 0"),
        (["config", "seed"], "0", "config.seed: wanted an integer, got '0'"),
        (["config", "accumulate"], 0, "config.accumulate: wanted an integer of at least 1, got 0"),
        (["history"], [], "history: wanted a list of evaluations, got []"),
        (["history", 1, "sent_bytes"], -1, "history[1].sent_bytes: wanted a number, zero or more, got -1"),
        (["history", 1, "test_loss"], None, "history[1].test_loss is missing"),
        (["history", 1, "test_accuracy"], 97.5, "history[1].test_accuracy: wanted a fraction from 0 to 1, got 97.5"),
        (["history", 2, "step"], 10, "history[2].step: 10 does not come after 10"),
        (["links", 0, "decode_s"], None, "links[0].decode_s is missing"),
        (
            ["links", 0, "step_s"],
            0.7,
            "links[0].step_s is 0.7, but compute_s + encode_s + exchange_s + decode_s is 0.5",
        ),
        (["links", 0, "step_s"], math.nan, "links[0].step_s: wanted a number, zero or more, got nan"),
    ],
)
def test_a_broken_record_is_named_by_file_and_line(tmp_path, path, value, message):
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps(run()) + "\n" + json.dumps(changed(run(), path, value)) + "\n")
    with pytest.raises(ValueError, match="runs") as error:
        records.load(tmp_path)
    assert str(error.value).partition(";")[0] == f"{file}:2: {message}"


def test_other_broken_lines(tmp_path):
    file = tmp_path / "runs.jsonl"
    for line, message in [
        ('{"mode": "simul', "not a JSON object: Unterminated string"),
        ("[1]", r"wanted a JSON object, got \[1\]"),
        (json.dumps(changed(plan("none", 1e8, 1.0), ["config", "link"], "fast")), "'fast' is no link"),
        (
            json.dumps(changed(made_records.cluster("none"), ["probe", "bits_per_s"], None)),
            "probe.bits_per_s is missing",
        ),
    ]:
        file.write_text(f"{line}\n")
        with pytest.raises(ValueError, match=f"runs.jsonl:1: {message}"):
            records.load([file])
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"runs\.jsonl:1: not a JSON object"):
        records.load(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \*\.jsonl in this folder"):
        records.load(tmp_path / "empty")


# Numbers


def test_bands_over_seeds(tmp_path):
    found = [
        run(seed=seed, accuracies=(0.1, a, 0.9), sent=(0, 100 + seed, 200)) for seed, a in enumerate((0.4, 0.5, 0.9))
    ]
    files, _ = written(found, tmp_path)
    table = rows(files["simulated-digits-w-4-accuracy_vs_bytes.csv"])
    row = pick(table, step="10", measure="test_accuracy")
    assert float(row["sent_bytes_per_rank"]) == 101
    assert [float(row[f"test_accuracy_{name}"]) for name in ("mean", "low", "high")] == pytest.approx([0.6, 0.4, 0.9])
    assert row["seeds"] == "3"
    assert {row["step"] for row in table} == {"10", "20"}  # nothing is sent before training: no place on a log axis
    row = pick(rows(files["simulated-digits-w-4-accuracy_vs_time.csv"]), step="20", measure="test_loss")
    assert (float(row["seconds"]), row["time_is"], row["link"]) == (10.0, "predicted", "100mbit")


def test_a_point_needs_every_seed():
    found = [run(seed=0), run(seed=1, steps=(0, 10, 30))]
    curve = only(only(training.panels(found)).curves)
    assert [step for step, _, _ in curve.points("test_loss")] == [0, 10]
    assert [step for step, _, _ in curve.points("test_loss", "100mbit")] == [0, 10]


def test_time_of_accumulated_steps_is_that_of_their_exchanges(tmp_path):
    found = [run(), run(accumulate=5)]
    files, words = written(found, tmp_path)
    table = rows(files["simulated-digits-w-4-accuracy_vs_time.csv"])
    assert float(pick(table, codec="none, step every 5", step="20", measure="test_loss")["seconds"]) == 20 / 5 * 0.5
    parts = pick(rows(files["simulated-digits-step_parts.csv"]), codec="none, step every 5")
    assert float(parts["batch_s"]) == pytest.approx(0.1)
    assert float(parts["exchange_s"]) == pytest.approx(0.06)
    assert "none, step every 5" in words


def test_bytes_and_time_to_target(tmp_path):
    """At the first evaluation that reaches it, not between evaluations."""
    found = [run(seed=seed, accuracies=(0.1, a, 0.9)) for seed, a in enumerate((0.8, 0.9))]
    found += [run("terngrad", seed, (0.1, 0.7, a), sent=(0, 10, 20)) for seed, a in enumerate((0.9, 0.88))]
    found += [run("int8", 0, (0.1, 0.2, 0.3), sent=(0, 40, 80))]
    files, words = written(found, tmp_path)
    table = rows(files["simulated-digits-w-4-to_target.csv"])
    assert float(table[0]["target"]) == pytest.approx(0.99 * 0.9)
    row = pick(table, codec="none", quantity="sent_bytes_per_rank")
    assert [float(row[f"value_{name}"]) for name in ("mean", "low", "high")] == [150, 100, 200]
    row = pick(table, codec="none", quantity="seconds")
    assert [float(row[f"value_{name}"]) for name in ("mean", "low", "high")] == [7.5, 5, 10]
    row = pick(table, codec="terngrad", quantity="sent_bytes_per_rank")  # one of two seeds reaches it
    assert (row["value_mean"], row["value_high"], row["reached"], row["runs"]) == ("20.0", "20", "1", "2")
    row = pick(table, codec="int8", quantity="seconds")
    assert (row["value_mean"], row["reached"]) == ("", "0")
    files, words = written(found, tmp_path, target=0.25)
    table = rows(files["simulated-digits-w-4-to_target.csv"])
    assert float(pick(table, codec="int8", quantity="sent_bytes_per_rank")["value_mean"]) == 80
    assert "25.00 % test accuracy" in words
    with pytest.raises(ValueError, match=r"0.95 is 95 %.*got 95"):
        page.write_report(found, tmp_path, target=95)


def test_words_for_targets():
    panel = only(training.panels([run("none", 0), run("none", 1, (0.1, 0.2, 0.3))]))
    target = verdicts.Target("test_accuracy", 0.8, "as asked for")
    assert verdicts.reach(panel.curves[0], target).text == "reached by 1 of 2"
    assert verdicts.reach(panel.curves[0], verdicts.Target("test_accuracy", 0.99, "")).text == "not reached"
    assert (
        verdicts.target_of(only(training.panels([run("int8")]))).why == "99 % of the best codec's final mean accuracy"
    )


def test_gap_against_none():
    base = [0.90, 0.91, 0.92]  # standard deviation 0.01: with three seeds each, 0.0227 is seen
    found = verdicts.gap([a - 0.022 for a in base], base)
    assert found.value == pytest.approx(-0.022)
    assert found.least == pytest.approx(2.776 * 0.01 * math.sqrt(2 / 3))
    assert not found.seen
    assert verdicts.gap([a - 0.023 for a in base], base).seen
    assert verdicts.gap([0.5], base).least == pytest.approx(4.303 * 0.01 * math.sqrt(4 / 3))
    assert verdicts.gap([0.5], [0.9]).least is None
    assert verdicts.gap([0.5, 0.5], [0.9, 0.9]).least is None


def verdicts_of(found):
    panel = only(training.panels(found))
    return {curve.label: verdicts.verdict(panel, curve) for curve in panel.curves}


def test_verdicts():
    ends = (0.90, 0.91, 0.92)
    found = [
        run(codec, seed, (0.1, 0.5, end + shift), losses=(2, 1, 1 + 0.1 * seed + worse))
        for codec, shift, worse in [
            ("none", 0, 0),
            ("fp16", 0, 0),
            ("int8", -0.022, 0),
            ("terngrad", -0.05, 0),
            ("x", 0, 1),
        ]
        for seed, end in enumerate(ends)
    ]
    assert verdicts_of(found) == {
        "none": "the baseline",
        "fp16": "no difference seen (the same mean; 2.3 points would be seen)",
        "int8": "no difference seen (2.2 points lower; 2.3 points would be seen)",
        "terngrad": "5.0 points lower",
        "x": "no difference seen (the same mean; 2.3 points would be seen); test loss 1 higher",
    }
    assert verdicts_of([run(), run("int8", 0, (0.1, 0.5, 0.95))])["int8"] == (
        "5.0 points higher, but one seed each: how much is chance is not known"
    )
    assert verdicts_of([run("int8")]) == {"int8": "no run of none to compare with"}
    diverged = run("int8", accuracies=(None,) * 3, losses=(2, math.nan, math.nan))
    assert verdicts_of([run(accuracies=(None,) * 3), diverged])["int8"] == (
        "1 of 1 seeds diverged: test loss at the end is not a number"
    )


def test_break_even_on_log_axes(tmp_path):
    """None falls from 8 s to 0.5 s over 16 times the rate, int8 stays at 2 s: none is 1.05 times as slow at 381."""
    found = [plan("none", 1e8, 8.0), plan("none", 1.6e9, 0.5), plan("int8", 1e8, 2.0), plan("int8", 1.6e9, 2.0)]
    found += [plan("fp16", 1e8, 4.0), plan("fp16", 1.6e9, 0.25), plan("terngrad", 1e8, 9.0), plan("terngrad", 1.6e9, 9)]
    files, words = written(found, tmp_path)
    table = rows(files["planned-resnet50-break_even.csv"])
    row = only(row for row in table if row["crossing"])
    assert (row["codec"], row["crossing"]) == ("int8", "stops to pay")
    assert float(row["bits_per_s"]) == pytest.approx(4e8 / 1.05)
    assert float(row["batch_s"]) == pytest.approx(2.0 * 1.05)
    assert len(table) == 9
    for text in ("pays below 381 Mbit/s", "pays at every rate", "pays at no rate", "planned, no training"):
        assert text in words
    assert "simulated" not in words.lower()
    assert "accuracy" not in words.replace("say nothing of accuracy", "").replace(
        page.write_report.__kwdefaults__["title"], ""
    )


def test_break_even_of_equal_and_of_crossing_twice():
    """Steps must be 1.05 times as fast: a little before the curves meet."""
    worth = math.log10(1.05)
    meet = plans.break_even({1e8: 2.0, 1e9: 1.0}, {1e8: 1.0, 1e9: 1.0}).stops[0][0]
    assert meet == pytest.approx(1e9 / 10 ** (worth / math.log10(2)))
    twice = plans.break_even({1.0: 1.0, 10.0: 1.0, 100.0: 1.0}, {1.0: 10.0, 10.0: 0.1, 100.0: 10.0})
    assert twice.starts[0][0] == pytest.approx(10 ** (0.5 + worth / 2))
    assert twice.stops[0][0] == pytest.approx(10 ** (1.5 - worth / 2))
    assert plans.break_even({}, {1.0: 1.0}).text == "not compared"


def test_what_is_not_the_same_is_not_averaged():
    found = [run(lr=0.1), run(lr=0.2), run("int8", lr=0.1), run("int8", lr=0.2), run("int8", 1, lr=0.2)]
    panels = training.panels(found)
    assert [panel.name for panel in panels] == ["digits, W = 4, lr 0.1", "digits, W = 4, lr 0.2"]
    assert [len(curve.runs) for panel in panels for curve in panel.curves] == [1, 1, 1, 2]
    found = [run(), run("terngrad", clip=2.5), run("terngrad", clip=4.0)]
    assert [curve.label for curve in only(training.panels(found)).curves] == [
        "none",
        "terngrad, clip 2.5",
        "terngrad, clip 4.0",
    ]
    panel = only(training.panels([run(lr=0.1), run("int8", lr=0.2)]))
    assert panel.unequal == ("lr is 0.1 for none; 0.2 for int8",)


def test_the_same_experiment_counts_once(tmp_path):
    old, new = run(accuracies=(0.1, 0.5, 0.6)), run()
    new["provenance"]["date"] = "2026-12-01"
    kept, replaced = training.newest([new, old])
    assert (kept, replaced) == ([new], 1)
    _, words = written([new, old], tmp_path)
    assert "1 records were left out" in words
    assert len(training.newest([made_records.cluster("none")] * 2)[0]) == 2


def test_runs_of_a_command():
    record = made_records.cluster("int8", seed=3)
    found = training.Run.of(record)
    assert (found.data, found.codec, found.seed, found.workers) == ("digits", "int8", 3, 4)
    assert found.options == {}
    assert found.clocks["100mbit/1ms"][-1] == record["history"][-1]["seconds"]
    record["config"]["codec"] = "terngrad"  # the configuration's word counts before the command's
    assert training.Run.of(record).codec == "terngrad"
    record["config"] = {"command": ["./run.sh"], "ranks": 2, "link": "1gbit"}
    assert (training.Run.of(record).data, training.Run.of(record).codec) == ("run.sh", "run.sh")


# The page


def test_a_single_run(tmp_path, drawn):
    files, words = written([run()], tmp_path)
    assert set(files) == {"report.html"} | {
        f"simulated-digits-{name}.{kind}"
        for name in ("w-4-accuracy_vs_bytes", "w-4-accuracy_vs_time", "w-4-to_target", "step_parts")
        for kind in ("png", "csv")
    }
    assert files["simulated-digits-step_parts.png"].read_bytes().startswith(b"\x89PNG")
    html = Page(files["report.html"].read_text())
    picture = base64.b64decode(html.sources[0].partition(";base64,")[2]).decode()
    assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', picture))
    assert "simulated: bytes counted, time predicted" in words
    assert "measured" not in words.lower()
    assert "planned" not in words.lower()


def test_every_mode_is_labelled(tmp_path, drawn):
    measured = [made_records.cluster(codec, seed) for codec in ("none", "terngrad") for seed in (0, 1)]
    failed = made_records.cluster("int8") | {"status": 1, "history": None}
    whole = made_records.cluster("fp16") | {"history": None, "how": "user-space link"}
    planned = [
        plan(codec, rate, 1.0, workers) for codec in ("none", "int8") for rate in (1e8, 1e9) for workers in (2, 4)
    ]
    files, words = written([run(), *measured, failed, whole, *planned], tmp_path)
    for text in (
        "simulated: bytes counted, time predicted",
        "planned, no training",
        "measured on limited links",
        "measured: network namespaces, 100mbit/1ms (tbf; probe 96 Mbit/s)",
        "1 (failed)",
        "1 of 6 runs failed",
        "How time was predicted.",
    ):
        assert text in words
    row = pick(rows(files["measured-seconds.csv"]), codec="none")
    assert float(row["seconds_mean"]) == pytest.approx((measured[0]["seconds"] + measured[1]["seconds"]) / 2)
    assert {row["codec"] for row in rows(files["measured-seconds.csv"])} == {"none", "fp16", "terngrad"}
    row = pick(rows(files["measured-digits-w-4-accuracy_vs_time.csv"]), codec="none", step="23", measure="test_loss")
    assert float(row["seconds"]) == pytest.approx(sum(r["history"][1]["seconds"] for r in measured[:2]) / 2)
    assert row["time_is"] == "measured"


def drawn_text(figure):
    return " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_every_picture_says_its_mode():
    found = [run(seed=seed) for seed in (0, 1)]
    panel = only(training.panels(found))
    look = looks.looks([panel])
    with looks.style():
        target = verdicts.target_of(panel)
        drawings = [pictures.against_bytes(panel, look), pictures.against_time(panel, look)]
        drawings += [pictures.to_target(panel, target, look), pictures.step_parts([panel])]
        for figure, _ in drawings:
            assert "simulated" in drawn_text(figure)
            assert "digits" in drawn_text(figure)
        assert "simulated: time predicted for 100mbit" in drawn_text(drawings[1][0])
        assert "band: lowest to highest of 2 seeds" in drawn_text(drawings[0][0])


def test_without_accuracies_loss_is_compared(tmp_path):
    found = [run(accuracies=(None,) * 3, losses=(2.0, 1.0, 0.5))]
    found += [run("int8", accuracies=(None,) * 3, losses=(2.0, 0.5, 0.4), sent=(0, 10, 20))]
    files, words = written(found, tmp_path)
    assert "simulated-digits-w-4-loss_vs_bytes.png" in files
    table = rows(files["simulated-digits-w-4-to_target.csv"])
    assert {float(row["target"]) for row in table} == {1.01 * 0.5}
    assert float(pick(table, codec="int8", quantity="sent_bytes_per_rank")["value_mean"]) == 10
    assert "accuracy %" not in words
    assert "test loss 0.1 lower, but one seed each" in words
    files, _ = written(found, tmp_path, target_loss=1.0)
    table = rows(files["simulated-digits-w-4-to_target.csv"])
    assert float(pick(table, codec="none", quantity="sent_bytes_per_rank")["value_mean"]) == 100


def test_mixed_commits_and_machines_are_said(tmp_path):
    other = run("int8")
    other["provenance"] |= {"commit": None, "machine": "other, 8 cores"}
    _, words = written([run(), other], tmp_path)
    assert "The records come from 2 commits: abc1234, not recorded." in words
    assert "The records come from 2 machines: AMD EPYC (avx2), 2 cores, other, 8 cores." in words
    assert mixed([run(), run("int8")]) == []


def test_text_is_escaped(tmp_path, drawn):
    evil = "<script>alert('1')</script> & $x_1$"
    files, words = written([run(evil, data="<b>$data", note='"><img src=http://x>')], tmp_path, title="<i>&")
    assert evil in words
    text = files["report.html"].read_text()
    assert "<script" not in text
    assert "<title>&lt;i&gt;&amp;</title>" in text


def test_one_worker_sends_nothing_and_a_diverged_run_ends_nowhere(tmp_path):
    lost = run("x", accuracies=(0.1, 0.1, 0.1), losses=(2.0, math.inf, math.nan), workers=1, sent=(0, 0, 0))
    files, _ = written([run(workers=1, sent=(0, 0, 0)), lost], tmp_path)
    assert "simulated-digits-w-1-accuracy_vs_bytes.png" not in files
    assert "simulated-digits-w-1-accuracy_vs_time.png" in files


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        page.write_report([], tmp_path)
    with pytest.raises(ValueError, match=r"record 1: config\.codec is missing"):
        page.write_report([run(), changed(run(), ["config", "codec"], None)], tmp_path)


def test_colours_are_told_apart():
    found = [run(codec) for codec in ("none", "fp16", "int8", "terngrad", "terngrad-noclip", "sign", "topk")]
    look = looks.looks(training.panels([*found, run(accumulate=11)]))
    assert len(look) == 8
    assert len({(each.color, each.marker, each.variant) for each in look.values()}) == 8
    assert look["none, step every 11"].color == look["none"].color


def test_a_band_of_equal_values_holds_its_mean():
    """The mean of three equal numbers may round to beside them; a bar must not get a negative error."""
    for k in range(1, 2000):
        found = training.band([k * 0.0137] * 3)
        assert found.low == found.mean == found.high
