import pytest
import torch
from laws import gaussian, same_bits

from terncomm import exchange
from terncomm.transports import LocalTransport, Metered

ALPHABETS = [(-1, 1), (-127, 127), (0, 3)]


def codes_of(world_size: int, n: int, alphabet: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(world_size * 1000 + n)
    return torch.randint(alphabet[0], alphabet[1] + 1, (world_size, n), generator=generator)


@pytest.mark.conformance
@pytest.mark.parametrize("alphabet", ALPHABETS, ids=str)
@pytest.mark.parametrize("world_size", range(1, 10))
def test_all_algorithms_give_the_exact_sum_on_all_ranks(world_size, alphabet):
    for n in (0, 1, 2, 5, 63, 64, 65, 319, 320, 321, 1000, 4099):
        codes = codes_of(world_size, n, alphabet)
        wanted = codes.sum(dim=0).to(torch.int32)
        for algorithm in exchange.ALGORITHMS:
            results = LocalTransport.run(
                world_size, lambda t: exchange.all_reduce(codes[t.rank], alphabet, t, algorithm=algorithm)
            )
            for result in results:
                assert same_bits(result, wanted), (n, algorithm)


def test_the_sum_of_ternary_codes_has_every_level():
    world_size = 4
    codes = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * world_size).T
    for algorithm in ("gather", "two_phase"):
        total = LocalTransport.run(
            world_size, lambda t: exchange.all_reduce(codes[t.rank].contiguous(), (-1, 1), t, algorithm=algorithm)
        )[0]
        assert sorted(set(total.tolist())) == list(range(-world_size, world_size + 1))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_traffic_is_what_is_sent(world_size):
    for alphabet in ALPHABETS:
        for n in (0, 1, 1000, 12_345):
            codes = codes_of(world_size, n, alphabet)
            for algorithm in exchange.ALGORITHMS:

                def work(transport, algorithm=algorithm, codes=codes, alphabet=alphabet):
                    metered = Metered(transport)
                    exchange.all_reduce(codes[transport.rank], alphabet, metered, algorithm=algorithm)
                    return metered.sent_bytes

                wanted = exchange.traffic(algorithm, n, alphabet, world_size)
                assert LocalTransport.run(world_size, work) == [wanted] * world_size


def test_bytes_against_a_float32_ring():
    """Of coded elements, a large bucket: at least 19x fewer at W = 2, 13x at W = 4, 10.5x at W = 8."""
    n = 6_553_600
    for world_size, times in ((2, 19), (4, 13), (8, 10.5)):
        ring = 2 * (world_size - 1) / world_size * 4 * n
        plan = exchange.choose("auto", n, (-1, 1), world_size)
        assert ring / exchange.traffic(plan.algorithm, n, (-1, 1), world_size) > times
        assert exchange.float_traffic(n, 4, world_size) == pytest.approx(ring, rel=1e-6)


def test_auto_takes_the_fewer_bytes_and_one_round_for_small_messages():
    def chosen(n: int, world_size: int) -> str:
        return exchange.choose("auto", n, (-1, 1), world_size).algorithm

    assert chosen(10**6, 2) == "gather"
    assert chosen(10**6, 4) == "two_phase"
    assert chosen(1000, 8) == "gather"
    with pytest.raises(ValueError, match="exchange must be one of auto, gather, two_phase, got 'ring'"):
        exchange.choose("ring", 1, (-1, 1), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_float_mean_is_added_in_rank_order(world_size, dtype):
    for n in (0, 1, 10, 5000):
        values = (gaussian(world_size, n) * 100).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = values[0].to(wide)
        for row in values[1:]:
            total = total + row.to(wide)
        wanted = (total / world_size).to(dtype)

        def work(transport, values=values):
            metered = Metered(transport)
            return exchange.all_reduce_float_mean(values[transport.rank].clone(), metered), metered.sent_bytes

        for result, sent in LocalTransport.run(world_size, work):
            assert same_bits(result, wanted)
            assert sent == exchange.float_traffic(n, values.element_size(), world_size)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_max_over_ranks(world_size):
    values = gaussian(world_size, 1001).abs()
    values[0, 5] = torch.inf
    results = LocalTransport.run(world_size, lambda t: exchange.all_reduce_max(values[t.rank], t))
    assert all(same_bits(result, values.amax(dim=0)) for result in results)
