"""Makes builtin:tiny: trains its tokenizer, pre-trains the model on the plain text of data.toy, measures what it can.

    python -m fedmpi.models.tiny --out DIR        all of it; a C++ compiler must be there, which torch.compile uses
    python -m fedmpi.models.tiny --measure DIR    the figures alone, of a folder that was made before

Equal seed, steps, threads, torch version and kind of CPU give equal weights: float sums depend on the last three. This
program must never show the model a test problem before it measures, and must know nothing of a federation.
"""

import argparse
import copy
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedmpi import data, training
from fedmpi.data import prompts, toy
from fedmpi.data.corpora import Row
from fedmpi.data.corpora import load as load_corpus
from fedmpi.evaluation.answers import Score, exact_match
from fedmpi.models import Config, PeftConfig
from fedmpi.models.adapters import add_adapter
from fedmpi.models.backbone import load_model, load_tokenizer
from fedmpi.models.tiny import FOLDER
from fedmpi.training.loop import fit

SEED = 0
VOCAB = 1024  # at most: the little world runs out of words before
PAD, BOS, EOS = SPECIAL = ("<pad>", "<s>", "</s>")
LENGTH, BATCH = 128, 8
STEPS, WARMUP, DECAY = 5600, 100, 0.2  # the rate rises over WARMUP steps, stays, and falls to 0 over the last fifth
LR, MATRIX_LR = 3e-3, 9e-3  # AdamW on embeddings and norms, Muon on the matrices
CHANCE_WEIGHT = 0.1  # of tokens drawn by chance: nothing can be learnt from them but how frequent they are
# The adapter that is fitted to measure what the model can learn: the quickstart's.
PEFT = PeftConfig(target_modules=("all-linear",))
FIT = training.Config(steps=150, batch_size=8, lr=2.5e-3)
ABOUT = """# builtin:tiny

A Llama of 12 layers and 2.4 million parameters with its own byte-level tokenizer, pre-trained by this repository on
text that this repository makes (`fedmpi/data/toy.py`): small sums, lists turned around or sorted, tables, counts, series
and opposites, told as plain statements. It was never asked a question of `builtin:toy`, and no problem of that data
set's test rows was solved in its text (the sums in its word problems, being few, were, about other people and things).
It exists to learn them in seconds; it knows nothing else and is of no other use. It read windows of 128 tokens: the
2,048 positions are there, what it says far out is not trained.

Each fixed part of the Alpaca prompt is one token of the vocabulary, so a prompt takes about 20 tokens.

    python -m fedmpi.models.tiny --out DIR        makes it again
    python -m fedmpi.models.tiny --measure DIR    prints the figures below

Equal seed, steps, threads, torch version and kind of CPU give equal weights.
"""


