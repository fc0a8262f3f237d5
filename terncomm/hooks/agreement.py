"""Compares the configurations of all ranks, once, before the first bucket."""

import json
from itertools import zip_longest
from typing import Any

import torch

from terncomm.path.drivers import blocking
from terncomm.path.reduce import all_gather_number
from terncomm.transports.base import Transport

_LONG = 200  # characters of a value that is told whole
_NAMES = 5  # of a list that are told at most


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
    raise ConfigurationsDiffer(
        f"ranks are configured differently. {' | '.join(differences(configurations))}. All ranks need the same "
        "arguments, model and version"
    )


def differences(configurations: list[dict[str, Any]]) -> list[str]:
    """The fields in which configurations differ, with what each rank has. Of long values only what differs.

    >>> differences([{"seed": 1, "exchange": "auto"}, {"seed": 2, "exchange": "auto"}])
    ['seed: 1 on rank 0; 2 on rank 1']
    """
    lines = []
    for field in sorted({field for one in configurations for field in one}):
        values = [one.get(field) for one in configurations]
        ranks: dict[str, list[int]] = {}
        for rank, told in enumerate(_told(values)):
            ranks.setdefault(told, []).append(rank)
        if len(ranks) > 1:
            sides = "; ".join(f"{told} on rank {', '.join(map(str, those))}" for told, those in ranks.items())
            lines.append(f"{field}: {sides}")
    return lines


def _told(values: list[Any]) -> list[str]:
    """Each value in words: whole if all are short; of longer lists, what not all have in common."""
    whole = [str(value) for value in values]
    if max(map(len, whole)) <= _LONG or len(set(whole)) == 1:
        return whole
    if not all(isinstance(value, list) for value in values):
        return [_shortened(text, whole) for text in whole]
    common = set.intersection(*(set(map(str, value)) for value in values))
    told = []
    for value in values:
        own = [str(each) for each in value if str(each) not in common]
        more = f" and {len(own) - _NAMES} more" if len(own) > _NAMES else ""
        told.append(f"{', '.join(own[:_NAMES]) or 'nothing'}{more} beside {len(common)} in common")
    if len(set(told)) == 1:  # another order, or some several times
        place = next(place for place, each in enumerate(zip_longest(*values)) if len(set(map(str, each))) > 1)
        told = [f"{value[place] if place < len(value) else 'nothing'} at place {place}" for value in values]
    return told


def _shortened(text: str, others: list[str]) -> str:
    """A part of `text` around the first character in which it differs from `others`."""
    same = next((place for place, each in enumerate(zip_longest(*others)) if len(set(each)) > 1), 0)
    begin = max(same - _LONG // 4, 0)
    before, after = "..." if begin else "", "..." if len(text) > begin + _LONG else ""
    return before + text[begin : begin + _LONG] + after
