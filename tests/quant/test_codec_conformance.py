"""Every codec keeps the contract of ``headrace.quant.codec``; a new codec adds a line here."""

import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headrace.quant import CounterGenerator, blocks, codec_from_parameters
from headrace.quant.casts import Bfloat16Codec, ScaledFloat16Codec
from headrace.quant.coat import CoatCodec
from headrace.quant.companded import Companded4Codec, Companded8Codec
from headrace.quant.fp4 import Fp4Codec
from headrace.quant.fp8 import Fp8Codec
from headrace.quant.fp8_grid import Fp8GridCodec
from headrace.quant.int4_group import Int4GroupCodec
from headrace.quant.int8_blockwise import Int8BlockwiseCodec
from headrace.quant.int8_rowwise import Int8RowwiseCodec
from headrace.quant.mxfp4 import Mxfp4Codec
from headrace.quant.mxfp8 import Mxfp8Codec
from headrace.quant.nf4 import Nf4Codec
from headrace.quant.nvfp4 import Nvfp4Codec

CODECS = [
    CoatCodec(),
    CoatCodec(block_size=7),
    Bfloat16Codec(),
    Companded4Codec(),
    Companded4Codec(signed=False),
    Companded8Codec(),
    Companded8Codec(signed=False),
    ScaledFloat16Codec(),
    Fp4Codec(),
    Fp4Codec(double_quantized=False),
    Fp8Codec(),
    Fp8Codec(granularity="tensor"),
    Fp8Codec(element="e5m2"),
    Fp8Codec(element="e5m2", granularity="group", block_size=16),
    Fp8Codec(granularity="group", block_size=128),
    Fp8GridCodec(),
    Fp8GridCodec(block_rows=0, block_columns=0, scale_dtype="float16"),
    Fp8GridCodec(element="e5m2", block_rows=1, block_columns=0, scale_dtype="bfloat16"),
    Fp8GridCodec(block_rows=3, block_columns=32),
    Int4GroupCodec(),
    Int4GroupCodec(block_size=32, scale_dtype="float32"),
    Int4GroupCodec(block_size=0, scale_dtype="float16"),
    Int4GroupCodec(mode="unsigned"),
    Int4GroupCodec(mode="affine", block_size=64),
    Int8BlockwiseCodec(),
    Int8BlockwiseCodec(block_size=64),
    Int8BlockwiseCodec(signed=False),
    Int8RowwiseCodec(),
    Int8RowwiseCodec(block_size=64),
    Int8RowwiseCodec(scale_is_amax=True),
    Mxfp4Codec(),
    Mxfp4Codec(scale_rule="floor"),
    Mxfp4Codec(scale_rule="ceil"),
    Mxfp4Codec(scale_rule="rceil"),
    Mxfp8Codec(),
    Mxfp8Codec(scale_rule="floor"),
    Mxfp8Codec(element="e5m2", scale_rule="even"),
    Nf4Codec(),
    Nf4Codec(block_size=128),
    Nf4Codec(double_quantized=False),
    Nvfp4Codec(),
]
SHAPES = [(), (1,), (3,), (257,), (5, 33), (3, 2, 67), (128, 96), (1, 4096)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def identify(codec):
    """Short test ids: the name and the parameters that differ from the defaults."""
    changed = {
        key: value
        for key, value in codec.parameters().items()
        if key != "codec" and value != getattr(type(codec)(), key)
    }
    return "-".join([codec.name, *(f"{key}={value}" for key, value in changed.items())])


every_codec = pytest.mark.parametrize("codec", CODECS, ids=identify)


def gaussian(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(kind, shape):
    """Return a tensor of a kind that codecs meet, or dread."""
    x = gaussian(shape)
    if kind == "outliers":
        return x * torch.where(gaussian(shape, 1).abs() > 2, 1e4, 1.0)
    if kind == "wide":
        return torch.sign(x) * torch.exp2(gaussian(shape, 2) * 12)
    if kind == "tiny":
        return x * 1e-30
    if kind == "denormal":
        return x * 1e-40
    if kind == "huge":
        return x.clamp(-3, 3) * 1e38
    if kind == "sparse":
        return x * (gaussian(shape, 3) > 1)
    if kind == "constant":
        return torch.full(shape, -0.37)
    assert kind == "gaussian"
    return x


def same(left, right):
    """Compare dicts of tensors bit by bit (NaN equals NaN)."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name]
        assert value.dtype == other.dtype
        assert torch.equal(
            value.reshape(-1).contiguous().view(torch.uint8),
            other.reshape(-1).contiguous().view(torch.uint8),
        ), name


@every_codec
@pytest.mark.parametrize("shape", [*SHAPES, (0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_sizes_are_known_in_advance(codec, shape):
    parts = codec.encode(gaussian(shape))
    spec = codec.spec(shape)
    assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == {
        k: (v.shape, v.dtype) for k, v in spec.items()
    }
    assert codec.nbytes(shape) == sum(v.numel() * v.element_size() for v in parts.values())
    assert all(part.is_contiguous() for part in parts.values())
    decoded = codec.decode(parts, shape, torch.bfloat16)
    assert tuple(decoded.shape) == shape
    assert decoded.dtype == torch.bfloat16


@every_codec
@pytest.mark.parametrize(
    "kind",
    ["gaussian", "outliers", "wide", "tiny", "denormal", "huge", "sparse", "constant"],
)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_error_stays_within_the_documented_bound(codec, kind, stochastic):
    generator = CounterGenerator(11) if stochastic else None
    for shape in SHAPES:
        x = make(kind, shape)
        if (
            codec.parameters().get("signed") is False
            or codec.parameters().get("mode") == "unsigned"
        ):
            x = x.abs()
        if codec.parameters().get("scale_dtype") == "float16":
            x = x.clamp(-4e5, 4e5)  # an fp16 scale holds no more than 65504 * 7
        if codec.parameters().get("mode") == "affine":
            x = x.clamp(-1e38, 1e38)  # the span max - min must be finite in fp32
        if codec.parameters().get("scale_is_amax"):
            x = x.clamp(-1e36, 1e36)  # a code times the stored amax must be finite in fp32
        error = (codec.decode(codec.encode(x, generator=generator), shape) - x).abs()
        bound = codec.max_error(x, stochastic=stochastic)
        assert bound.shape == x.shape
        worst = (error - bound).max() if x.numel() else torch.tensor(0.0)
        assert worst <= 0, f"{shape}: error exceeds its bound by {worst.item():.3g}"


@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_float_dtype_is_taken_at_its_value(codec, dtype):
    x = gaussian((9, 130)).to(dtype)
    same(codec.encode(x), codec.encode(x.to(torch.float32)))
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    same(codec.encode(strided), codec.encode(x))


@every_codec
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_decode_to_zeros(codec, shape):
    decoded = codec.decode(codec.encode(torch.zeros(shape)), shape)
    assert torch.equal(decoded, torch.zeros(shape))
    x = gaussian(shape)
    if x.numel() > 2:
        x.view(-1)[1] = 0.0
        exact = codec.decode(codec.encode(x), shape).view(-1)[1]
        assert exact == 0 or codec.name == "int4_group", "zero is on every symmetric grid"


@every_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_a_number_poisons_its_whole_block_and_no_other(codec, bad):
    x = gaussian((4, 512)).abs() + 0.1
    x[1, 300] = bad
    decoded = codec.decode(codec.encode(x), (4, 512))
    if isinstance(codec, Fp8GridCodec):
        height, width = codec.block_rows or 4, codec.block_columns or 512
        expected = torch.zeros(4, 512, dtype=torch.bool)
        top, left = 1 // height * height, 300 // width * width
        expected[top : top + height, left : left + width] = True
        assert torch.equal(decoded.isnan(), expected)
        return
    granule = min(codec.encode_granule((4, 512)), x.numel())
    width = codec.block_size or granule
    flat = decoded.view(-1)
    if granule == x.numel():
        assert flat.isnan().all()
        return
    first = (512 + 300) // width * width
    if codec.name == "bfloat16":  # a plain cast: infinities are values
        assert torch.equal(flat[first], torch.tensor(bad)) or math.isnan(bad)
        assert not flat[first].isfinite()
    else:
        assert flat[first : first + width].isnan().all()
    rest = torch.cat([flat[:first], flat[first + width :]])
    assert rest.isfinite().all()


@every_codec
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_pieces_at_granules_give_the_bits_of_the_whole(codec, stochastic):
    for shape in [(37, 96), (5, 33), (2000,), (3, 7, 64)]:
        x = gaussian(shape)
        whole = codec.encode(x, generator=CounterGenerator(5) if stochastic else None)
        flat, granule = x.view(-1), codec.encode_granule(shape)
        by_rows = granule == shape[-1] and not isinstance(codec, blocks.FlatCodec)
        by_rows = by_rows or (isinstance(codec, Fp8GridCodec) and granule < x.numel())
        pieces = []
        for start in range(0, x.numel(), granule * 3):
            piece = flat[start : start + granule * 3]
            generator = CounterGenerator(5, element_offset=start) if stochastic else None
            rows = piece.view(-1, shape[-1]) if by_rows else piece
            if isinstance(codec, Fp8GridCodec) and not codec.block_rows and by_rows:
                rows = piece.view(-1, *shape[-2:])  # a rectangle is a whole matrix of the stack
            pieces.append(codec.encode(rows, generator=generator))
        if granule >= x.numel():
            assert len(pieces) == 1, "a tensor-wide statistic: the whole is the only piece"
            continue
        joined = {name: torch.cat([p[name].reshape(-1) for p in pieces]) for name in whole}
        same(joined, {name: part.reshape(-1) for name, part in whole.items()})


@every_codec
def test_slab_size_does_not_change_the_bits(codec, monkeypatch):
    x = gaussian((61, 96))
    whole = codec.encode(x, generator=CounterGenerator(1))
    monkeypatch.setattr(blocks, "slab_elements", lambda device: 500)
    same(codec.encode(x, generator=CounterGenerator(1)), whole)


@every_codec
def test_ranges_decode_alone(codec):
    for shape in [(37, 96), (5, 33), (2000,)]:
        parts = codec.encode(gaussian(shape))
        whole = codec.decode(parts, shape).view(-1)
        granule = codec.decode_granule(shape)
        for start in range(0, whole.numel(), granule * 2):
            stop = min(start + granule * 2, whole.numel())
            assert torch.equal(codec.decode_range(parts, shape, start, stop), whole[start:stop])
        assert codec.decode_range(parts, shape, 0, 0).numel() == 0
        with pytest.raises(ValueError, match=codec.name):
            codec.decode_range(parts, shape, 0, whole.numel() + granule)
        if granule > 1:
            with pytest.raises(ValueError, match="multiples"):
                codec.decode_range(parts, shape, 1, granule)
        for start, stop in [(0, 1), (1, whole.numel()), (7, 7), (30, 140), (0, whole.numel())]:
            piece = codec.decode_slice(parts, shape, start, stop, torch.bfloat16)
            assert torch.equal(piece, whole[start:stop].to(torch.bfloat16))
        with pytest.raises(ValueError, match="outside"):
            codec.decode_slice(parts, shape, 3, whole.numel() + 1)


@every_codec
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_cut_gives_the_bits_of_the_whole(codec, data):
    shape = data.draw(st.sampled_from([(9, 70), (700,), (2, 5, 48)]))
    x = gaussian(shape)
    parts = codec.encode(x)
    whole = codec.decode(parts, shape).view(-1)
    cuts = sorted({0, x.numel(), *data.draw(st.lists(st.integers(0, x.numel()), max_size=4))})
    pieces = [codec.decode_slice(parts, shape, a, b) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), whole)


@every_codec
def test_stochastic_rounding_is_unbiased_and_a_function_of_the_seed(codec):
    x = gaussian((16, 64)).abs() * 0.5
    x[:, ::16] = 1.0  # the block maxima stay put, so scales agree
    first = codec.encode(x, generator=CounterGenerator(3))
    same(first, codec.encode(x, generator=CounterGenerator(3)))
    other = codec.encode(x, generator=CounterGenerator(4))["codes"]
    if codec.name == "scaled_float16":  # documented to round to nearest always
        assert torch.equal(first["codes"], other)
        return
    assert not torch.equal(first["codes"], other)
    runs = 60
    total = torch.zeros_like(x, dtype=torch.float64)
    for seed in range(runs):
        total += codec.decode(codec.encode(x, generator=CounterGenerator(seed)), (16, 64))
    mean_error = (total / runs - x).mean().item()
    nearest_error = (codec.decode(codec.encode(x), (16, 64)) - x).abs().mean().item()
    # COAT rounds without bias in its expanded domain, NF4/INT8 magnitudes are themselves rounded.
    slack = 0.25 if codec.name == "coat" or codec.parameters().get("double_quantized") else 0.12
    assert abs(mean_error) <= slack * nearest_error + 1e-7
    assert nearest_error > 0


@every_codec
def test_encoding_neither_reads_nor_moves_the_global_generator(codec):
    state = torch.get_rng_state()
    codec.encode(gaussian((4, 64)), generator=CounterGenerator(9))
    assert torch.equal(torch.get_rng_state(), state)


@every_codec
def test_header_parameters_rebuild_the_codec(codec):
    assert codec_from_parameters(codec.parameters()) == codec


@every_codec
def test_foreign_parts_are_refused_by_name(codec):
    parts = codec.encode(gaussian((8, 64)))
    with pytest.raises(ValueError, match=r"codes|part"):
        codec.decode(parts, (8, 65))
    for name in parts:
        missing = {key: value for key, value in parts.items() if key != name}
        with pytest.raises(ValueError, match=name):
            codec.decode(missing, (8, 64))
        wrong = parts | {name: parts[name].to(torch.float64)}
        with pytest.raises(ValueError, match=name):
            codec.decode(wrong, (8, 64))
    with pytest.raises(ValueError, match=codec.name):
        codec.encode(torch.ones(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="out"):
        codec.decode(parts, (8, 64), out=torch.empty(64, 8))


@every_codec
def test_decoding_into_a_given_tensor_rounds_once(codec):
    parts = codec.encode(gaussian((8, 64)))
    exact = codec.decode(parts, (8, 64))
    out = torch.empty(8, 64, dtype=torch.bfloat16)
    assert codec.decode(parts, (8, 64), torch.bfloat16, out=out) is out
    assert torch.equal(out, exact.to(torch.bfloat16))


@every_codec
@settings(max_examples=15, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), max_size=70),
    columns=st.sampled_from([1, 3, 10]),
)
def test_any_finite_values_stay_within_the_bound(codec, values, columns):
    x = torch.tensor(values, dtype=torch.float32)
    x = x[: x.numel() // columns * columns].view(-1, columns)
    if codec.parameters().get("scale_dtype") == "float16":
        x = x.clamp(-4e5, 4e5)
    if codec.parameters().get("mode") == "affine":
        x = x.clamp(-1e38, 1e38)  # the span max - min must be finite in fp32
    if codec.parameters().get("scale_is_amax"):
        x = x.clamp(-1e36, 1e36)  # a code times the stored amax must be finite in fp32
    decoded = codec.decode(codec.encode(x), tuple(x.shape))
    excess = ((decoded - x).abs() - codec.max_error(x)).reshape(-1)
    assert bool((excess <= 0).all())


class PeakOfLiveBytes(TorchDispatchMode):
    """Tallies the bytes of tensors made inside the mode while they live."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def drop(self, key, nbytes):
        self.known.discard(key)
        self.live -= nbytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known and not func._schema.is_mutable:
                    owned = {
                        t.untyped_storage()._cdata
                        for t in tree_leaves((args, kwargs))
                        if isinstance(t, torch.Tensor)
                    }
                    if key in owned:
                        continue
                    self.known.add(key)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(tensor, self.drop, key, storage.nbytes())
        return result


@every_codec
def test_decoding_scratch_stays_within_what_is_promised(codec):
    shape = (1024, 1024)
    parts = codec.encode(gaussian(shape))
    out = torch.empty(shape)
    codec.decode(parts, shape, out=out)  # tables are made now
    with PeakOfLiveBytes() as tally:
        codec.decode(parts, shape, out=out)
    assert 0 < tally.peak <= codec.decode_scratch_bytes(shape, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@every_codec
def test_the_device_gives_the_bits_of_the_host(codec, stochastic):
    for kind in ("gaussian", "outliers", "sparse", "wide"):
        x = make(kind, (37, 96))
        generator = CounterGenerator(3) if stochastic else None
        host = codec.encode(x, generator=generator)
        device = codec.encode(x.cuda(), generator=generator)
        same({name: part.cpu() for name, part in device.items()}, host)
        assert torch.equal(codec.decode(device, (37, 96)).cpu(), codec.decode(host, (37, 96)))
