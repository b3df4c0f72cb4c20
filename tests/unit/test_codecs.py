"""Chains: what can be said, what they lose at most, how small they get, and that no bytes of a stranger can do harm."""

import math
import random
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi.codecs import Chain, Number, Packer, numbers, parse, sparse
from fedmpi.codecs.coder import Coder
from fedmpi.errors import ConfigError, NonFinite, ProtocolError

CHAINS = (
    *("raw", "bf16", "fp16", "int8", "int4", "int2", "nf4", "sign", "int8:stochastic", "int4:block=8", "nf4:block=8"),
    *("topk:0.1", "topk:0.02,int8", "topk:0.3,bf16,shuffle,zstd", "topk:0.01,nf4,deflate", "topk:0.2,sign"),
    *("zstd", "shuffle,zstd:3", "bf16,shuffle,gzip", "int4,zstd", "int2,deflate:9", "delta,int8,ef,zstd"),
)
LOSSLESS = ("raw", "zstd", "shuffle,zstd", "deflate", "shuffle,gzip")
SIZES = (0, 1, 2, 7, 8, 255, 256, 257, 1000, 5000)


def some(num: int, seed: int = 0, spread: float = 1e-3) -> torch.Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed)) * spread


def step_of(number: Number, values: torch.Tensor) -> torch.Tensor:
    """For each value, the error that the module's table allows."""
    if number.name == "fp32":
        return torch.zeros_like(values)
    if number.name == "bf16":
        return (values.abs() * 2.0**-8).clamp(min=2.0**-134)
    if number.name == "fp16":
        return (values.abs() * 2.0**-11).clamp(min=2.0**-25)
    wide = torch.cat([values, torch.zeros(-len(values) % number.block)]).view(-1, number.block)
    most = wide.abs().max(1, keepdim=True).values.expand_as(wide).reshape(-1)[: len(values)]
    if number.name == "nf4":
        return most * 0.152
    if number.name == "sign":
        mean = torch.cat([block.abs().mean().expand_as(block) for block in values.split(number.block)] or [values])
        return torch.maximum(mean, most - mean)
    step = most / numbers.TOP[number.name]
    return step if number.stochastic else step / 2


@pytest.mark.parametrize("text", CHAINS)
@pytest.mark.parametrize("num", SIZES)
def test_what_is_lost_is_no_more_than_promised(text: str, num: int) -> None:
    chain, values = parse(text), some(num, seed=num)
    coder = Coder(chain)
    data = coder.encode(values, seed=5)
    assert len(data) <= coder.most_bytes(num)
    back = coder.decode(data, num)
    assert back.shape == values.shape and back.dtype == torch.float32
    sent = torch.ones(num, dtype=torch.bool)
    if chain.share is not None and num:
        sent[:] = False
        sent[sparse.choose(values, chain.share)] = True
        assert int(sent.sum()) == sparse.num_kept(chain.share, num)
        assert values[~sent].abs().max() <= values[sent].abs().min() if num > 1 else True
    assert torch.equal(back[~sent], torch.zeros(int((~sent).sum())))
    error, bound = (back - values)[sent].abs(), step_of(chain.number, values[sent])
    assert (error <= bound * (1 + 1e-5) + 2e-38).all(), (error - bound).max()


