"""Prediction against measurement: real DDP jobs on really limited links, and what the simulator says of them.

    python benchmarks/validate_simulator.py                # as root; some minutes
    python benchmarks/validate_simulator.py --record       # and write benchmarks/results/validation.csv
    unshare -rn python benchmarks/validate_simulator.py    # without root, where user namespaces are allowed

One network namespace per rank. In each job, before anything is predicted, three things are measured, all ranks at the
same time: collective calls of other sizes than the job's, codecs against an echo on other sizes than its buckets, and
forward and backward with a hook that does nothing. From these, and from the layers, the step time of each codec is
predicted; then it is measured. Bytes are compared with the interface's counter: predicted are the payload's, by the
formulas, times what the interface counted for a byte of a bulk transfer (headers and acknowledgements). That
transfer is an all-reduce, so for "none" this checks little more than the ring's formula.
"""

import argparse
import json
import os
import statistics
import sys
import time

from limited_ranks import lines

from terncomm.cluster.namespaces import NotPermitted, traffic

CODECS = ("none", "fp16", "int8", "terngrad")
# Layers, width, samples: little to compute and much to send; much to compute; many small layers in several buckets.
JOBS = {"light": (4, 1024, 2), "heavy": (4, 1024, 448), "deep": (24, 320, 320)}
BUCKET_CAP_MB = 6
STEPS = 9


def network(job):
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers, width, _ = JOBS[job]
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())))


