"""Notes that failing ranks leave for the others, and a store that is gone."""

import json
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from terncomm.hooks.notes import FailureNotes, Limits
from terncomm.transports import RankFailed

GROUP = SimpleNamespace(name=lambda: "gloo", options=SimpleNamespace(_timeout=timedelta(seconds=20)))


def notes_of(rank, store):
    return FailureNotes(store, [0, 1, 2], rank, Limits(GROUP))


def told(note):
    """What rank 0 says after rank 1 has left these bytes."""
    store = dist.HashStore()
    store.set("note/1", note)
    store.set("heard/1", "")
    store.set("heard/2", "")
    return str(notes_of(0, store).report(RankFailed("lost"), "bucket 0", lambda: None))


@pytest.mark.parametrize("note", [b"\xff\xfe", b"{", b"[]", b"3", b'{"text": "a"}', b'"words"'])
def test_a_note_that_cannot_be_read_is_shown(note):
    text = told(note)
    assert "rank 1 failed in a step: its note cannot be read: " in text
    assert repr(note) in text


def test_a_note_has_no_control_characters():
    note = {"where": "bucket \x1b[2J1", "text": "ValueError: Grüße\n\x07\x9b", "consequence": False}
    text = told(json.dumps(note))
    assert "rank 1 failed in bucket \\x1b[2J1: ValueError: Grüße\n\\x07\\x9b." in text


def test_limits_follow_the_group():
    group = SimpleNamespace(name=GROUP.name, options=SimpleNamespace(_timeout=timedelta(seconds=20)))
    limits = Limits(group)
    assert (limits.patience_s, limits.timeout()) == (2.0, timedelta(seconds=16))
    group.options._timeout = timedelta(seconds=600)
    assert (limits.patience_s, limits.timeout()) == (5.0, timedelta(seconds=590))
