"""Figure 5 of the TernGrad paper predicted: images per second of three networks on 1 to 512 GPUs of two clusters.

    python benchmarks/figure5.py             # the errors, on the terminal
    python benchmarks/figure5.py --record    # and benchmarks/results/figure5.csv, figure5_assumptions.csv, figure5.png

Published are 60 bars for each of two codecs (results/figure5_published.csv), read off the vector graphics of Wen and
others, "TernGrad: Ternary gradients to reduce communication in distributed deep learning", NIPS 2017. They are
themselves the predictions of the authors' performance model, which they checked on 4 nodes; its equations are not at
hand. Bars of VGG-A on few GPUs are small, and read with an error of 10 to 20 %.

The clusters: nodes of 4 GPUs. "ethernet": GTX 1080 behind a PCI switch, 1 Gbit/s between nodes. "infiniband": P100 with
NVLink, 100 Gbit/s between nodes.

A step takes, one after the other:

1. computing: the batch at the rate of one GPU;
2. for TernGrad, encoding: elements at the rate of one GPU;
3. inside the node, a ring of g GPUs: 2 (g - 1) / g times the bytes, at the node's rate;
4. if there are several nodes, to the host's memory and back: 2 times the bytes, over PCI;
5. between nodes, reduce and broadcast along two trees, pipelined (Sanders, Speck and Träff, "Two-tree algorithms for
   full bandwidth broadcast, reduction and scan", Parallel Computing 35, 2009): in each direction a node's link carries
   the bytes once with 2 nodes and twice with more, and each tensor waits 2 log2(nodes) times the link's delay.

Nothing is hidden behind the backward pass. Bytes: 4 per element; for TernGrad 2 bits on the way up and 2 down, and 4
bytes for the last layer, which the authors left as it is.

What is taken from the published numbers (CALIBRATION; these bars are left out of the errors):

* one GPU, FP32: the rate of computing, per cluster and network;
* one GPU, TernGrad, VGG-A: the rate of encoding, per cluster;
* 4 GPUs, FP32, VGG-A: the rate inside the node, per cluster; on Ethernet it is also that of PCI, for both clusters;
* 8 GPUs, FP32, AlexNet on InfiniBand: the rate between nodes.

The rate between nodes on Ethernet is taken from no bar: it is terncomm's link "1gbit", 94 % of it payload. Delays are
usual ones, 50 us and 2 us. AlexNet's batch is the one inference: with the 128 images that summaries of the paper state,
its bars would need half the bytes of its parameters, on both clusters; with 256, all three networks agree.
Steps of the mechanism were chosen with all bars in view, so the errors flatter the model; `figure5_assumptions.csv`
says what each is worth, the rates left as they are. What is left: GoogLeNet's TernGrad on Ethernet comes out 10 to 13 %
too slow (its 173 tensors wait too long), and InfiniBand's bars lie nearer to a ring than to trees.

What stands out: the authors' model counts 2 bits on the way down however many workers there are. The sum of W ternary
codes has 2 W + 1 values; sent exactly, it needs log2(2 W + 1) bits, which halves VGG-A's images per second on 512 GPUs
over Ethernet.
"""

import argparse
import csv
import dataclasses
import math
import statistics

import results

from terncomm.simulator.links import PRESETS, Link
from terncomm.simulator.networks import NETWORKS, Network, Parameter

GPUS = tuple(2**k for k in range(10))
GPUS_PER_NODE = 4
CLUSTERS = ("ethernet", "infiniband")
CODECS = ("fp32", "terngrad")
BATCH = {"alexnet": 256, "googlenet": 64, "vgg-a": 32}
LINKS = {
    "ethernet": dataclasses.replace(PRESETS["1gbit"], delay_s=50e-6),
    "infiniband": Link("100gbit", 100e9, delay_s=2e-6),  # its efficiency is calibrated
}
CALIBRATION = {
    *((cluster, network, 1, "fp32") for cluster in CLUSTERS for network in BATCH),
    *((cluster, "vgg-a", 1, "terngrad") for cluster in CLUSTERS),
    *((cluster, "vgg-a", 4, "fp32") for cluster in CLUSTERS),
    ("infiniband", "alexnet", 8, "fp32"),
}
Bar = tuple[str, str, int, str]  # cluster, network, GPUs, codec


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What may be supposed of the authors' system, beside rates.

    Args:
        tree: two trees between nodes, else a ring.
        overlap: a tensor travels as soon as backward has its gradient, else all do when backward has ended.
        exact_sum: TernGrad's sum comes down in log2(2 W + 1) bits, rounded up, else in 2.
        head_coded: TernGrad codes the last layer too.
        nominal: InfiniBand carries what its name says, else what was calibrated.
        alexnet_batch: images per GPU.
    """

    tree: bool = True
    overlap: bool = False
    exact_sum: bool = False
    head_coded: bool = False
    nominal: bool = False
    alexnet_batch: int = BATCH["alexnet"]


VARIANTS = {
    "as described": Assumptions(),
    "a ring between nodes": Assumptions(tree=False),
    "tensors travel during backward": Assumptions(overlap=True),
    "sums of W codes come down exactly": Assumptions(exact_sum=True),
    "the last layer is coded too": Assumptions(head_coded=True),
    "InfiniBand at 94 % of its name": Assumptions(nominal=True),
    "128 images of AlexNet per GPU": Assumptions(alexnet_batch=128),
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Rates of one cluster; `compute_s` is per network and step."""

    compute_s: dict[str, float]
    encode_elements_per_s: float
    inside_bytes_per_s: float
    host_bytes_per_s: float
    link: Link


