"""Averages of products, on their factors: LoRA trains B and A, and what counts is the average of B A, which the average of B times
the average of A is not. No matrix of the size of a weight is ever formed here. It must never know what B A is added to.

An update's factors have its client's rank r: A is r x in, B is out x r. The server's adapter has the largest rank; clients of a
lower one take its first rows and columns, and what they send counts as zero beyond their rank.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fedmpi.aggregation.spool import Spool
from fedmpi.tensors import Tensors

A, B = ".lora_A.", ".lora_B."


@dataclass(frozen=True)
class Stack:
    """The weighted products of all clients in one module: their sum is `b @ a`, which nobody forms."""

    b: torch.Tensor
    a: torch.Tensor

    def minus(self, b: torch.Tensor, a: torch.Tensor) -> "Stack":
        """This sum without another product."""
        return Stack(torch.cat([self.b, -b.double()], 1), torch.cat([self.a, a.double()], 0))

    def square(self) -> float:
        """The squared Frobenius norm of the sum, from two small Gram matrices."""
        return float(((self.b.T @ self.b) * (self.a @ self.a.T)).sum().clamp(min=0))


def modules(names: Iterable[str]) -> list[str]:
    """The modules with a pair of factors among these names."""
    return sorted(name.partition(A)[0] for name in names if A in name)


def names_of(module: str, names: Iterable[str]) -> tuple[str, str]:
    """The names of a module's A and B."""
    a = next(name for name in names if name.startswith(module + A))
    return a, a.replace(A, B)


def trained(names: Iterable[str], rule: str, round_index: int) -> list[str]:
    """What clients train and send in a round: everything, or one factor of each pair."""
    idle = A if rule == "ffa" or (rule == "rolora" and round_index % 2 == 0) else B if rule == "rolora" else None
    return [name for name in names if idle is None or idle not in name]


def told(names: Iterable[str], rule: str) -> list[str]:
    """What a broadcast holds: everything, but for FFA-LoRA's A, which never moves and which everybody has as it began."""
    return [name for name in names if rule != "ffa" or A not in name]


def narrowed(tensors: Tensors, rank: int) -> Tensors:
    """An adapter as a client of this rank holds it."""
    return {name: _first(name, tensor, rank) for name, tensor in tensors.items()}


def _first(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor[:rank] if A in name else tensor[:, :rank].contiguous() if B in name else tensor


def padded(tensors: Tensors, like: Tensors) -> Tensors:
    """An update with zeros beyond its rank; one of full rank as it is."""
    return {name: _padded(tensor, like[name].shape) if A in name or B in name else tensor for name, tensor in tensors.items()}


def _padded(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if tensor.shape == shape:
        return tensor
    whole = tensor.new_zeros(shape)
    whole[: tensor.shape[0], : tensor.shape[1]] = tensor
    return whole


def stacks(spool: Spool, sent: Tensors) -> Iterator[tuple[str, Stack]]:
    """Module by module, the products of all clients, weighted; a factor that was not trained is the one that was sent."""
    for module in modules(sent):
        a_name, b_name = names_of(module, sent)
        pairs = [(share, *_pair(spool, client, sent, a_name, b_name)) for client, share in spool.shares.items()]
        yield module, Stack(torch.cat([share * b for share, b, _ in pairs], 1), torch.cat([a for _, _, a in pairs], 0))


def _pair(spool: Spool, client: int, sent: Tensors, a_name: str, b_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    there = spool.names(client)
    a = spool.get(client, a_name) if a_name in there else sent[a_name].double()
    b = spool.get(client, b_name) if b_name in there else sent[b_name].double()
    rank = min(len(a), b.shape[1])
    return b[:, :rank], a[:rank]


def missed(spool: Spool, sent: Tensors, mean: Tensors) -> Tensors:
    """FedEx-LoRA: what the product of the means lacks of the mean product, as factors: sum of p B (A - mean A)."""
    fold: Tensors = {}
    for module, stack in stacks(spool, sent):
        a_name, _ = names_of(module, sent)
        means = [mean[a_name][: spool.shape(client, a_name)[0]].double() for client in spool.shares]
        fold |= _as_fold(module, Stack(stack.b, stack.a - torch.cat(means, 0)))
    return fold


def stacked(spool: Spool, sent: Tensors) -> Tensors:
    """FLoRA: the mean product as it is, as factors whose rank is the sum of the clients' ranks."""
    fold: Tensors = {}
    for module, stack in stacks(spool, sent):
        fold |= _as_fold(module, stack)
    return fold


def _as_fold(module: str, stack: Stack) -> Tensors:
    return {f"{module}/A": stack.a.float(), f"{module}/B": stack.b.float()}


def redistributed(spool: Spool, sent: Tensors) -> Tensors:
    """FlexLoRA: the best factors of the adapter's rank for the mean product, by SVD; A has orthonormal rows."""
    adapter: Tensors = {}
    for module, stack in stacks(spool, sent):
        a_name, b_name = names_of(module, sent)
        b, a = _best(stack, len(sent[a_name]))
        adapter[a_name], adapter[b_name] = a.to(sent[a_name].dtype), b.to(sent[b_name].dtype)
    return adapter


def _best(stack: Stack, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """QR of both stacks leaves a small core; its SVD is that of the whole product."""
    q_b, r_b = torch.linalg.qr(stack.b)
    q_a, r_a = torch.linalg.qr(stack.a.T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    b, a = q_b @ (u[:, :rank] * values[:rank]), v[:rank] @ q_a.T
    return _padded(b, torch.Size((len(b), rank))), _padded(a, torch.Size((rank, a.shape[1])))


def relative_error(spool: Spool, sent: Tensors, applied: Tensors, fold: Mapping[str, torch.Tensor]) -> float:
    """|applied - mean product| / |mean product| over all modules, with the adapter and the fold as they are sent."""
    off = ideal = 0.0
    for module, stack in stacks(spool, sent):
        a_name, b_name = names_of(module, sent)
        ideal += stack.square()
        rest = stack.minus(applied[b_name], applied[a_name])
        if f"{module}/A" in fold:
            rest = rest.minus(fold[f"{module}/B"], fold[f"{module}/A"])
        off += rest.square()
    return math.sqrt(off / ideal) if ideal else float(off > 0)
