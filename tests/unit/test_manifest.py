"""Manifests and the buffers that they describe: what goes in comes out, and nothing malformed gets through."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmpi.errors import ProtocolError
from fedmpi.manifest import Group, Manifest, Packed, Spec, manifest_of, unpack
from fedmpi.messages import chunks

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]
SPECS = st.builds(Spec, st.text(max_size=8), st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from(DTYPES))
MANIFESTS = st.lists(SPECS, max_size=8, unique_by=lambda spec: spec.name).map(lambda s: Manifest((Group("adapter", tuple(s)),)))


def tensors_of(manifest: Manifest) -> dict[str, torch.Tensor]:
    """Tensors of arbitrary bytes that fit the manifest, some not contiguous."""
    made = {}
    for spec, _ in manifest.places:
        raw = torch.randint(0, 127, (spec.num_bytes,), dtype=torch.uint8)
        made[spec.name] = raw.view(getattr(torch, spec.dtype)).view(spec.shape)
        if len(spec.shape) == 2 and 0 not in spec.shape:
            made[spec.name] = made[spec.name].t().contiguous().t()
    return made


@given(MANIFESTS)
def test_a_manifest_comes_back_with_its_hash(manifest: Manifest) -> None:
    back = Manifest.from_json(manifest.to_json())
    assert (back, back.hash, back.num_bytes) == (manifest, manifest.hash, manifest.num_bytes)


@given(MANIFESTS, st.integers(0, 3))
def test_a_manifest_hash_tells_names_shapes_and_dtypes_apart(manifest: Manifest, what: int) -> None:
    specs = [*manifest.groups[0].tensors, Spec("last\x00", (2, 3), "float32")]
    other = [Spec("other\x00", (2, 3), "float32"), Spec("last\x00", (3, 2), "float32"), Spec("last\x00", (2, 3), "int32")]
    changed = [*specs[:-1], *other[what : what + 1]]
    assert Manifest((Group("a", tuple(specs)),)).hash != Manifest((Group("a", tuple(changed)),)).hash


@given(MANIFESTS)
def test_tensors_come_back_bit_for_bit(manifest: Manifest) -> None:
    tensors = tensors_of(manifest)
    buffer = Packed(tensors, manifest).buffer(0, manifest.num_bytes)
    assert buffer.numel() == manifest.num_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    for name, tensor in unpack(buffer, manifest).items():
        assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype)
        assert tensor.contiguous().view(-1).view(torch.uint8).equal(tensors[name].contiguous().view(-1).view(torch.uint8))


def test_the_place_of_tensors_follows_width_then_the_manifest() -> None:
    tensors = {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.ones(1, dtype=torch.int8), "c": torch.ones(2)}
    places = manifest_of(tensors).places
    assert [(spec.name, place.start, place.stop) for spec, place in places] == [("c", 0, 8), ("b", 8, 14), ("a", 14, 15)]


def test_a_manifest_does_not_depend_on_the_order_of_a_dict() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert manifest_of({"a": one, "b": two}).hash == manifest_of({"b": two, "a": one}).hash


@given(MANIFESTS, st.integers(1, 40))
def test_slices_of_packed_tensors_make_up_the_whole(manifest: Manifest, step: int) -> None:
    packed = Packed(tensors_of(manifest), manifest)
    assert b"".join(packed[place] for place in chunks(len(packed), step)) == bytes(packed[:])


@given(MANIFESTS, st.integers(1, 5))
def test_elements_are_cut_from_chunks_wherever_these_end(manifest: Manifest, step: int) -> None:
    """Joined again they are the tensors, each with as many elements before it as the places say."""
    tensors = tensors_of(manifest)
    packed = Packed(tensors, manifest)
    found: list[torch.Tensor] = []
    before = 0
    for place in chunks(len(packed), 8 * step):
        chunk = torch.frombuffer(bytearray(packed[place]), dtype=torch.uint8)
        for first, values in manifest.cut(chunk, place.start):
            assert first == before
            before += values.numel()
            found.append(values.view(torch.uint8))
    assert list(manifest.like) == [spec.name for spec, _ in manifest.places]
    assert bytes(packed[:]) == b"".join(part.numpy().tobytes() for part in found)


def test_a_chunk_that_ends_inside_an_element_is_refused() -> None:
    with pytest.raises(ProtocolError, match="whole elements"):
        list(manifest_of({"a": torch.ones(4)}).cut(torch.zeros(6, dtype=torch.uint8), 0))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": torch.ones(2)}, r"differing: \['b'\]"),
        ({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, r"differing: \['c'\]"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, r"'b': expected \(2,\) float32, found \(3,\)"),
        ({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int32)}, "'b': expected .* found .* torch.int32"),
    ],
)
def test_tensors_that_are_not_the_manifests_are_refused(tensors: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        Packed(tensors, manifest_of({"a": torch.ones(2), "b": torch.ones(2)}))


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(15, dtype=torch.uint8),
        torch.zeros(17, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.float32),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.zeros(24, dtype=torch.uint8)[3:19],
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(buffer: torch.Tensor) -> None:
    with pytest.raises(ProtocolError, match="expected a"):
        unpack(buffer, manifest_of({"a": torch.ones(4)}))


A_TENSOR = ["w", [2], "float32"]


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({}, "expected a list for the whole"),
        ([["adapter"]], "expected a list of 2 for a group"),
        ([["adapter", 3]], "expected a list for the tensors"),
        ([[4, []]], "expected a string for the name of a group, found '4'"),
        ([["adapter", [["w", [2]]]]], "expected a list of 3 for a tensor"),
        ([["adapter", [[None, [2], "float32"]]]], "expected a string for the name of a tensor"),
        ([["adapter", [["w", [-2], "float32"]]]], r"sizes for 'w', found \[-2\]"),
        ([["adapter", [["w", [2.0], "float32"]]]], r"sizes for 'w', found \[2.0\]"),
        ([["adapter", [["w", [True], "float32"]]]], r"sizes for 'w', found \[True\]"),
        ([["adapter", [["w", [1] * 9, "float32"]]]], "<= 8 sizes for 'w'"),
        ([["adapter", [["w", [2], "object"]]]], "dtype of .* found 'object'"),
        ([["adapter", [["w", [2], ["float32"]]]]], "dtype of"),
        ([["adapter", [A_TENSOR, A_TENSOR]]], "expected each tensor name once, found 'w' twice"),
        ([["adapter", [A_TENSOR]], ["other", [A_TENSOR]]], "found 'w' twice"),
        ([["adapter", []], ["adapter", []]], "expected each group name once, found 'adapter' twice"),
        ([["adapter", [["w", [1 << 40, 1 << 20], "float32"]]]], "at most 70368744177664 bytes, found 4611686018427387904"),
    ],
)
def test_a_malformed_manifest_says_what_is_wrong(tree: object, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        Manifest.from_json(json.dumps(tree))


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b" " * (17 << 20)])
def test_what_is_no_json_of_a_possible_size_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="manifest"):
        Manifest.from_json(data)


def test_a_dtype_that_no_manifest_knows_is_refused() -> None:
    with pytest.raises(ProtocolError, match="'z' is complex64"):
        manifest_of({"z": torch.ones(1, dtype=torch.complex64)})
