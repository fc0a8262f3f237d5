"""Train a network with DistributedDataParallel, its gradients compressed or not.

Start it with torchrun, for example with 4 processes on this machine:

    torchrun --standalone --nproc-per-node 4 launch/train.py --data digits --codec terngrad

Data sets and their networks are in terncomm/simulator/workloads, or yours: --data FILE.py:FUNCTION. All that concerns
the compression of gradients is one call of `register`, and the statistics that it keeps.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset

import terncomm
from terncomm.simulator.workloads import DataError, Options, Workload, add_arguments, cosine, load

CODECS = ("none", "fp16", "bf16", "int8", "terngrad")
PROGRESS_S = 5.0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--codec", default="terngrad", help=f"{', '.join(CODECS)}, or one of yours as FILE.py:CLASS")
    parser.add_argument("--between-nodes", action="store_true", help="code between nodes alone, average floats inside")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps-per-epoch", type=int, help="at most so many (default: all data; at most 30 for text)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per rank and step (default: %(default)s)")
    parser.add_argument("--lr", type=float, help="learning rate at the start (default: the data's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="saved after each epoch, resumed from if it exists (by rank 0)")
    parser.add_argument(
        "--metrics", type=Path, default=os.environ.get("TERNCOMM_METRICS"), help="file for one JSON line per epoch"
    )
    parser.add_argument("--backend", choices=["gloo", "nccl"], help="default: nccl with a GPU per rank, else gloo")
    args = parser.parse_args()
    if args.codec not in CODECS and ":" not in args.codec:
        parser.error(f"--codec: wanted {', '.join(CODECS)}, or FILE.py:CLASS, got {args.codec}")
    if args.between_nodes and args.codec in ("none", "fp16"):
        parser.error(f"--between-nodes needs a codec of terncomm, got --codec {args.codec}")
    if args.steps_per_epoch is not None and args.steps_per_epoch < 1:
        parser.error(f"--steps-per-epoch must be at least 1, got {args.steps_per_epoch}")
    return args


def device_and_backend(backend: str | None) -> tuple[torch.device, str]:
    """Return this rank's device and the backend that serves it."""
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if backend is None:
        backend = "nccl" if torch.cuda.device_count() >= local_ranks else "gloo"
    if backend == "gloo":
        return torch.device("cpu"), backend
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank), backend


def traffic(state: Any, codec: str, parameters: int, steps: int) -> dict[str, float]:
    """Return the bytes that this rank sent in the last `steps` steps and, where known, the seconds that it took."""
    if state is not None:
        stats = state.stats()
        state.reset_stats()
        names = ("raw_bytes", "wire_bytes", "intra_bytes", "exact_bytes", "encode_s", "exchange_s", "decode_s")
        return {name: stats[name] for name in names if name in stats}
    # Plain DDP counts nothing: a ring all-reduce sends this much, in float32 or float16.
    raw_bytes = 4 * parameters * steps
    world_size = dist.get_world_size()
    wire_bytes = 2 * (world_size - 1) * raw_bytes // world_size // (2 if codec == "fp16" else 1)
    return {"raw_bytes": raw_bytes, "wire_bytes": wire_bytes, "exact_bytes": 0 if codec == "fp16" else wire_bytes}


@torch.no_grad()
def evaluate(network: nn.Module, workload: Workload, device: torch.device) -> tuple[float, float | None]:
    """Return loss and accuracy of the test set, of which each rank takes every W-th sample."""
    shard = Subset(workload.test, range(dist.get_rank(), len(workload.test), dist.get_world_size()))
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    network.eval()
    for inputs, labels in DataLoader(shard, batch_size=workload.test_batch):
        outputs, labels = network(inputs.to(device)), labels.to(device)
        accuracy = workload.accuracy(outputs, labels) if workload.accuracy else torch.zeros(())
        totals += len(labels) * torch.stack([workload.loss(outputs, labels), accuracy, torch.ones(())]).to(totals)
    network.train()
    dist.all_reduce(totals)
    loss, correct, count = totals.tolist()
    return loss / count, correct / count if workload.accuracy else None


