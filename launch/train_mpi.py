"""Train a network over MPI, its gradients compressed or not; torch.distributed is not used.

    mpirun -n 4 python launch/train_mpi.py --codec terngrad

All that concerns the gradients is an averager, and its `reduce()` after each backward pass.
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import torch
from mpi4py import MPI
from torch.utils.data import DataLoader, DistributedSampler, Subset

import terncomm
from terncomm.simulator.workloads import DataError, Options, Workload, add_arguments, cosine, load
from terncomm.transports import MPITransport


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--codec", choices=["none", "bf16", "int8", "terngrad"], default="terngrad")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16, help="samples per rank and step (default: %(default)s)")
    parser.add_argument("--lr", type=float, help="learning rate at the start (default: the data's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--metrics", type=Path, help="file for one JSON line per epoch")
    args = parser.parse_args()
    if args.epochs < 1 or args.batch_size < 1:
        parser.error(f"--epochs and --batch-size must be at least 1, got {args.epochs} and {args.batch_size}")
    return args


@torch.no_grad()
def evaluate(workload: Workload, comm: MPI.Comm) -> tuple[float, float | None]:
    """Return loss and accuracy of the test set, of which each rank takes every W-th sample."""
    shard = Subset(workload.test, range(comm.rank, len(workload.test), comm.size))
    loss = correct = 0.0
    workload.network.eval()
    for inputs, labels in DataLoader(shard, batch_size=workload.test_batch):
        outputs = workload.network(inputs)
        loss += len(labels) * float(workload.loss(outputs, labels))
        correct += len(labels) * float(workload.accuracy(outputs, labels)) if workload.accuracy else 0.0
    workload.network.train()
    loss, correct, count = comm.allreduce(loss), comm.allreduce(correct), len(workload.test)
    return loss / count, correct / count if workload.accuracy else None


def main() -> None:
    """Train; after each epoch print a line and write metrics."""
    args = parse_arguments()
    comm = MPI.COMM_WORLD
    torch.manual_seed(args.seed)  # so all ranks start from the same weights
    try:
        workload = load(args.data, Options(data_dir=args.data_dir, text=args.text, tokens=args.tokens, seed=args.seed))
    except DataError as error:
        raise SystemExit(f"train_mpi.py: {error}" if comm.rank == 0 else 1) from None
    network = workload.network
    averager = terncomm.GradientAverager(
        network, "terngrad" if args.codec == "none" else args.codec, MPITransport(), seed=args.seed
    )
    if args.codec == "none":
        averager.disable()
    sampler = DistributedSampler(workload.train, num_replicas=comm.size, rank=comm.rank, seed=args.seed)
    loader = DataLoader(workload.train, batch_size=args.batch_size, sampler=sampler)
    steps = min(len(loader), workload.steps_per_epoch or len(loader))
    optimizer = workload.optimizer(network.parameters(), workload.lr if args.lr is None else args.lr)
    schedule = cosine(optimizer, args.epochs)

    records, started = [], time.perf_counter()
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        workload.set_epoch(epoch)
        total = 0.0
        for inputs, labels in islice(loader, steps):
            optimizer.zero_grad()
            loss = workload.loss(network(inputs), labels)
            loss.backward()
            averager.reduce()
            optimizer.step()
            total += float(loss.detach())
        schedule.step()
        train_loss = comm.allreduce(total) / steps / comm.size
        test_loss, test_accuracy = evaluate(workload, comm)
        stats, seconds = averager.stats(), time.perf_counter() - started
        if comm.rank != 0:
            continue
        left_s = seconds / (epoch + 1) * (args.epochs - epoch - 1)
        told = f"test loss {test_loss:8.4f}" if test_accuracy is None else f"test accuracy {test_accuracy:7.2%}"
        print(
            f"{args.codec:8}  epoch {epoch + 1:3}/{args.epochs}  train loss {train_loss:.4f}  {told}  "
            f"sent {stats['wire_bytes'] / 1e6:8.2f} MB/rank  {left_s:3.0f} s left",
            flush=True,
        )
        record = {"epoch": epoch + 1, "train_loss": train_loss, "test_loss": test_loss, "test_accuracy": test_accuracy}
        names = {name: getattr(args, name) for name in ("data", "codec", "seed", "batch_size")}
        records.append({**record, **names, "world_size": comm.size, "seconds": seconds, **stats})
        if args.metrics:
            args.metrics.parent.mkdir(parents=True, exist_ok=True)
            args.metrics.write_text("".join(json.dumps(each) + "\n" for each in records))


if __name__ == "__main__":
    main()
