"""What the ranks of tests/test_horovod.py run under horovodrun and mpirun. torch.distributed must not be needed."""

import hashlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
from golden import BUCKET_CAP_MB, cases
from horovod.common.exceptions import HorovodInternalError
from laws import messages_in_flight_bring_the_same, octets, rows_in_rank_order
from mpi_job import network

from terncomm.horovod import Compression, DistributedOptimizer
from terncomm.transports import HorovodTransport, RankFailed


def loss_of(model, step=0, rank=None):
    generator = torch.Generator().manual_seed(10 * step + (hvd.rank() if rank is None else rank))
    return model(torch.randn(8, 64, generator=generator)).square().mean()


def made(codec="int8", lr=0.1, optimizer=torch.optim.SGD, **options):
    model = network()
    return model, DistributedOptimizer(optimizer(model.parameters(), lr=lr), model, codec, seed=1, **options)


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def close(left, right, rel=0.05):
    """Whether gradients are equal to what 8-bit codes may change."""
    return all((a - b).norm() <= rel * b.norm() for a, b in zip(left, right, strict=True))


def mean_of_ranks(ranks=None):
    """The exact mean gradient of a first step."""
    model = network()
    ranks = range(hvd.size()) if ranks is None else ranks
    for rank in ranks:
        (loss_of(model, rank=rank) / len(ranks)).backward()
    return gradients(model)


def same_everywhere(tensors):
    flat = torch.cat([each.flatten() for each in tensors]).view(1, -1)
    rows = hvd.allgather(flat, name="same_everywhere")
    return bool((rows == rows[0]).all())


def conformance():
    transport = HorovodTransport()
    for k in (0, 1, 7, 1000, 300_001):
        rows_in_rank_order(transport, k)
    messages_in_flight_bring_the_same(transport, (0, 1, 300_001, 7, 1000, 2, 65_537))
    mine = octets(transport.rank, 5)
    for _ in range(20):
        transport.all_gather(mine).zero_()
    assert torch.equal(mine, octets(transport.rank, 5)), "what is received is one's own"


def digest(codec, bucket_cap_mb=25.0):
    """Of the gradients of three steps; as in mpi_job."""
    found = hashlib.sha256()
    model, optimizer = made(codec, lr=0.0, bucket_cap_mb=bucket_cap_mb)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        for gradient in gradients(model):
            found.update(gradient.numpy().tobytes())
    assert optimizer.averager.stats()["steps"] == 3
    return found.hexdigest()


def golden():
    """Digests of every case of this world, by its entry."""
    found = {}
    for case in cases(hvd.size()):
        model = case.network()
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = DistributedOptimizer(sgd, model, bucket_cap_mb=BUCKET_CAP_MB, **case.options)
        found[case.entry] = case.run(hvd.rank(), model, optimizer.step)
    return found


def weights_stay_together():
    model, optimizer = made("terngrad", optimizer=torch.optim.Adam, lr=0.01)
    if hvd.rank() == 1:
        [parameter.data.add_(1.0) for parameter in model.parameters()]
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        schedule.step()
    assert same_everywhere(model.parameters())
    assert optimizer.averager.stats()["steps"] == 4, "initializing Adam's state took no reduction"


def passes_add_up():
    model, optimizer = made(backward_passes_per_step=2)
    loss_of(model).backward()
    assert not optimizer._reducer.has_pending
    loss_of(model).backward()
    optimizer.synchronize()
    assert close(gradients(model), [2 * each for each in mean_of_ranks()])
    assert optimizer.averager.stats()["steps"] == 1
    optimizer.set_backward_passes_per_step(1)
    with optimizer.skip_synchronize():
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="more than backward_passes_per_step=1 times"):
        loss_of(model).backward()
    with pytest.raises(RuntimeError, match="on their way"):
        optimizer.zero_grad()
    optimizer.step()


def clipping_between():
    model, optimizer = made()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="needs synchronize"), optimizer.skip_synchronize():
        optimizer.step()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    clipped = gradients(model)
    with optimizer.skip_synchronize():
        optimizer.step()
    for parameter, old, gradient in zip(model.parameters(), before, clipped, strict=True):
        torch.testing.assert_close(parameter, old - 0.1 * gradient)
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.synchronize()
    once = gradients(model)
    with pytest.warns(UserWarning, match="averaged already"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(once, gradients(model), strict=True))


