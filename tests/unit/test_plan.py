"""The plan: the papers' sizes and counts from a config.json alone, and what a real run then exchanges."""

import json
import re
from typing import get_args

import pytest

from fedmpi import models
from fedmpi.models import PeftConfig
from fedmpi.offsite import Config as OffsiteConfig
from fedmpi.offsite.shapes import outline
from fedmpi.plan import figures
from fedmpi.plan.__main__ import main
from fedmpi.settings import recipe
from fedmpi.training import Optimizer

LLAMA_7B = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096},
    **{"intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096},
    **{"tie_word_embeddings": False},
}
SMALL = {**LLAMA_7B, "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory):
    return described(tmp_path_factory.mktemp("llama-7b"), LLAMA_7B)


@pytest.fixture
def small(tmp_path):
    return described(tmp_path / "small", SMALL)


def described(folder, settings):
    """A folder with a config.json and nothing else."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def read(*arguments):
    return recipe.read([*arguments, "--data.max_length=64", "--train.batch_size=1"], "test", "")


@pytest.mark.parametrize(
    ("settings", "parameters", "mebibytes"),
    [
        ({}, 4_194_304, "16.000"),  # LoRA r 8 on q and v
        ({"method": "ptuning", "num_virtual_tokens": 20}, 50_425_856, "192.359"),  # MLP, as wide as the model
        ({"method": "prompt", "num_virtual_tokens": 8}, 32_768, "0.125"),  # the prompt of Fed-CodeAlpaca
        ({"method": "ptuning", "num_virtual_tokens": 10}, 50_384_896, "192.203"),
        ({"method": "prefix", "num_virtual_tokens": 20}, 20 * 32 * 2 * 4096, "20.000"),
    ],
)
def test_messages_of_fs_llms_table_4(llama_7b, settings, parameters, mebibytes):
    """Its 21.40, 256.48 and 0.17 are these in base64, and 551 bytes for each tensor (reference: a run of its program)."""
    shapes = models.load_shapes(models.Config(path=str(llama_7b), dtype="float16"))
    message = figures.message(models.same_for_all(shapes, PeftConfig(**settings)).up)
    size = sum(tensor.bytes for tensor in message)
    assert size == 4 * parameters and f"{size / 2**20:.3f}" == mebibytes


TABLE_5 = [  # drop rate, adapter first and last, does the emulator's LoRA travel: layers, trained M, GFLOP/token, MB/round
    ((0.2, 2, 2, False), (26, "0.524", "10.33", "4.19")),
    ((0.2, 0, 2, True), (26, "0.262", "5.47", "14.68")),
    ((0.2, 0, 4, True), (26, "0.524", "5.87", "15.73")),
    ((0.5, 2, 2, False), (18, "0.524", "7.09", "4.19")),
    ((0.5, 0, 2, True), (17, "0.262", "3.65", "9.96")),
    ((0.5, 0, 4, True), (18, "0.524", "4.25", "11.53")),
]


@pytest.mark.parametrize(("settings", "expected"), TABLE_5)
def test_table_5_of_fedbiot(llama_7b, settings, expected):
    drop_rate, first, last, travels = settings
    shapes = models.load_shapes(models.Config(path=str(llama_7b), dtype="bfloat16"))
    wanted = OffsiteConfig(drop_rate=drop_rate, adapter_first=first, adapter_last=last)
    found = outline(wanted, shapes, PeftConfig(rank=8, alpha=16), emulator_travels=travels)
    down, up = (sum(tensor.bytes for tensor in figures.message(sent)) for sent in (found.down, found.up))
    side = figures.client_side(read()[0], found.client, 6_738_415_616)
    gflop = f"{side.paper_macs_per_token / 1e9:.2f}"
    assert (side.layers, f"{side.trained_parameters / 1e6:.3f}", gflop, f"{(down + up) / 1e6:.2f}") == expected
    assert side.disclosed_share == pytest.approx((expected[0] * 202_383_360 + 2 * 32000 * 4096 + 4096) / 6_738_415_616)
    assert sum(t.numel() for t in found.once.values()) == round(side.disclosed_share * 6_738_415_616)
    assert side.flops_per_token > 2 * side.paper_macs_per_token


def test_the_plan_of_a_recipe(small):
    asked = ("--clients=5", "--clients_per_round=2", "--peft.rank=4", "--model.dtype=bfloat16", "--link_mbps=8")
    found = figures.build(*read(f"--model.path={small}", *asked), ranks=3)
    server, client = found.sides
    size = 4 * 5 * 2 * 4 * (32 + 32)  # layers, query and value, rank
    assert (found.down_bytes, found.up_bytes, found.once_bytes, found.cohort) == (size, size, 0, 2)
    assert found.up[0].name.endswith("layers.0.self_attn.q_proj.lora_A.default.weight") and found.up[0].shape == (4, 32)
    assert found.placement == {0: (), 1: (0, 2, 4), 2: (1, 3)} and found.round_s == 2 * size / 1e6
    layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert found.original_parameters == 5 * layer + 2 * 90 * 32 + 32
    assert client.held_bytes == 2 * found.original_parameters + size and client.disclosed_share == server.disclosed_share == 1
    assert client.peak_bytes > client.held_bytes + 5 * size and server.flops_per_token is None
    assert client.paper_macs_per_token == (5 + 4) * (layer - 64 + size // 20) + 5 * size // 20


def test_rules_and_ranks_change_what_goes_up(small):
    size = {"A": 4 * 5 * (8 * 32 + 8 * 32), "B": 4 * 5 * (32 * 8 + 32 * 8)}
    for rule, even, odd in (("ffa", "B", "B"), ("rolora", "B", "A"), ("fedex", "AB", "AB")):
        found = figures.build(*read(f"--model.path={small}", f"--aggregation.rule={rule}"))
        assert (found.up_bytes, found.up_odd_bytes) == (sum(size[f] for f in even), sum(size[f] for f in odd))
        assert found.down_bytes == size["B"] + (size["A"] if rule != "ffa" else 0) and found.folds == (rule == "fedex")
    rolora = ["--aggregation.rule=rolora", f"--model.path={small}"]
    moved = [figures.build(*read(*rolora, asked)).down_moved_bytes for asked in ("--server_optimizer=avgm", "--codec=int8")]
    assert moved == [(size["B"], size["A"]), ()]
    ffa, mean = (figures.build(*read(f"--model.path={small}", f"--aggregation.rule={rule}")) for rule in ("ffa", "mean"))
    assert ffa.sides[1].flops_per_token < mean.sides[1].flops_per_token
    found = figures.build(*read(f"--model.path={small}", "--peft.client_ranks=2,8", "--aggregation.rule=flora"))
    assert found.up_bytes_by_rank == {2: found.up_bytes // 4, 8: found.up_bytes}


def test_a_codec_says_at_most_and_a_quantised_base_is_held_in_fewer_bytes(small):
    raw, coded, packed = (
        figures.build(*read(f"--model.path={small}", *more)) for more in ((), ("--codec=int8",), ("--codec=zstd",))
    )
    assert (raw.down_most_bytes, raw.up_most_bytes) == (raw.down_bytes, raw.up_bytes)
    assert raw.up_bytes / 4 < coded.up_most_bytes < raw.up_bytes / 3.5 and coded.down_most_bytes == coded.up_most_bytes
    assert packed.up_most_bytes >= packed.up_bytes == raw.up_bytes
    held = [figures.build(*read(f"--model.path={small}", f"--model.quantization={q}")).sides[1].held_bytes for q in ("int8", "nf4")]
    assert max(held) < raw.sides[1].held_bytes  # of matrices as small as these, tables take most in nf4


def test_what_an_optimiser_remembers_is_a_part_of_the_peak(small):
    peak = {name: figures.build(*read(f"--model.path={small}", f"--train.optimizer={name}")) for name in get_args(Optimizer)}
    trained = peak["sgd"].sides[1].trained_parameters
    found = {name: (plan.sides[1].peak_bytes - peak["sgd"].sides[1].peak_bytes) / trained for name, plan in peak.items()}
    eight = {"adamw8bit": 2, "paged_adamw8bit": 2}
    assert found == {"adamw": 8, "adam": 8, "sgd": 0, "paged_adamw": 8} | eight


def test_scaffolds_control_variates_travel_too(small):
    found = figures.build(*read(f"--model.path={small}", "--algorithm=scaffold", "--train.optimizer=sgd"))
    plain = figures.build(*read(f"--model.path={small}", "--train.optimizer=sgd"))
    assert (found.down_bytes, found.up_bytes) == (2 * plain.down_bytes, 2 * plain.up_bytes)
    assert found.sides[1].trained_parameters == plain.sides[1].trained_parameters


def test_what_is_printed(small, capsys):
    command = [f"--model.path={small}", "--peft.method=prompt", "--data.name=fed-dolly", "--data.max_length=64", "--link_mbps=1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    for part in (
        "prompt_encoder.default.embedding.weight",
        "20 x 32",
        "2,560",
        "0.001 M (640)",
        "8 clients, 8 per round",
        "rank 8",
    ):
        assert part in said
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["up"] == [{"name": "prompt_encoder.default.embedding.weight", "shape": [20, 32], "bytes": 2560}]
    assert found["round_s"] == 8 * 2 * 2560 / 1e6 and found["sides"][1]["paper_macs_per_token"] is None


def test_clients_that_only_the_data_know(small, capsys):
    assert main([f"--model.path={small}", "--data.name=alpaca", "--data.max_length=64"]) == 0
    assert "as many as the data have" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--link_mbps=0"], "link_mbps 0.0: give a speed above 0"),
        (["--ranks=3", "--clients=2", "--groups=4,2", "--train.engine=ddp"], "groups"),
        (["--peft.target_modules=[knee_proj]"], "knee_proj match no module: the model has .*q_proj"),
        (["--peft.rank=0"], "rank is 0"),
        (["--model.path=/nowhere"], "/nowhere is no folder"),
        (["--knee=1"], "knee"),
    ],
)
def test_what_cannot_be_is_one_clear_line(small, capsys, arguments, words):
    assert main([f"--model.path={small}", "--data.max_length=64", *arguments]) in (1, 2)
    [line] = capsys.readouterr().err.strip().splitlines()
    assert re.search(words, line)


@pytest.mark.parametrize("builder", ["uniform", "influence", "shared", "thin", "quantized"])
def test_what_is_sent_once_is_what_the_client_holds(small, builder):
    shapes = models.load_shapes(models.Config(path=str(small)))
    found = outline(OffsiteConfig(builder=builder, drop_rate=0.5, adapter_last=2), shapes, PeftConfig(), emulator_travels=True)
    client = figures.client_side(read()[0], found.client, 10**6)
    once = sum(tensor.numel() * tensor.element_size() for tensor in found.once.values())
    assert client.held_bytes == once + figures.size_of(figures.message(found.down))
    whole = sum(4 * tensor.numel() for tensor in models.load_shapes(models.Config(path=str(small))).parameters())
    assert once < whole


def test_an_emulator_that_leaves_nothing_or_methods_without_a_place(small):
    shapes = models.load_shapes(models.Config(path=str(small)))
    with pytest.raises(Exception, match="prefix has no place in single layers"):
        outline(OffsiteConfig(adapter_last=2), shapes, PeftConfig(method="prefix"), emulator_travels=False)
    whole = outline(OffsiteConfig(adapter_first=1, adapter_last=1, drop_rate=0.5), shapes, PeftConfig(method="none"), False)
    assert {name.split(".")[2] for name in whole.up} == {"0", "2"} and whole.up.keys() == whole.down.keys()
