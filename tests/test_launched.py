"""One process where a launcher has started more."""

import logging

import pytest

from terncomm.transports import launched


@pytest.fixture
def environment(monkeypatch):
    for name in (*launched._SIZES, *launched._RANKS):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_is_only_logged(environment, caplog, recwarn):
    with caplog.at_level(logging.INFO, "terncomm"):
        launched.tell_of_one_process("the framework", "advice")
    assert [record.message for record in caplog.records] == ["one process: there is nothing to compress"]
    assert not recwarn.list


@pytest.mark.parametrize(("size", "rank"), [("WORLD_SIZE", "RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")])
def test_processes_that_train_alone_are_warned_of_once(environment, recwarn, size, rank):
    environment.setenv(size, "4")
    environment.setenv(rank, "1")
    launched.tell_of_one_process("the framework", "advice")
    assert not recwarn.list
    environment.setenv(rank, "0")
    with pytest.warns(UserWarning, match=rf"started 4 processes \({size}\), but the framework sees one.* advice"):
        launched.tell_of_one_process("the framework", "advice")


def test_a_library_that_sees_one_process_of_several_is_refused(environment):
    launched.check_sees_all_processes(1, "a library", "advice")
    environment.setenv("SLURM_STEP_NUM_TASKS", "3")
    launched.check_sees_all_processes(3, "a library", "advice")
    with pytest.raises(ValueError, match="but a library sees one: advice"):
        launched.check_sees_all_processes(1, "a library", "advice")
