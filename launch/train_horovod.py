"""Train a network with Horovod, its gradients compressed. Horovod is built by launch/build_horovod.sh.

    horovodrun --gloo -np 4 python launch/train_horovod.py --codec terngrad

Beside what any program for Horovod does there is one line: the optimizer is terncomm's, not Horovod's.
"""

import argparse
from itertools import islice

import horovod.torch as hvd
import torch
from torch.utils.data import DataLoader, DistributedSampler

import terncomm.horovod
from terncomm.simulator.workloads import DataError, Options, add_arguments, load


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--codec", choices=["bf16", "int8", "terngrad"], default="terngrad")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16, help="samples per rank and step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.epochs < 1 or args.batch_size < 1:
        parser.error(f"--epochs and --batch-size must be at least 1, got {args.epochs} and {args.batch_size}")
    return args


def main() -> None:
    """Train; after each epoch print a line."""
    args = parse_arguments()
    hvd.init()
    torch.manual_seed(args.seed + hvd.rank())
    try:
        workload = load(args.data, Options(data_dir=args.data_dir, text=args.text, tokens=args.tokens, seed=args.seed))
    except DataError as error:
        raise SystemExit(f"train_horovod.py: {error}" if hvd.rank() == 0 else 1) from None
    network = workload.network
    optimizer = terncomm.horovod.DistributedOptimizer(
        workload.optimizer(network.parameters(), workload.lr), network, args.codec, seed=args.seed
    )
    hvd.broadcast_parameters(network.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    sampler = DistributedSampler(workload.train, num_replicas=hvd.size(), rank=hvd.rank(), seed=args.seed)
    loader = DataLoader(workload.train, batch_size=args.batch_size, sampler=sampler)
    steps = min(len(loader), workload.steps_per_epoch or len(loader))

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        workload.set_epoch(epoch)
        total = torch.zeros(())
        for inputs, labels in islice(loader, steps):
            optimizer.zero_grad()
            loss = workload.loss(network(inputs), labels)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        mean = hvd.allreduce(total / steps, name="loss")
        if hvd.rank() == 0:
            sent = optimizer.averager.stats()["wire_bytes"] / 1e6
            print(f"epoch {epoch + 1:3}/{args.epochs}  train loss {mean:.4f}  sent {sent:8.2f} MB/rank", flush=True)


if __name__ == "__main__":
    main()
