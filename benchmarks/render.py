"""Write the tables of README.md from the rows in benchmarks/results; with `--check` only say whether they are true."""

import csv
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def table(titles: list[str], lines: list[list[str]]) -> str:
    out = [titles, ["---", *["---:"] * (len(titles) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in out)


def origin(row: dict[str, str]) -> str:
    return f"{row['machine']}; torch {row['torch']}; commit {row['commit']}, {row['date']}."


def digits() -> str:
    seeds = [rows(f"digits/{name}") for name in ("results.csv", "seed1/results.csv", "seed2/results.csv")]
    one = seeds[0][0]
    lines = [
        [
            same[0]["codec"],
            " / ".join(f"{float(row['test_accuracy']):.1%}" for row in same),
            f"{sum(float(row['test_loss']) for row in same) / len(same):.3f}",
            f"{float(same[0]['sent_mb_per_rank']):.1f}",
            f"{float(same[0]['bytes_per_element_per_step']):.3f}",
            f"{float(same[0]['fewer_bytes_than_none']):.2f}x",
        ]
        for same in zip(*seeds, strict=True)
    ]
    commits = " and ".join(dict.fromkeys(seed[0]["commit"] for seed in seeds))
    told = (
        f"{one['epochs']} epochs, W = {one['world_size']}, {one['link']}; {one['machine']}; torch {one['torch']}; "
        f"commit {commits}, {one['date']}. Bytes of none and fp16: the ring's formula; of the others: counted as sent, "
        "everything included."
    )
    accuracy = f"test accuracy, seeds {' / '.join(seed[0]['seed'] for seed in seeds)}"
    titles = ["codec", accuracy, "mean test loss", "MB sent per rank", "bytes per element and step", "fewer bytes"]
    return f"{table(titles, lines)}\n\n{told}"


def bandwidth() -> str:
    found = rows("bandwidth.csv")
    one = found[0]
    links = list(dict.fromkeys(row["link"] for row in found))
    lines = []
    for codec in dict.fromkeys(row["codec"] for row in found):
        mine = {row["link"]: row for row in found if row["codec"] == codec}
        first = mine[links[0]]
        cells = [f"{float(mine[k]['step_ms']):.0f} ms ({float(mine[k]['times_faster_than_none']):.1f}x)" for k in links]
        sent = f"{int(first['interface_bytes_per_step']) / 1e6:.2f} MB ({float(first['times_fewer_bytes']):.1f}x fewer)"
        lines.append([codec, sent, *cells])
    names = [
        {"none": "no limit"}.get(link, link.replace("mbit", " Mbit/s").replace("gbit", " Gbit/s")) for link in links
    ]
    told = (
        f"{int(one['parameters']) / 1e6:.1f} M parameters, W = {one['world_size']}, one network namespace per rank, "
        "every link limited by tbf in both directions; bytes read from the interface; median of "
        f"{one['steps']} steps (forward and backward); {origin(one)}"
    )
    return f"{table(['codec', 'sent per rank and step', *names], lines)}\n\n{told}"


def kernels() -> str:
    """The file holds rows of several machines, those of another kind of processor are kept when it is made anew."""
    found = rows("kernels.csv")
    machines = list(dict.fromkeys(row["machine"] for row in found))
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in reversed(found)):
        mine = {row["machine"]: row for row in found if row["kernel"] == kernel}
        cells = [f"{float(mine[machine]['ratio_to_copy']):.2f}" if machine in mine else "-" for machine in machines]
        lines.append([kernel, *cells, next(iter(mine.values()))["held_to"]])
    made = " ".join(map(origin, {row["machine"]: row for row in found}.values()))
    told = (
        f"25 MB of float32, one thread, medians of {found[0]['rounds']}. Time over that of a copy: machines with quick "
        f"memory have the larger numbers. {made}"
    )
    return f"{table(['kernel', *[machine.partition(',')[0] for machine in machines], 'aim'], lines[::-1])}\n\n{told}"


def memory() -> str:
    found = rows("memory.csv")
    one = found[0]
    codecs = list(dict.fromkeys(row["codec"] for row in found))
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in found):
        mine = {row["codec"]: row for row in found if row["dtype"] == dtype}
        lines.append([dtype, *(f"{float(mine[codec]['times_bucket']):.2f}" for codec in codecs)])
    told = (
        f"Times the bucket, of {float(one['bucket_mb']):.0f} MB; held to {one['limit']}. W = {one['world_size']}, "
        f"high-water mark of resident memory; {origin(one)}"
    )
    return f"{table(['gradients', *codecs], lines)}\n\n{told}"


def overhead() -> str:
    found = rows("overhead.csv")
    one = found[0]
    names = ["codec", "alone_ms", "hook_ms", "accounted_ms", "unaccounted_percent", "statistics_percent"]
    lines = [
        [row["codec"], *(f"{row[name]} ms" for name in names[1:4]), *(f"{row[name]} %" for name in names[4:])]
        for row in found
    ]
    titles = ["codec", "no reduction", "with the hook", "encode, exchange, decode", "beyond these", "statistics"]
    told = (
        f"Forward and backward of {int(one['parameters']) / 1e6:.1f} M parameters, W = {one['world_size']}, medians of "
        f"{one['steps']}; what overlaps with backward is subtracted from the fourth number. {origin(one)}"
    )
    return f"{table(titles, lines)}\n\n{told}"