def batches(loader: DataLoader[tuple[Tensor, ...]], steps: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the first `steps` batches; on rank 0 a line tells now and then how far it is."""
    started = told = time.perf_counter()
    for step, batch in enumerate(islice(loader, steps)):
        now = time.perf_counter()
        if dist.get_rank() == 0 and now - told > PROGRESS_S:
            told = now
            end = "\r" if sys.stderr.isatty() else "\n"
            left_s = (now - started) / step * (steps - step)
            print(f"{'':8}  step {step:5}/{steps}  {left_s:3.0f} s left", end=end, file=sys.stderr, flush=True)
        yield batch


def train_epoch(
    model: nn.Module,
    workload: Workload,
    loader: DataLoader[tuple[Tensor, ...]],
    steps: int,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> float:
    """Take one step per batch; return the mean loss over steps and ranks."""
    total = torch.zeros((), device=device)
    for inputs, labels in batches(loader, steps):
        optimizer.zero_grad()
        loss = workload.loss(model(inputs.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / steps / dist.get_world_size()


def leave(message: str) -> NoReturn:
    """End all ranks, each of which calls this; rank 0 says why."""
    if dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)
    dist.barrier()  # torchrun ends all ranks when one ends: only after the line is written
    dist.destroy_process_group()
    raise SystemExit(1)


def agree(complaint: str | None) -> None:
    """End all ranks if any has a complaint."""
    complaints: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(complaints, complaint)
    for rank, found in enumerate(complaints):
        if found is not None:
            leave(f"train.py: {found} (rank {rank})")


def resume(path: Path | None, **made_with: str) -> dict[str, Any] | None:
    """Return the checkpoint that rank 0 finds at `path`, on every rank, or None; it must be `made_with` these."""
    found = [torch.load(path, map_location="cpu") if path and dist.get_rank() == 0 and path.exists() else None]
    dist.broadcast_object_list(found)
    (saved,) = found
    for name, wanted in made_with.items():
        if saved is not None and saved.get(name, "") != wanted:
            leave(f"train.py: {path} is of another {name}, {saved.get(name)}, not {wanted}: use another file")
    return saved


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write under another name and rename, so that `path` is a whole checkpoint at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    torch.save(checkpoint, unfinished)
    os.replace(unfinished, path)


def main() -> None:
    """Train; after each epoch print a line and write metrics and a checkpoint."""
    args = parse_arguments()
    if "RANK" not in os.environ:
        raise SystemExit("start this with torchrun: torchrun --standalone --nproc-per-node 4 launch/train.py")
    device, backend = device_and_backend(args.backend)
    torch.manual_seed(args.seed)
    workload, complaint = None, None
    try:
        workload = load(args.data, Options(data_dir=args.data_dir, text=args.text, tokens=args.tokens, seed=args.seed))
    except DataError as error:
        complaint = str(error)
    dist.init_process_group(backend)
    agree(complaint)
    assert workload is not None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(name)s: %(message)s")

    network = workload.network.to(device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    model = DistributedDataParallel(network, bucket_cap_mb=1)  # several buckets though the network is small
    state = None
    if args.codec == "fp16":
        model.register_comm_hook(None, fp16_compress_hook)
    elif args.codec != "none":
        node = dist.new_subgroups(int(os.environ["LOCAL_WORLD_SIZE"]))[0] if args.between_nodes else None
        state = terncomm.register(model, args.codec, seed=args.seed, intra_group=node)

    sampler = DistributedSampler(workload.train, seed=args.seed)
    loader = DataLoader(workload.train, batch_size=args.batch_size, sampler=sampler)
    steps = min(len(loader), args.steps_per_epoch or workload.steps_per_epoch or len(loader))
    args.lr = workload.lr if args.lr is None else args.lr
    optimizer = workload.optimizer(model.parameters(), args.lr)
    schedule = cosine(optimizer, args.epochs)
    kept = {"network": network, "optimizer": optimizer, "schedule": schedule}
    if state is not None:
        kept["compression"] = state

    first, totals, records = 0, Counter[str](), list[str]()
    made_with = {"data": args.data, "codec": args.codec, "fingerprint": workload.fingerprint}
    saved = resume(args.checkpoint, **made_with)
    if saved:
        first, totals, records = saved["epoch"], Counter(saved["totals"]), saved["records"]
        for name, part in kept.items():
            part.load_state_dict(saved[name])
        if rank == 0:
            print(f"{args.codec:8}  resumed from {args.checkpoint} after epoch {first}", flush=True)

    started = time.perf_counter()
    for epoch in range(first, args.epochs):
        sampler.set_epoch(epoch)
        workload.set_epoch(epoch)
        epoch_started = time.perf_counter()
        train_loss = train_epoch(model, workload, loader, steps, optimizer, device)
        step_s = (time.perf_counter() - epoch_started) / steps
        schedule.step()
        totals.update(traffic(state, args.codec, parameters, steps))
        test_loss, test_accuracy = evaluate(network, workload, device)
        if rank != 0:
            continue

        left_s = (time.perf_counter() - started) / (epoch + 1 - first) * (args.epochs - epoch - 1)
        told = f"test loss {test_loss:8.4f}" if test_accuracy is None else f"test accuracy {test_accuracy:7.2%}"
        inside = f", {totals['intra_bytes'] / 1e6:.2f} inside its node" if "intra_bytes" in totals else ""
        print(
            f"{args.codec:8}  epoch {epoch + 1:3}/{args.epochs}  train loss {train_loss:.4f}  "
            f"{told}  sent {totals['wire_bytes'] / 1e6:8.2f} MB/rank{inside}  {left_s:3.0f} s left",
            flush=True,
        )
        record = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * steps,
            "train_loss": train_loss,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "step_s": step_s,
            "seconds": time.perf_counter() - started,
            "sent_bytes": totals["wire_bytes"],
            **totals,
            "bytes_source": "counted by transport" if state is not None else "ring formula",
            **{name: getattr(args, name) for name in ("data", "codec", "seed", "batch_size", "lr")},
            "fingerprint": workload.fingerprint,
            "parameters": parameters,
            "world_size": world_size,
            "backend": backend,
            "torch": torch.__version__,
        }
        records.append(json.dumps(record))
        if args.checkpoint:
            progress = {"epoch": epoch + 1, "totals": dict(totals), "records": records}
            parts = {name: part.state_dict() for name, part in kept.items()}
            save(args.checkpoint, {**made_with, **progress, **parts})
        if args.metrics:
            args.metrics.parent.mkdir(parents=True, exist_ok=True)
            args.metrics.write_text("\n".join(records) + "\n")

    # Without the barrier a rank may leave while gloo's threads still serve another, and abort at exit.
    dist.barrier()
    del model
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
