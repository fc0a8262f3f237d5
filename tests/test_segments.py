import pytest
import torch

from terncomm.segments import Segments


def test_defaults_follow_one_another():
    segments = Segments([3, 0, 5])
    assert segments.sizes == (3, 0, 5)
    assert segments.offsets.tolist() == [0, 3, 3]
    assert segments.layers.tolist() == [0, 1, 2]
    assert segments.bases.tolist() == [0, 0, 0]
    assert (segments.numel, segments.extent, len(segments), segments.contiguous) == (8, 8, 3, True)


def test_blocks_cut_each_layer_and_keep_its_number_and_base():
    blocks = Segments([5, 0, 4], offsets=[2, 7, 10], layers=[7, 8, 9]).blocks(2)
    assert blocks.sizes == (2, 2, 1, 2, 2)
    assert blocks.offsets.tolist() == [2, 4, 6, 10, 12]
    assert blocks.layers.tolist() == [7, 7, 7, 9, 9]
    assert blocks.bases.tolist() == [0, 2, 4, 0, 2]
    assert Segments([5]).blocks(None).sizes == (5,)


@pytest.mark.parametrize(("begin", "end"), [(0, 9), (0, 4), (4, 9), (2, 7), (5, 5), (9, 9)])
def test_window_is_a_slice_of_the_dense_order(begin, end):
    segments = Segments([5, 0, 4], offsets=[2, 7, 10], layers=[7, 8, 9])
    layer = torch.repeat_interleave(segments.layers, segments.lengths)
    inside = torch.cat([torch.arange(5), torch.arange(4)])
    window = segments.window(begin, end)
    assert torch.repeat_interleave(window.layers, window.lengths).tolist() == layer[begin:end].tolist()
    counted = [b + i for b, n in zip(window.bases.tolist(), window.sizes, strict=True) for i in range(n)]
    assert counted == inside[begin:end].tolist()
    assert window.numel == end - begin
    assert window.offsets.tolist() == window.starts[:-1].tolist()


def test_take_and_put_leave_the_gaps():
    segments = Segments([2, 3], offsets=[1, 5])
    flat = torch.arange(9.0)
    assert not segments.contiguous
    dense = segments.take(flat)
    assert dense.tolist() == [1, 2, 5, 6, 7]
    segments.put(-dense, flat)
    assert flat.tolist() == [0, -1, -2, 3, 4, -5, -6, -7, 8]
    whole = Segments([2, 3], offsets=[1, 3])
    assert whole.take(flat).data_ptr() == flat[1:].data_ptr(), "contiguous pieces are a view"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [-1]}, "negative"),
        ({"sizes": [1, 2], "offsets": [0]}, "offsets has 1 entries"),
        ({"sizes": [2, 2], "offsets": [0, 1]}, "overlap"),
        ({"sizes": [2**32 + 1]}, "2\\*\\*32"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Segments(**arguments)


def test_a_buffer_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="reach to element 5, the buffer has 4"):
        Segments([5]).check(torch.zeros(4))
    with pytest.raises(ValueError, match="one-dimensional"):
        Segments([4]).check(torch.zeros(2, 2))


def test_equality_and_hash():
    assert Segments([1, 2]) == Segments([1, 2], offsets=[0, 1])
    assert hash(Segments([1, 2])) == hash(Segments([1, 2], offsets=[0, 1]))
    assert Segments([1, 2]) != Segments([1, 2], layers=[0, 5])


def test_columns_are_put_on_a_device_once():
    segments = Segments([3, 0, 5], offsets=[1, 4, 6], layers=[4, 5, 9], bases=[0, 2, 0])
    here = segments.on(torch.device("cpu"))
    assert here.starts.tolist() == [0, 3, 3, 8]
    for name in ("offsets", "bases", "lengths", "layers", "starts"):
        assert torch.equal(getattr(here, name), getattr(segments, name))
    there = segments.on(torch.device("meta"))
    assert {column.device.type for column in there} == {"meta"}
    assert segments.on(torch.device("meta")) is there
