"""Do all ranks have the same configuration? Asked once, before the first bucket."""

import json
from typing import Any

import torch

from terncomm.path.drivers import blocking
from terncomm.path.reduce import joined
from terncomm.transports.base import Transport


class ConfigurationsDiffer(RuntimeError):
    """Ranks were configured differently; the message names every field that differs, with both sides."""


def agree_on(configuration: dict[str, Any], transport: Transport, *, device: torch.device) -> None:
    """Compare a JSON-able configuration over all ranks; two messages, JSON bytes.

    A rank that cannot take part sends {"refused": why}, so that the others need not wait for it.

    Raises:
        ConfigurationsDiffer: on every rank.
        RanksDiffer: some ranks reduce gradients meanwhile.
    """
    mine = json.dumps(configuration, sort_keys=True).encode()
    lengths = blocking(joined(len(mine), transport.rank, device), transport)
    message = torch.zeros(max(lengths), dtype=torch.uint8)
    message[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    received = transport.all_gather(message.to(device)).cpu()
    told = [json.loads(bytes(row[:n].tolist())) for row, n in zip(received, lengths, strict=True)]
    if all(other == told[0] for other in told):
        return
    refused = {rank: one["refused"] for rank, one in enumerate(told) if "refused" in one}
    if refused:
        raise ConfigurationsDiffer(
            "; ".join(f"rank {rank} refused its options: {why}" for rank, why in refused.items())
        )
    lines = []
    for field in sorted({field for one in told for field in one}):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(told):
            ranks.setdefault(str(one.get(field)), []).append(rank)
        if len(ranks) > 1:
            sides = "; ".join(f"{value} on rank {', '.join(map(str, who))}" for value, who in ranks.items())
            lines.append(f"{field}: {sides}")
    raise ConfigurationsDiffer("ranks are configured differently. " + " | ".join(lines))