def published() -> dict[Bar, float]:
    """Images per second."""
    with (results.FOLDER / "figure5_published.csv").open(newline="") as file:
        return {
            (row["cluster"], row["network"], int(row["gpus"]), codec): float(row[f"{codec}_images_per_s"])
            for row in csv.DictReader(file)
            for codec in CODECS
        }


def tensor_bytes(parameter: Parameter, codec: str, ranks: int, assumed: Assumptions) -> float:
    """Bytes of one tensor, the mean of the way up and the way down."""
    if codec == "fp32" or (parameter.kind == "head" and not assumed.head_coded):
        return 4.0 * parameter.numel
    down_bits = math.ceil(math.log2(2 * ranks + 1)) if assumed.exact_sum else 2
    return parameter.numel * (2 + down_bits) / 2 / 8


def passes(nodes: int, tree: bool) -> float:
    """How often a node's link carries the bytes, in each direction."""
    if tree:
        return float(min(nodes - 1, 2))
    return 2 * (nodes - 1) / nodes


def step_s(cluster: Cluster, network: Network, gpus: int, codec: str, assumed: Assumptions) -> float:
    """Time of one step."""
    nodes, inside = max(gpus // GPUS_PER_NODE, 1), min(gpus, GPUS_PER_NODE)
    s_per_byte = 2 * (inside - 1) / inside / cluster.inside_bytes_per_s
    delay_s = 0.0
    if nodes > 1:
        s_per_byte += 2 / cluster.host_bytes_per_s + passes(nodes, assumed.tree) / cluster.link.payload_bytes_per_s
        delay_s = 2 * math.log2(nodes) * cluster.link.delay_s
    compute_s = cluster.compute_s[network.name]
    backward_s = compute_s * 2 / 3
    end_s, left = 0.0, network.flops
    for parameter in reversed(network.parameters):
        left -= parameter.flops
        ready_s = compute_s - (backward_s * left / network.flops if assumed.overlap else 0)
        end_s = max(end_s, ready_s) + delay_s + s_per_byte * tensor_bytes(parameter, codec, gpus, assumed)
    coded = network.numel if codec == "terngrad" else 0
    return max(end_s, compute_s) + coded / cluster.encode_elements_per_s


def networks(assumed: Assumptions) -> dict[str, Network]:
    """The three networks with the batch of the figure."""
    batches = BATCH | {"alexnet": assumed.alexnet_batch}
    return {name: dataclasses.replace(NETWORKS[name], batch_size=batch) for name, batch in batches.items()}


def calibrate(assumed: Assumptions) -> dict[str, Cluster]:
    """Rates of both clusters, from the bars in CALIBRATION."""
    nets, bars = networks(assumed), published()

    def seconds(cluster: str, name: str, gpus: int, codec: str) -> float:
        assert (cluster, name, gpus, codec) in CALIBRATION
        return nets[name].batch_size * gpus / bars[cluster, name, gpus, codec]

    found: dict[str, Cluster] = {}
    vgg = nets["vgg-a"]
    for name in CLUSTERS:
        compute_s = {network: seconds(name, network, 1, "fp32") for network in nets}
        encode = vgg.numel / (seconds(name, "vgg-a", 1, "terngrad") - compute_s["vgg-a"])
        inside = 1.5 * 4 * vgg.numel / (seconds(name, "vgg-a", 4, "fp32") - compute_s["vgg-a"])
        host = found["ethernet"].host_bytes_per_s if found else inside
        found[name] = Cluster(compute_s, encode, inside, host, LINKS[name])
    if not assumed.nominal:
        infiniband = found["infiniband"]
        free = dataclasses.replace(LINKS["infiniband"], bits_per_s=math.inf)
        rest_s = step_s(dataclasses.replace(infiniband, link=free), nets["alexnet"], 8, "fp32", Assumptions())
        bytes_per_s = 4 * nets["alexnet"].numel / (seconds("infiniband", "alexnet", 8, "fp32") - rest_s)
        link = dataclasses.replace(LINKS["infiniband"], efficiency=8 * bytes_per_s / LINKS["infiniband"].bits_per_s)
        found["infiniband"] = dataclasses.replace(infiniband, link=link)
    return found


def predict(assumed: Assumptions) -> dict[Bar, float]:
    """Images per second."""
    clusters, nets = calibrate(assumed), networks(assumed)
    return {
        (cluster, name, gpus, codec): nets[name].batch_size
        * gpus
        / step_s(clusters[cluster], nets[name], gpus, codec, assumed)
        for cluster, name, gpus, codec in published()
    }


def errors(predicted: dict[Bar, float], cluster: str = "") -> list[float]:
    """Relative errors of the bars that were predicted, not calibrated."""
    return [
        predicted[bar] / truth - 1
        for bar, truth in published().items()
        if bar not in CALIBRATION and cluster in ("", bar[0])
    ]


def summary(found: list[float]) -> dict[str, float]:
    """In percent of the published bar."""
    sizes = sorted(100 * abs(error) for error in found)
    return {
        "median_error_percent": round(statistics.median(sizes), 1),
        "ninth_decile_percent": round(statistics.quantiles(sizes, n=10)[-1], 1),
        "max_error_percent": round(sizes[-1], 1),
    }


def plot(predicted: dict[Bar, float]) -> None:
    """Published bars as points, predictions as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    # Okabe and Ito's colours, told apart by colour-blind readers; the marker says it again.
    style = {"alexnet": ("#0072B2", "o"), "googlenet": ("#009E73", "^"), "vgg-a": ("#D55E00", "s")}
    titles = {"ethernet": "1 Gbit/s Ethernet, PCI", "infiniband": "100 Gbit/s InfiniBand, NVLink"}
    truth = published()
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained", sharey=True)
    for axes, cluster in zip(panels, CLUSTERS, strict=True):
        for name, (color, marker) in style.items():
            for codec in CODECS:
                mine, dotted = [(cluster, name, gpus, codec) for gpus in GPUS], codec == "fp32"
                axes.plot(GPUS, [predicted[b] for b in mine], color=color, linestyle="--" if dotted else "-", lw=1.2)
                face = "white" if dotted else color
                axes.plot(GPUS, [truth[b] for b in mine], marker, color=color, markerfacecolor=face, markersize=5.5)
        told = summary(errors(predicted, cluster))
        title = f"{titles[cluster]}\nmedian error {told['median_error_percent']:.1f} %, "
        axes.set(xscale="log", yscale="log", xlabel="GPUs", title=title + f"largest {told['max_error_percent']:.0f} %")
        axes.set_xticks(GPUS, [str(g) for g in GPUS])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(which="major", alpha=0.3)
    panels[0].set_ylabel("images per second")
    handles = [
        pyplot.Line2D([], [], color=color, marker=marker, label=NETWORKS[name].title)
        for name, (color, marker) in style.items()
    ]
    handles += [
        pyplot.Line2D([], [], color="black", linestyle="-", marker="o", label="TernGrad"),
        pyplot.Line2D([], [], color="black", linestyle="--", marker="o", markerfacecolor="white", label="FP32"),
    ]
    panels[0].legend(handles=handles, loc="upper left")
    figure.suptitle("Figure 5 of Wen and others, TernGrad, NIPS 2017: published (points) and predicted (lines)")
    path = results.FOLDER / "figure5.png"
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="write the rows and the picture")
    record = parser.parse_args().record
    truth, predicted = published(), predict(VARIANTS["as described"])
    for name, cluster in calibrate(VARIANTS["as described"]).items():
        print(
            f"{name}: encoding {cluster.encode_elements_per_s / 1e9:.2f} G elements/s, inside the node "
            f"{cluster.inside_bytes_per_s / 1e9:.1f} GB/s, host {cluster.host_bytes_per_s / 1e9:.1f} GB/s, "
            f"between nodes {cluster.link.payload_bytes_per_s / 1e6:.0f} MB/s"
        )
    rows = [
        {
            "cluster": bar[0],
            "network": bar[1],
            "gpus": bar[2],
            "codec": bar[3],
            "published_images_per_s": round(truth[bar]),
            "predicted_images_per_s": round(predicted[bar], 1),
            "error_percent": round(100 * (predicted[bar] / truth[bar] - 1), 1),
            "calibrated_on": "yes" if bar in CALIBRATION else "no",
        }
        for bar in truth
    ]
    for row in rows:
        print(*(f"{value!s:>11}" for value in row.values()))
    variants = []
    for told, assumed in VARIANTS.items():
        found = predict(assumed)
        for cluster in ("", *CLUSTERS):
            variants.append({"assumed": told, "cluster": cluster or "both", **summary(errors(found, cluster))})
    for row in variants:
        print(f"{row['assumed']:36} {row['cluster']:11}", *(f"{value:>7}" for value in list(row.values())[2:]))
    if record:
        results.write("figure5", rows)
        results.write("figure5_assumptions", variants)
        plot(predicted)


if __name__ == "__main__":
    main()