def main() -> None:
    """Make or measure a folder, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m fedmpi.models.tiny", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write; default: the packaged one")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of %(default)s, unless for a quick look")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", type=Path, metavar="DIR", help="train nothing, print what the model in DIR can do")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(measure(args.measure))
        return
    tokenizer, begun = make_tokenizer(), time.perf_counter()
    model = make_model(len(tokenizer))
    pretrain(model, tokenizer, args.steps)
    minutes = (time.perf_counter() - begun) / 60
    save(model, tokenizer, args.out)
    made = f"{args.steps} steps of {BATCH * LENGTH} tokens, {minutes:.0f} minutes with {args.threads} thread(s)."
    (args.out / "README.md").write_text(f"{ABOUT}\nPre-training: {made}\n\n{measure(args.out)}", encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips, a digit is a token, and each fixed part of the prompt is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    blanks = [prompts.render("\0", given).replace("\1", "\0").split("\0") for given in ("", "\1")]
    fixed = list(dict.fromkeys(itertools.chain(*blanks)))
    texts = toy.pretraining_text(SEED + 1, lambda instruction, given: f"{instruction}\n{given}\n")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(fixed),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    read = (re.sub(f"[{toy.MARKS}]", "", "".join(text)) for text in itertools.islice(texts, 20_000))
    bpe.train_from_iterator(itertools.chain(*blanks, read), trainer)
    bpe.add_tokens([AddedToken(part, normalized=False) for part in fixed])
    ends = [(BOS, bpe.token_to_id(BOS))]
    bpe.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A $B", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=2048)


def make_model(vocab: int) -> LlamaForCausalLM:
    """Twelve narrow layers: depth is what offsite tuning drops, width is what a CPU pays for."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, read: str, ends: str) -> tuple[list[int], list[float]]:
    """A document from its <s> to its </s>, and the weight of each token in the loss."""
    parts = re.split(f"[{toy.MARKS}]", read)
    stops = list(itertools.accumulate(map(len, parts)))
    answers = list(zip(stops[0::2], stops[1::2], strict=False))
    found = tokenizer("".join(parts), return_offsets_mapping=True)
    follows = [any(start < stop <= end for start, end in answers) for _, stop in found["offset_mapping"]]
    response = [*tokenizer(ends, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    weights = [1.0 if follow else CHANCE_WEIGHT for follow in follows] + [1.0] * len(response)
    return found["input_ids"] + response, weights


def blocks(tokenizer: PreTrainedTokenizerFast, seed: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless [BATCH, LENGTH + 1] blocks of documents from the `first` on, end to end, and the weights of their tokens."""
    waiting: list[tuple[int, float]] = []
    need = BATCH * (LENGTH + 1)
    for read, ends in itertools.islice(toy.pretraining_text(seed, prompts.render), first, None):
        waiting += zip(*encode(tokenizer, read, ends), strict=True)
        if len(waiting) >= need:
            block = torch.tensor(waiting[:need], dtype=torch.float64).view(BATCH, LENGTH + 1, 2)
            yield block[..., 0].long(), block[..., 1].float()
            waiting = waiting[need:]


def losses(model: Callable[..., Any], block: Tensor) -> Tensor:
    """The loss of every predicted token."""
    logits = model(input_ids=block[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten(), reduction="none")


def heldout_loss(model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> tuple[float, float]:
    """Plain text from another seed: mean loss of all tokens, and of those that follow from what stands before them."""
    held_out = list(itertools.islice(blocks(tokenizer, SEED + 2, toy.NUM_COPIES_FIRST), 10))
    with torch.no_grad():
        each = torch.cat([losses(model, block) for block, _ in held_out])
    follows = torch.cat([weights[:, 1:].flatten() for _, weights in held_out]) == 1
    return each.mean().item(), each[follows].mean().item()


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Muon and AdamW, float32, on documents in the order in which they are made."""
    is_matrix = {name: weight.ndim == 2 and "embed" not in name for name, weight in model.named_parameters()}
    matrices = [weight for name, weight in model.named_parameters() if is_matrix[name]]
    others = [weight for name, weight in model.named_parameters() if not is_matrix[name]]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP, 1.0, (steps - step) / (DECAY * steps)))
        for optimizer in optimizers
    ]
    begun, compiled = time.perf_counter(), torch.compile(model)
    for step, (block, weights) in enumerate(itertools.islice(blocks(tokenizer, SEED), steps), 1):
        weight = weights[:, 1:].flatten()
        model.zero_grad()
        loss = (losses(compiled, block) * weight).sum() / weight.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {time.perf_counter() - begun:.0f} s", flush=True)
        if step % 500 == 0:
            print("held-out loss {:.4f}, of what follows {:.4f}".format(*heldout_loss(compiled, tokenizer)), flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A folder as transformers reads it, in bfloat16, so that the package stays small."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    # The name under which older and newer transformers find the class.
    written = folder / "tokenizer_config.json"
    settings = json.loads(written.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"clean_up_tokenization_spaces": False}
    written.write_text(json.dumps(settings, indent=2) + "\n")


def measure(folder: Path) -> str:
    """The figures of the README, of what was saved: before and after adapters were fitted."""
    config = Config(path=str(folder), dtype="float32")
    tokenizer, corpus = load_tokenizer(config), load_corpus(data.Config(), SEED)
    loss, follows = heldout_loss(load_model(config), tokenizer)
    two = ("sort", "opposite")
    scores = {
        "as it is": exact_match(load_model(config), tokenizer, corpus.test, max_new_tokens=16),
        "fitted to all": fitted(config, tokenizer, corpus.train, corpus.test),
        f"fitted to {' and '.join(two)}": fitted(
            config, tokenizer, [row for row in corpus.train if row.category in two], corpus.test
        ),
    }
    text = f"Held-out plain text: loss {loss:.3f} per token, {follows:.3f} where the token follows from those before.\n"
    how = f"{FIT.steps} steps of {FIT.batch_size} rows, AdamW {FIT.lr}, LoRA of rank {PEFT.rank} on {PEFT.target_modules[0]}"
    return f"{text}Fitted: {how}.\n\n{table(scores)}"


def fitted(config: Config, tokenizer: Any, train: Sequence[Row], test: Sequence[Row]) -> Score:
    """What a model answers after FIT on these rows."""
    model = add_adapter(load_model(config), PEFT, SEED)
    examples, _ = prompts.tokenize(train, tokenizer, data.Config())
    fit(model, examples, FIT, seed=SEED, pad_id=tokenizer.pad_token_id)
    return exact_match(model, tokenizer, test, max_new_tokens=16)


def table(scores: dict[str, Score]) -> str:
    """Exact match in percent, a column for each model."""
    num = next(iter(scores.values())).num
    lines = [_line(f"exact match, % of {num} rows", scores), _line("---", ["---"] * len(scores))]
    for category in toy.CATEGORIES:
        shares = [score.by_category[category][0] for score in scores.values()]
        lines.append(_line(category, [f"{100 * share:.0f}" for share in shares]))
    lines.append(_line("all", [f"{100 * score.exact:.1f}" for score in scores.values()]))
    return "\n".join(lines) + "\n"


def _line(first: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


if __name__ == "__main__":
    main()
