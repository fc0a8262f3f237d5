"""Does the simulator see what it should? Two faults that gradient codecs are known for, planted on purpose.

    python benchmarks/planted_faults.py             # a minute or two
    python benchmarks/planted_faults.py --record    # and write benchmarks/results/planted_faults.csv

Each is trained with as TernGrad is, from the same seeds. The error of the averaged gradient is compared seed by seed,
for seeds differ more than faults do; the loss of so short a run shows none of them.
"""

import argparse
import statistics
from dataclasses import replace

import torch

from terncomm import Ternary
from terncomm.keys import Key
from terncomm.path.account import Context
from terncomm.path.drivers import lockstep
from terncomm.path.reduce import all_reduce_mean
from terncomm.reduce import bucket_of
from terncomm.segments import Segments
from terncomm.simulator.reductions import Coded
from terncomm.simulator.simulate import Experiment, simulate
from terncomm.simulator.workloads import Options


class OneScalePerBucket(Coded):
    """The bucket's largest limit scales all its layers: those with small gradients drown."""

    def path(self, flat, coded, exact, ctx):
        dense, rest = coded.take(flat).clone(), flat.clone()
        if coded.numel:
            yield from all_reduce_mean(dense, bucket_of(Segments([coded.numel]), self.codec), ctx)
        apart = replace(ctx, key=Key(ctx.key.seed, ctx.key.step, 99))
        yield from all_reduce_mean(rest, bucket_of(Segments(()), None, exact), apart)
        exact.put(exact.take(rest), flat)
        coded.put(dense, flat)


class RoundedTwice(Coded):
    """The mean is ternarized once more on its way back: that error no averaging makes smaller."""

    def path(self, flat, coded, exact, ctx):
        yield from super().path(flat, coded, exact, ctx)
        if coded.numel:
            alone = Context(Key(ctx.key.seed + 1, ctx.key.step), 0, 1)
            lockstep([all_reduce_mean(flat, bucket_of(coded, self.codec), alone)])


KINDS = {"terngrad": Coded, "one scale per bucket": OneScalePerBucket, "mean rounded again": RoundedTwice}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="write the rows to benchmarks/results/planted_faults.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, sound = [], []
    for name, kind in KINDS.items():
        found = []
        for seed in range(3):
            options = Options(tokens="bytes")
            experiment = Experiment(
                data="text", options=options, workers=16, batch_size=2, epochs=1, steps_per_epoch=21, seed=seed
            )
            found.append(simulate(experiment, reduction=kind(Ternary()))["history"][-1])
        errors = [point["gradient_error"] for point in found]
        sound = errors if kind is Coded else sound
        times = [error / base for error, base in zip(errors, sound, strict=True)]
        rows.append(
            {
                "what": name,
                "data": "text (bytes)",
                "world_size": 16,
                "steps": 21,
                "seeds": 3,
                "gradient_error": round(statistics.fmean(errors), 4),
                "times_terngrads_lowest_seed": round(min(times), 3),
                "times_terngrads_highest_seed": round(max(times), 3),
                "test_loss": round(statistics.fmean(point["test_loss"] for point in found), 4),
            }
        )
        print(rows[-1], flush=True)
    if arguments.record:
        from results import write

        write("planted_faults", rows)


if __name__ == "__main__":
    main()
