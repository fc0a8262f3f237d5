"""Records as the simulator writes them, made up: the shapes of real ones, and numbers from formulas."""

import math
import random
from typing import Any

Record = dict[str, Any]
LINKS = {"100mbit": (1e8, 0.0), "1gbit": (1e9, 0.0), "wan-50ms": (1e8, 0.025)}
# Bytes per element and exchange, seconds to encode and decode an element, lasting loss of accuracy.
CODECS = {
    "none": (8.0, 0.0, 0.0),
    "fp16": (4.0, 1e-9, 0.0),
    "int8": (2.1, 6e-9, 0.0005),
    "terngrad": (0.6, 9e-9, 0.004),
    "terngrad-noclip": (0.6, 8e-9, 0.035),
}


def provenance(**more: Any) -> Record:
    known = {"terncomm": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7", "commit": "abc1234"}
    return {**known, "machine": "AMD EPYC (avx2), 2 cores", "date": "2026-11-23", **more}


def step(bytes_sent: float, compute_s: float, coding_s: float, bits_per_s: float, delay_s: float) -> Record:
    """Parts of a step; half of the computing can hide the exchange."""
    exchange_s = max(0.0, 8 * bytes_sent / (0.94 * bits_per_s) + 4 * delay_s - compute_s / 2)
    parts = {
        "compute_s": compute_s,
        "encode_s": 0.7 * coding_s,
        "exchange_s": exchange_s,
        "decode_s": 0.3 * coding_s,
    }
    return {"step_s": sum(parts.values()), **parts}


def simulate(
    codec: str = "none",
    workers: int = 4,
    seed: int = 0,
    accumulate: int = 1,
    data: str = "digits",
    accuracy: bool = True,
    epochs: int = 8,
    **config: Any,
) -> Record:
    size, coding_s, worse = CODECS.get(codec, (1.0, 5e-9, 0.002))
    parameters, steps = 515658, 23
    noise = random.Random(f"{codec} {workers} {seed} {accumulate}")
    per_exchange = size * parameters * (workers - 1) / workers
    history = []
    for epoch in range(epochs + 1):
        speed = 1.1 if accumulate == 1 else 0.45
        rest = math.exp(-speed * epoch) * (1 + 0.2 * noise.random())
        found = 0.975 - worse - 0.86 * rest + noise.gauss(0, 0.0025)
        entry: Record = {
            "epoch": epoch,
            "step": steps * epoch,
            "train_loss": 2.3 * rest + 0.02 if epoch else None,
            "test_loss": 2.25 * rest + 0.09 + 2 * worse + noise.gauss(0, 0.004),
            "test_accuracy": round(360 * max(0.1, min(1.0, found))) / 360 if accuracy else None,
            "sent_bytes": round(per_exchange * (steps * epoch // accumulate)),
        }
        history.append(entry)
    links = [
        {"link": name, "bits_per_s": rate, "delay_s": delay}
        | step(per_exchange, 0.010 * accumulate, coding_s * parameters * workers / 4, rate, delay)
        for name, (rate, delay) in LINKS.items()
    ]
    asked = {"data": data, "codec": codec, "accumulate": accumulate, "workers": workers, "seed": seed}
    return {
        "mode": "simulate",
        "config": {**asked, "batch_size": 16, "epochs": epochs, "lr": 0.03, **config},
        "provenance": provenance(),
        "parameters": parameters,
        "history": history,
        "links": links,
    }


def plan(network: str, workers: int, codec: str, link: str, bits_per_s: float) -> Record:
    parameters, compute_s = {"resnet50": (25_557_032, 0.12), "gpt2": (124_439_808, 0.35)}[network]
    size, coding_s, _ = CODECS[codec]
    sent = size * parameters * (workers - 1) / workers
    found = step(sent, compute_s, 0.12 * coding_s * parameters, bits_per_s, 0.0)
    return {
        "mode": "plan",
        "config": {"network": network, "workers": workers, "codec": codec, "link": link, "batch_size": 32},
        "provenance": provenance(),
        "parameters": parameters,
        "sent_bytes": round(sent),
        **found,
        "samples_per_s": 32 * workers / found["step_s"],
    }


def cluster(codec: str, seed: int = 0, link: str = "100mbit/1ms", rate: float = 1e8, ranks: int = 4) -> Record:
    run = simulate(codec, ranks, seed)
    options = ["--data", "digits", "--codec", codec, "--seed", str(seed), "--metrics", f"/tmp/{codec}{seed}.jsonl"]
    step_s = step(run["history"][1]["sent_bytes"] / 23, 0.014, 0.004, rate, 0.001)["step_s"]
    seconds = [entry["step"] * step_s * (1 + 0.01 * seed) for entry in run["history"]]
    return {
        "mode": "cluster",
        "config": {"command": ["python", "launch/train.py", *options], "ranks": ranks, "link": link},
        "provenance": provenance(),
        "how": "tbf",
        "probe": {"bits_per_s": 0.961 * rate, "delay_s": 0.00103},
        "status": 0,
        "seconds": seconds[-1] + 4.2,
        "interface_bytes": [round(1.07 * run["history"][-1]["sent_bytes"]) + rank for rank in range(ranks)],
        "history": [{**entry, "seconds": at} for entry, at in zip(run["history"], seconds, strict=True)],
    }


def many() -> list[Record]:
    """Six curves on four, eight and sixteen workers, a text without accuracies, plans and measured runs."""
    kinds = [*((codec, 1) for codec in CODECS), ("none", 11)]
    found = [simulate(codec, w, seed, k) for w in (4, 8, 16) for codec, k in kinds for seed in range(3)]
    found += [
        simulate(codec, 4, seed, data="text", accuracy=False)
        for codec in ("none", "terngrad", "sign")
        for seed in (0, 1, 2)
    ]
    rates = {"100mbit": 1e8, "250mbit": 2.5e8, "1gbit": 1e9, "2.5gbit": 2.5e9, "10gbit": 1e10, "25gbit": 2.5e10}
    rates["100gbit"] = 1e11
    found += [
        plan(network, workers, codec, link, rate)
        for network in ("resnet50", "gpt2")
        for workers in (2, 4, 8, 16, 64, 256)
        for codec in ("none", "fp16", "int8", "terngrad")
        for link, rate in rates.items()
    ]
    found += [
        cluster(codec, seed, link, rate)
        for link, rate in (("100mbit/1ms", 1e8), ("1gbit", 1e9))
        for codec in ("none", "fp16", "int8", "terngrad")
        for seed in (0, 1)
    ]
    return found
