"""CPU kernels on one thread against a copy: 25 MB of float32, ratios to `out.copy_(x)` into a warm buffer.

    python benchmarks/kernels.py            # print a table
    python benchmarks/kernels.py --record   # and write benchmarks/results/kernels.csv

Every kernel is timed in turn with the copy, `--rounds` times; a ratio is of the two medians of one run.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from results import write

from terncomm import Int8, Ternary, ops
from terncomm.keys import Key
from terncomm.segments import Segments
from terncomm.wire import packing_for

NUMEL = 25 * 2**20 // 4
ROUNDS = 25


def kernels() -> dict[str, tuple[float, Callable[[], object]]]:
    """Name -> (the ratio it is held to, what to time)."""
    x, out = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)), torch.empty(NUMEL)
    layers = Segments([NUMEL // 4] * 4)
    ternary, int8 = Ternary(clip=2.5), Int8(block=2048)
    limit = ternary.measure(x, layers)
    to_codes = ternary.rounding(layers, limit, limit, Key(0), rank=0, world_size=4)
    three, byte = packing_for(-1, 1), packing_for(-127, 127)
    blocks = int8.scaled(layers)
    peaks = int8.measure(x, blocks)
    to_bytes = int8.rounding(blocks, peaks, peaks, Key(0), rank=0, world_size=4)
    unit = ternary.unit(limit, 4)

    todo: dict[str, tuple[float, Callable[[], object]]] = {
        "limit with sigma": (1.3, lambda: ternary.measure(x, layers)),
        "int8 block peaks": (1.3, lambda: int8.measure(x, blocks)),
    }
    for row_count in (1, 4):
        row = NUMEL // row_count
        edges = range(0, NUMEL + 1, row)
        codes = torch.empty(row_count, three.nbytes(row), dtype=torch.uint8)
        octets = torch.empty(row_count, byte.nbytes(row), dtype=torch.uint8)
        coded, decoded = (x, layers, to_codes, three, edges, row, codes), (codes, three, layers, unit, edges, row, out)
        bytes_coded = x, blocks, to_bytes, byte, edges, row, octets
        ops.encode_pack(*coded)
        ops.encode_pack(*bytes_coded)
        rows = "" if row_count == 1 else f", {row_count} rows"
        todo |= {
            f"ternary encode + pack{rows}": (1.6, lambda coded=coded: ops.encode_pack(*coded)),
            f"int8 encode{rows}": (1.6, lambda coded=bytes_coded: ops.encode_pack(*coded)),
            f"ternary unpack + decode{rows}": (1.0, lambda decoded=decoded: ops.decode_rows(*decoded)),
        }
    where = (layers, unit, 0, NUMEL, NUMEL, out)
    both, half = octets.view(1, -1).repeat(2, 1), int8.unit(peaks, 2)
    todo["int8 sum + decode, W = 2"] = (3.0, lambda: ops.unpack_decode(both, byte, blocks, half, 0, NUMEL, NUMEL, out))
    todo["int8 sum of a row, W = 4"] = (1.0, lambda: ops.unpack_sum(octets, byte, NUMEL // 4))
    for world_size in (4, 8):
        sums = torch.randint(-world_size, world_size + 1, (NUMEL,), dtype=torch.int32)
        packing = packing_for(-world_size, world_size)
        rows = ops.pack(sums, packing)[None]
        name = f"packed sum unpack + decode, W = {world_size}"
        todo[name] = (3.0, lambda rows=rows, packing=packing: ops.unpack_decode(rows, packing, *where))
    return todo


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="write the rows to benchmarks/results/kernels.csv")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source, target = torch.randn(NUMEL), torch.empty(NUMEL)

    rows = []
    for name, (held_to, kernel) in kernels().items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(arguments.rounds + 2):
            for run, into in ((lambda: target.copy_(source), times[0]), (kernel, times[1])):
                begin = time.perf_counter()
                run()
                into.append(time.perf_counter() - begin)
        copy_s, kernel_s = (statistics.median(one[2:]) for one in times)
        rows.append(
            {
                "kernel": name,
                "ratio_to_copy": round(kernel_s / copy_s, 2),
                "held_to": held_to,
                "copy_ms": round(copy_s * 1e3, 3),
                "kernel_ms": round(kernel_s * 1e3, 3),
                "elements": NUMEL,
                "threads": 1,
                "rounds": arguments.rounds,
            }
        )
        print(f"{name:40} {rows[-1]['ratio_to_copy']:6.2f} x copy   (held to {held_to} x)   {kernel_s * 1e3:7.2f} ms")
    if arguments.record:
        write("kernels", rows, beside_others=True)


if __name__ == "__main__":
    main()