def sums():
    model, optimizer = made(op=hvd.Sum)
    loss_of(model).backward()
    optimizer.synchronize()
    assert close(gradients(model), [hvd.size() * each for each in mean_of_ranks()])
    with pytest.raises(ValueError, match="Adasum"):
        made(op=hvd.Adasum)


def closures():
    model, optimizer = made()
    told = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        told.append(float(loss.detach()))
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(optimizer.step(closure).detach()) == told[0]
        optimizer.step(closure)
    assert optimizer.averager.stats()["steps"] == 2
    assert same_everywhere(gradients(model))


def layers_that_some_ranks_skip():
    model, optimizer = made()
    loss = model[:3](torch.ones(2, 64)) if hvd.rank() else model(torch.ones(2, 64))
    loss.sum().backward()
    optimizer.step()
    assert same_everywhere(gradients(model))


def other_ranks_step_alone():
    """A process set of the first ranks; the last is not in it."""
    few = hvd.add_process_set(range(hvd.size() - 1))
    model, optimizer = made(process_set=few)
    loss_of(model).backward()
    local = gradients(model) if hvd.rank() == hvd.size() - 1 else None
    optimizer.step()
    if local is None:
        assert close(gradients(model), mean_of_ranks(range(hvd.size() - 1)))
    else:
        assert optimizer.averager is None
        assert all(torch.equal(a, b) for a, b in zip(local, gradients(model), strict=True))
    hvd.barrier()


def resumed():
    """The noise goes on where a checkpoint left it; hooks of the optimizer run once."""
    model, optimizer = made("terngrad", lr=0.0)
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
        saved = optimizer.state_dict()
        wanted = gradients(model)
        optimizer.zero_grad()
        if step == 0:
            first = saved = json.loads(json.dumps(saved))
    again, other = made("terngrad", lr=0.0)
    called = []
    other.register_step_pre_hook(lambda *_: called.append(1))
    other.load_state_dict(first)
    loss_of(again, 1).backward()
    other.step()
    assert called == [1]
    assert all(torch.equal(a, b) for a, b in zip(wanted, gradients(again), strict=True))
    third, last = made("terngrad", lr=0.0)
    last.averager.load_state_dict({"step": 0, "seed": 1})
    loss_of(third, 1).backward()
    last.step()
    assert all(torch.equal(a, b) for a, b in zip(wanted, gradients(third), strict=True))
    assert last.state_dict()["param_groups"][0]["terncomm_step"] == 1
    last.averager.disable()
    off = json.loads(json.dumps(last.state_dict()))
    last.averager.enable()
    last.load_state_dict(off)
    assert not last.averager.enabled
    last.averager.enable()
    assert last.state_dict()["param_groups"][0]["terncomm_enabled"]


def refused():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="lacks 1 of the optimizer's parameters, of shapes \\(5,\\)"):
        DistributedOptimizer(sgd, list(model.named_parameters())[:-1])
    with pytest.raises(ValueError, match=r"the optimizer does not hold 2\.weight of the module"):
        DistributedOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="LBFGS"):
        DistributedOptimizer(torch.optim.LBFGS(model.parameters()), model)
    with pytest.raises(ValueError, match="distributed already"):
        DistributedOptimizer(made()[1], model)
    with pytest.raises(ValueError, match="backward_passes_per_step must be a positive int, got 0"):
        DistributedOptimizer(sgd, model, backward_passes_per_step=0)
    with pytest.raises(RuntimeError, match="seed: 0 on rank 0; 1 on rank 1"):
        DistributedOptimizer(sgd, model, seed=min(hvd.rank(), 1))
    rows = torch.nn.Embedding(5, 4, sparse=True)
    optimizer = DistributedOptimizer(torch.optim.SGD(rows.parameters(), lr=0.1), rows)
    rows.weight.grad = torch.zeros(5, 4).to_sparse()
    with pytest.raises(TypeError, match=r"got one of layout torch\.sparse_coo"):
        optimizer.step()


