"""Compares the configurations of all ranks, once, before the first bucket."""

import json
from typing import Any

import torch

from terncomm.path.drivers import blocking
from terncomm.path.reduce import all_gather_number
from terncomm.transports.base import Transport


class ConfigurationsDiffer(RuntimeError):
    """Ranks are configured differently. The message names every field that differs, and its value on each rank."""


def agree_on(configuration: dict[str, Any], transport: Transport, *, device: torch.device) -> None:
    """Compare the configurations of all ranks. Collective: two all-gathers, of the lengths and of the JSON bytes.

    A rank whose options are invalid sends {"refused": reason}. The others then raise at once and do not wait for the
    timeout.

    Args:
        configuration: values that JSON can represent.
        transport: over the ranks to be compared.
        device: where the messages are allocated.

    Raises:
        ConfigurationsDiffer: configurations differ. Every rank raises.
        RanksDiffer: some ranks reduce gradients meanwhile. They raise it too.
    """
    encoded = json.dumps(configuration, sort_keys=True).encode()
    lengths = blocking(all_gather_number(len(encoded), transport.rank, device), transport)
    message = torch.zeros(max(lengths), dtype=torch.uint8)
    message[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    received = transport.all_gather(message.to(device)).cpu()
    configurations = [json.loads(bytes(row[:n].tolist())) for row, n in zip(received, lengths, strict=True)]
    if all(other == configurations[0] for other in configurations):
        return
    refused = {rank: one["refused"] for rank, one in enumerate(configurations) if "refused" in one}
    if refused:
        raise ConfigurationsDiffer(
            "; ".join(f"rank {rank} refused its options: {why}" for rank, why in refused.items())
        )
    lines = []
    for field in sorted({field for one in configurations for field in one}):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(configurations):
            ranks.setdefault(str(one.get(field)), []).append(rank)
        if len(ranks) > 1:
            sides = "; ".join(f"{value} on rank {', '.join(map(str, those))}" for value, those in ranks.items())
            lines.append(f"{field}: {sides}")
    raise ConfigurationsDiffer(
        f"ranks are configured differently. {' | '.join(lines)}. All ranks need the same arguments, model and version"
    )