@pytest.mark.parametrize("text", LOSSLESS)
@given(bits=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=300))
@settings(max_examples=25)
def test_lossless_chains_keep_every_bit(text: str, bits: list[float]) -> None:
    values = torch.tensor(bits, dtype=torch.float32)
    coder = Coder(parse(text))
    back = coder.decode(coder.encode(values), len(bits))
    assert torch.equal(back.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("text", ["bf16", "int8", "int4", "int2", "nf4", "sign", "topk:0.5,int4", "int4:stochastic"])
@given(values=st.lists(st.floats(width=32, min_value=-6e4, max_value=6e4), min_size=1, max_size=600))
@settings(max_examples=25)
def test_any_finite_values_stay_finite_and_near(text: str, values: list[float]) -> None:
    given_, coder = torch.tensor(values, dtype=torch.float32), Coder(parse(text))
    back = coder.decode(coder.encode(given_), len(values))
    assert back.isfinite().all()
    most = float(given_.abs().max())
    assert float((back - given_).abs().max()) <= most * 1.0001 + 2e-38


def test_denormals_and_values_that_are_not_contiguous() -> None:
    tiny = torch.full((300,), 1e-42)
    for text in ("bf16", "int8", "int4", "nf4", "int8:stochastic"):
        back = Coder(parse(text)).decode(Coder(parse(text)).encode(tiny), 300)
        assert back.isfinite().all() and float((back - tiny).abs().max()) <= 2e-38
    every_second = some(600)[::2]
    for text in CHAINS:
        assert bytes(Coder(parse(text)).encode(every_second)) == bytes(Coder(parse(text)).encode(every_second.contiguous()))


@pytest.mark.parametrize("text", ["bf16", "fp16", "int8", "int4", "nf4", "sign", "topk:0.5,int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_sent(text: str, bad: float) -> None:
    values = some(300)
    values[17] = bad
    with pytest.raises(NonFinite):
        Coder(parse(text)).encode(values)


def test_too_large_for_half_a_float_is_said() -> None:
    with pytest.raises(NonFinite, match="fp16"):
        Coder(parse("fp16")).encode(torch.tensor([7e4]))


def test_random_rounding_is_right_on_average_and_repeats() -> None:
    values, coder = torch.linspace(-1, 1, 512), Coder(parse("int4:stochastic,block=512".replace(",block", ":block")))
    mean = sum(coder.decode(coder.encode(values, seed), 512) for seed in range(4000)) / 4000
    assert isinstance(mean, torch.Tensor)
    assert float((mean - values).abs().max()) < 5 * (1 / 7) / 2 / math.sqrt(4000)
    assert bytes(coder.encode(values, 3)) == bytes(coder.encode(values, 3)) != bytes(coder.encode(values, 4))


def test_levels_of_nf4_are_those_of_its_paper() -> None:
    """Appendix E of arXiv 2305.14314 lists them."""
    published = [-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    assert torch.allclose(numbers._NF4, torch.tensor(published), atol=1e-6)


def test_sizes_are_what_the_chain_says() -> None:
    num = 1 << 18
    values = some(num)
    size = {text: len(Coder(parse(text)).encode(values)) * 8 / num for text in CHAINS}
    assert size["raw"] == 32 and size["bf16"] == 16
    assert size["int8"] == 8 + 32 / 256 and size["int4"] == 4 + 32 / 1024 and size["int2"] == 2 + 32 / 256
    assert size["nf4"] == 4 + 32 / 64 and size["sign"] == 1 + 32 / 256
    assert size["int4,zstd"] < 3.3  # of a normal distribution; its entropy at this step is about 3.1


@pytest.mark.parametrize("share", [0.5, 0.1, 0.02, 0.001])
def test_positions_take_little_more_than_their_entropy(share: float) -> None:
    num = 1 << 18
    positions = sparse.choose(some(num, seed=3), share)
    data = sparse.write(positions, num)
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) * num / 8
    assert entropy * 0.98 < len(data) < entropy * 1.06 + 16
    back, used = sparse.read(memoryview(data), len(positions), num)
    assert torch.equal(back, positions) and used == len(data) <= sparse.most_bytes(share, num)


@given(st.sets(st.integers(0, 999), min_size=1, max_size=200))
@settings(max_examples=60)
def test_any_positions_come_back(places: set[int]) -> None:
    positions = torch.tensor(sorted(places))
    back, _ = sparse.read(memoryview(sparse.write(positions, 1000)), len(places), 1000)
    assert torch.equal(back, positions)


def test_equal_magnitudes_are_chosen_in_order() -> None:
    assert sparse.choose(torch.tensor([1.0, -1.0, 1.0, 1.0]), 0.5).tolist() == [0, 1]


@pytest.mark.parametrize("text", CHAINS)
def test_damaged_bytes_are_refused_or_are_other_values(text: str) -> None:
    """Whatever comes, decoding ends, with values of the right number or with a ProtocolError, and takes no memory for a claim."""
    coder, rng = Coder(parse(text)), random.Random(text)
    sound = bytes(coder.encode(some(700), 1))
    for _ in range(150):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            match rng.randint(0, 3):
                case 0 if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                case 1:
                    del data[rng.randint(0, len(data)) :]
                case 2:
                    data += rng.randbytes(rng.randint(1, 40))
                case _ if data:
                    at = rng.randrange(len(data))
                    data[at : at + 4] = rng.randbytes(4)
        with suppress(ProtocolError):
            assert coder.decode(memoryview(data), 700).shape == (700,)


@pytest.mark.parametrize("name", ["zstd", "deflate", "gzip"])
def test_a_bomb_is_not_unpacked(name: str) -> None:
    from fedmpi.codecs import packers

    bomb = packers.pack(Packer(name, 9), memoryview(bytes(1 << 24)))
    with pytest.raises(ProtocolError):
        packers.unpack(Packer(name), memoryview(bomb), 1 << 12)
    with pytest.raises(ProtocolError):
        Coder(parse(f"int8,{name}")).decode(memoryview(bomb), 1000)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("int9", "did you mean int8"),
        ("", "is no stage"),
        ("raw,zstd", "raw stands alone"),
        ("zstd,int8", "int8 comes too late"),
        ("int8,topk:0.1", "topk:0.1 comes too late"),
        ("int8,int4", "one of each"),
        ("ef", "nothing is lost"),
        ("ef,zstd", "nothing is lost"),
        ("shuffle", "shuffle alone saves nothing"),
        ("topk", "give the share"),
        ("topk:0", "give the share"),
        ("topk:1.5", "give the share"),
        ("topk:many", "could not convert"),
        ("int8:block=100", "power of two"),
        ("int8:fast", "no option 'fast'"),
        ("nf4:stochastic", "no option"),
        ("bf16:3", "no option '3'"),
        ("zstd:99", "from 1 to 22"),
        ("delta:1", "takes no options"),
    ],
)
def test_impossible_chains_say_why(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as error:
        parse(text, "codec_up")
    assert str(error.value).startswith("codec_up ")


def test_chains_read_as_they_are_written() -> None:
    assert parse("raw") == Chain() and parse("raw").raw
    everything = parse("delta, topk:0.05, int4:block=64:stochastic, shuffle, zstd:3, ef")
    assert everything == Chain(True, 0.05, Number("int4", 64, True), True, Packer("zstd", 3), True)
    assert parse("delta,ef,int8") == parse("delta,int8,ef")
    assert everything.lossy and not parse("delta,zstd").lossy