def as_programs_of_horovod_call_it():
    """Every argument that hvd.DistributedOptimizer has."""
    model, optimizer = made(
        compression=hvd.Compression.none,
        gradient_predivide_factor=2.0,
        num_groups=2,
        groups=None,
        sparse_as_dense=True,
        backward_passes_per_step=1,
        op=hvd.Average,
        process_set=hvd.global_process_set,
    )
    loss_of(model).backward()
    optimizer.step()
    assert close(gradients(model), mean_of_ranks())
    with pytest.raises(ValueError, match="here codec= says how gradients travel"):
        made(compression=hvd.Compression.fp16)
    with pytest.raises(TypeError, match="'warmup'"):
        made(warmup=1)
    with pytest.raises(RuntimeError, match="add parameter groups before"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    unnamed = network()
    plain = DistributedOptimizer(torch.optim.SGD(unnamed.parameters(), lr=0.1), codec="int8", exempt=())
    loss_of(unnamed).backward()
    plain.step()
    assert close(gradients(unnamed), mean_of_ranks())
    rows = torch.nn.Embedding(5, 4, sparse=True)
    optimizer = DistributedOptimizer(torch.optim.SGD(rows.parameters(), lr=0.1), rows, sparse_as_dense=True)
    rows(torch.tensor([hvd.rank()])).sum().backward()
    optimizer.step()
    wanted = torch.zeros(5, 4)
    wanted[: hvd.size()] = 1 / hvd.size()
    torch.testing.assert_close(rows.weight.grad, wanted)


def compressions():
    for name in ("terngrad", "int8"):
        with pytest.raises(TypeError, match=r"cannot be one of Horovod's compressions: .*DistributedOptimizer"):
            getattr(Compression, name)
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), compression=Compression.fp16)
    loss_of(model).backward()
    optimizer.synchronize()
    assert close(gradients(model), mean_of_ranks(), rel=2e-3)
    large = torch.full((4,), 60000.0)
    assert hvd.allreduce(large, name="large", compression=Compression.fp16).tolist() == large.tolist()
    assert torch.isinf(hvd.allreduce(large, name="larger", compression=hvd.Compression.fp16)).any()
    assert hvd.allreduce(torch.ones(2, dtype=torch.int64), op=hvd.Sum, compression=Compression.fp16).sum() > 2


def semantics():
    for each in (conformance, weights_stay_together, passes_add_up, clipping_between, sums, closures):
        each()
    for each in (layers_that_some_ranks_skip, resumed, refused, as_programs_of_horovod_call_it, compressions):
        each()
    other_ranks_step_alone()


def together():
    """The digest of each codec; and everything that Horovod's users expect."""
    found = {codec: digest(codec) for codec in ("terngrad", "int8")}
    semantics()
    return found


def out_of_step():
    """Messages of the same number and other sizes: Horovod tells all ranks, they do not wait for the timeout."""
    for kind, rows in (("all_gather", ()), ("all_to_all", (2,))):
        transport = HorovodTransport(timeout_s=60.0)
        transport.all_gather(octets(0, 5))
        _, transfers = transport.begin(kind, octets(0, *rows, 10 + hvd.rank()))
        wait, began = next(transfers), time.monotonic()
        with pytest.raises(HorovodInternalError, match="Mismatched"):
            wait()
        assert time.monotonic() - began < 10
        with pytest.raises(RankFailed, match="an earlier exchange over Horovod failed"):
            transport.all_gather(octets(0, 5))


def raises():
    model, optimizer = made()
    if hvd.rank() == 1:
        raise KeyError("rank 1 broke")
    loss_of(model).backward()
    optimizer.step()


def killed():
    model, optimizer = made()
    if hvd.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loss_of(model).backward()
    optimizer.step()


def silent():
    """A rank that does not come is waited for until the timeout, and its error names what was waited for."""
    model, optimizer = made(timeout_s=4.0)  # making it waits for the others too
    if hvd.rank() == 1:
        time.sleep(9)
        os._exit(0)
    loss_of(model).backward()
    begin = time.monotonic()
    with pytest.raises(RankFailed, match=r"not all of 2 ranks have come within 4 s"):
        optimizer.step()
    assert time.monotonic() - begin < 8
    Path(sys.argv[1], "told").touch()
    os._exit(0)  # Horovod waits for the other rank


def main():
    torch.set_num_threads(1)
    hvd.init()
    folder, what, *arguments = sys.argv[1:]
    known = {each.__name__: each for each in (together, golden, out_of_step, raises, killed, silent)}
    result = known[what](*arguments)
    assert not torch.distributed.is_initialized()
    Path(folder, str(hvd.rank())).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