def rank_main(names: list[str]) -> None:
    """One rank: calibrate, then profile, predict and measure each job; rank 0 prints a JSON line for each point."""
    import torch
    import torch.distributed as dist

    from terncomm.simulator import codec_costs
    from terncomm.simulator.calibrate import calibrate

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    calibration = calibrate(
        dist.group.WORLD, tell=lambda line: print(line, file=sys.stderr) if dist.get_rank() == 0 else None
    )
    costs = codec_costs.over_group(CODECS[1:], calibration.fabric, dist.group.WORLD, sizes=(3 << 15, 3 << 19))
    costs["none"] = codec_costs.FREE
    if dist.get_rank() == 0:
        print(calibration, costs, file=sys.stderr)
    headers = bytes_per_payload_byte()
    for name in names:
        for codec in CODECS:
            point = measure(name, codec, calibration, costs[codec])
            point["predicted_bytes"] = round(headers * point["payload_bytes"])
            if dist.get_rank() == 0:
                print(json.dumps(point), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def settled_traffic():
    """Bytes sent by this rank's interface, once what it has sent last is no longer waiting for the link."""
    import torch.distributed as dist

    dist.barrier()
    time.sleep(0.05)
    return traffic()[0]


def bytes_per_payload_byte():
    """What the interface counts for a byte that is sent: headers and acknowledgements of this link."""
    import torch
    import torch.distributed as dist

    world_size = dist.get_world_size()
    values = torch.zeros(800_000)
    before = settled_traffic()
    for _ in range(4):
        dist.all_reduce(values)
    counted = torch.tensor([float(settled_traffic() - before)], dtype=torch.float64)
    dist.all_reduce(counted)
    return float(counted) / world_size / (4 * 2 * (world_size - 1) / world_size * values.nbytes)


def measure(name, codec, calibration, cost):
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.nn.parallel import DistributedDataParallel

    import terncomm
    from terncomm.layers import Layers
    from terncomm.simulator.buckets import rebuilt_buckets
    from terncomm.simulator.predict import load_of, predict
    from terncomm.simulator.predict import sent_bytes as predicted_bytes
    from terncomm.simulator.reductions import reduction_for
    from terncomm.simulator.timeline import Compute

    world_size = dist.get_world_size()
    _, width, samples = JOBS[name]
    inputs = torch.randn(samples, width, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step(model):
        """Seconds until the backward pass begins, and until the step ends."""
        dist.barrier()
        began = time.perf_counter()
        loss = model(inputs).square().mean()
        model.began = time.perf_counter()
        loss.backward()
        found = [model.began - began, time.perf_counter() - began]
        model.zero_grad()
        return found

    def slowest(times):
        """Of each time, the longest of all ranks."""
        times = torch.tensor(times, dtype=torch.float64)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return times

    # Computing alone: DDP with a hook that has nothing to do, and takes the time at which each bucket is there.
    ready: dict[int, list[float]] = {}
    order: list[torch.Tensor] = []
    alone = DistributedDataParallel(network(name), bucket_cap_mb=BUCKET_CAP_MB)

    def nothing(_, bucket):
        ready.setdefault(bucket.index(), []).append(time.perf_counter() - alone.began)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    alone.register_comm_hook(None, nothing)
    for parameter in alone.parameters():
        parameter.register_post_accumulate_grad_hook(order.append)
    model = DistributedDataParallel(network(name), bucket_cap_mb=BUCKET_CAP_MB)
    if codec == "fp16":
        model.register_comm_hook(None, fp16_compress_hook)
    elif codec != "none":
        terncomm.register(model, codec, exempt=())
    for _ in range(3):
        step(alone)
        step(model)
    ready.clear()

    # In turn, so that what else the machine does meets both alike.
    computing, measured, sent = [], [], []
    for _ in range(STEPS):
        computing.append(step(alone))
        before = settled_traffic()
        measured.append(step(model)[1])
        sent.append(settled_traffic() - before)
    computing, measured = slowest(computing), slowest(measured).tolist()
    ready_s = slowest([statistics.median(ready[index]) for index in sorted(ready)])
    forward_s, whole_s = (statistics.median(column) for column in computing.T.tolist())
    compute = Compute(forward_s, tuple(ready_s.tolist()), whole_s - forward_s)

    parameters = list(dict.fromkeys(order))
    layers = Layers(alone.module.named_parameters(), exempt=())
    buckets = [layers.of_bucket(bucket) for bucket in rebuilt_buckets(parameters, BUCKET_CAP_MB)]
    loads = [load_of(*bucket, reduction_for(codec), world_size) for bucket in buckets]
    cores = len(os.sched_getaffinity(0)) / world_size
    predicted = predict(compute, loads, world_size, calibration.fabric, cost, cores=cores)
    low, middle, high = statistics.quantiles(measured, n=4)
    dist.barrier()
    return {
        "job": name,
        "codec": codec,
        "world_size": world_size,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "buckets": len(buckets),
        "measured_ms": 1e3 * middle,
        "iqr_ms": 1e3 * (high - low),
        "predicted_ms": 1e3 * predicted.step_s,
        "compute_ms": 1e3 * predicted.compute_s,
        "codec_ms": 1e3 * sum(sum(cost.seconds(load.elements)) for load in loads if load.elements),
        "exposed_exchange_ms": 1e3 * predicted.exchange_s,
        "interface_bytes": statistics.median(sent),
        "payload_bytes": predicted_bytes(loads, world_size),
    }


def judged(point):
    """A row: the point, and whether prediction and measurement agree."""
    time_error = point["predicted_ms"] / point["measured_ms"] - 1
    bytes_error = point["predicted_bytes"] / point["interface_bytes"] - 1
    spread = point["iqr_ms"] / point["measured_ms"]
    share = min(1.0, (point["compute_ms"] + point["codec_ms"]) / point["measured_ms"])
    return {
        **{name: round(value, 2) if isinstance(value, float) else value for name, value in point.items()},
        "time_error_percent": round(100 * time_error, 2),
        "allowed_percent": round(100 * max(0.1, 2 * spread), 2),
        "bytes_error_percent": round(100 * bytes_error, 2),
        "spread_percent": round(100 * spread, 2),
        "compute_and_codec_share": round(share, 3),
        "within": abs(time_error) <= max(0.1, 2 * spread),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--record", action="store_true", help="write the rows to benchmarks/results/validation.csv")
    parser.add_argument("--rank-of", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        rank_main(arguments.rank_of)
        return
    rows = []
    try:
        for rate in arguments.rates:
            for ranks in arguments.ranks:
                for point in lines(__file__, ["--rank-of", *arguments.jobs], ranks, rate):
                    rows.append(judged({"link": rate, **point}))
                    row = rows[-1]
                    print(
                        f"{rate:8} W={ranks} {row['job']:6} {row['codec']:9} measured {row['measured_ms']:8.1f} ms "
                        f"(IQR {row['spread_percent']:4.1f} %)  predicted {row['predicted_ms']:8.1f} ms  "
                        f"{row['time_error_percent']:+6.1f} %  bytes {row['bytes_error_percent']:+5.2f} %  "
                        f"compute+codec {row['compute_and_codec_share']:.0%}  {'' if row['within'] else 'OUT'}",
                        flush=True,
                    )
    except NotPermitted as error:
        raise SystemExit(f"validate_simulator.py: {error}") from None
    quiet = [abs(row["time_error_percent"]) for row in rows if row["spread_percent"] <= 5]
    busy = sum(row["compute_and_codec_share"] >= 0.4 for row in rows)
    print(
        f"{sum(row['within'] for row in rows)} of {len(rows)} points within the larger of 10 % and twice the IQR; "
        f"{len(quiet)} quiet ones, median error {statistics.median(quiet or [float('nan')]):.1f} %; "
        f"bytes at most {max(abs(row['bytes_error_percent']) for row in rows):.2f} % off; "
        f"{busy} points with compute and codec at 40 % of the step or more"
    )
    if arguments.record:
        from results import write

        write("validation", rows)


if __name__ == "__main__":
    main()