def traffic() -> str:
    from terncomm import Int8, Ternary
    from terncomm.codecs import codec_for
    from terncomm.path.drivers import sent
    from terncomm.reduce import messages
    from terncomm.segments import Segments

    layer, lines = Segments([10**7]), []
    for world_size in (2, 4, 8, 16):
        ring = 2 * (world_size - 1) / world_size * 4
        each = []
        for codec in (codec_for("bf16"), Int8(), Ternary()):
            each.append(sent(messages(layer, codec, world_size), world_size) / layer.numel)
        lines.append([str(world_size), f"{ring:.2f}", *(f"{one:.2f} ({ring / one:.1f}x)" for one in each)])
    return table(["W", "fp32 ring", "bf16", "int8", "terngrad"], lines)


def validation() -> str:
    found = rows("validation.csv")
    one = found[0]
    lines = []

    def errors(some: list[dict[str, str]]) -> list[float]:
        return [abs(float(row["time_error_percent"])) for row in some]

    for link, ranks in dict.fromkeys((row["link"], row["world_size"]) for row in found):
        some = [row for row in found if (row["link"], row["world_size"]) == (link, ranks)]
        lines.append(
            [
                f"{link}, W = {ranks}",
                f"{sum(row['within'] == 'True' for row in some)} of {len(some)}",
                f"{statistics.median(errors(some)):.1f} %",
                f"{max(errors(some)):.1f} %",
                f"{statistics.median(float(row['spread_percent']) for row in some):.1f} %",
                f"{max(abs(float(row['bytes_error_percent'])) for row in some):.2f} %",
            ]
        )
    quiet = [row for row in found if float(row["spread_percent"]) <= 5]
    busy = sum(float(row["compute_and_codec_share"]) >= 0.4 for row in found)
    told = (
        f"{len(found)} points: none, fp16, int8, terngrad; little to compute, much to compute, many small "
        f"layers. Held to: time within 10 %, or twice the measurement's own interquartile range (IQR) if that is more. "
        f"{len(quiet)} quiet points (IQR at most 5 %): median error {statistics.median(errors(quiet)):.1f} %. In "
        f"{busy} points computing and codec are 40 % of the step or more. Bytes: against the interface's counter. "
        f"{origin(one)}"
    )
    titles = ["link", "points held", "median error", "largest error", "median IQR", "largest error of bytes"]
    return f"{table(titles, lines)}\n\n{told}"


def figure5() -> str:
    found = [row for row in rows("figure5.csv") if row["calibrated_on"] != "yes"]
    lines = []
    for cluster in (*dict.fromkeys(row["cluster"] for row in found), "both"):
        errors = sorted(abs(float(row["error_percent"])) for row in found if cluster in (row["cluster"], "both"))
        ninth = errors[round(0.9 * (len(errors) - 1))]
        lines.append(
            [cluster, str(len(errors)), f"{statistics.median(errors):.1f} %", f"{ninth:.1f} %", f"{errors[-1]:.1f} %"]
        )
    told = (
        "Bars that were calibrated on are left out. The mechanism was chosen with all bars in view, so the errors "
        f"flatter it; benchmarks/results/figure5_assumptions.csv says what each assumption is worth. {origin(found[0])}"
    )
    return f"{table(['cluster', 'bars', 'median error', 'ninth decile', 'largest'], lines)}\n\n{told}"


def sweep() -> str:
    from terncomm.report.training import panels
    from terncomm.report.verdicts import verdict
    from terncomm.simulator import records

    found = records.load(RESULTS / "sweep")
    lines = []
    for panel in panels(found):
        base = panel.baseline
        for curve in panel.curves:
            loss, accuracy, sent = (curve.final(name) for name in ("test_loss", "test_accuracy", "sent_bytes"))
            fewer = base.final("sent_bytes").mean / sent.mean
            lines.append(
                [
                    f"{panel.data}, W = {panel.workers}",
                    curve.label,
                    f"{accuracy.mean:.1%} ({accuracy.low:.1%} - {accuracy.high:.1%})",
                    f"{loss.mean:.3f} ({loss.low:.3f} - {loss.high:.3f})",
                    f"{sent.mean / 1e6:.1f}",
                    f"{fewer:.1f}x",
                    re.sub(r" \([^)]*\)", "", verdict(panel, curve)),
                ]
            )
    told = found[0]["provenance"]
    commits = " and ".join(dict.fromkeys(record["provenance"]["commit"] for record in found))
    titles = ["data", "codec", "accuracy (lowest - highest)", "loss", "MB sent", "fewer", "against none"]
    ran = (
        f"Simulated: {len(found)} runs, seeds 0 to 2. Digits: 8 epochs, 64 samples a step; text, as bytes: 120 steps "
        "of 32 windows. Against none: by accuracy, two-sided t at 95 %."
    )
    faults = " and ".join(
        f"{row['times_terngrads_lowest_seed']} to {row['times_terngrads_highest_seed']} times ({row['what']})"
        for row in rows("planted_faults.csv")[1:]
    )
    ran += f" Planted faults: the averaged gradient's error is {faults} TernGrad's own, seed by seed."
    made = f"{told['machine']}; torch {told['torch']}; commit {commits}, {told['date']}."
    return f"{table(titles, lines)}\n\n{ran} {made}"


def rendered(text: str) -> str:
    for make in (validation, figure5, sweep, digits, bandwidth, kernels, memory, overhead, traffic):
        name = make.__name__
        block = f"<!-- {name}: benchmarks/render.py -->\n\n{make()}\n\n<!-- end -->"
        text, count = re.subn(
            rf"<!-- {name}: benchmarks/render\.py -->.*?<!-- end -->", lambda _, b=block: b, text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"render.py: README.md has {count} places for the table {name}, wanted 1")
    return text


def main() -> None:
    text = README.read_text()
    wanted = rendered(text)
    if "--check" in sys.argv[1:]:
        raise SystemExit(
            0 if text == wanted else "render.py: README.md is not what the rows say; run it without --check"
        )
    README.write_text(wanted)


if __name__ == "__main__":
    main()
