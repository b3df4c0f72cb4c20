"""A plan for people: figures as in papers, and every size as a plain number of bytes. It computes nothing."""

from collections.abc import Sequence
from typing import Any

from fedmpi.plan.figures import Plan, Sent


def show(plan: Plan) -> None:
    """The plan for people: figures as in papers, and every size as a plain number of bytes."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120, force_terminal=False)
    print(f"{plan.algorithm}, {plan.method} on {plan.model}: {plan.original_parameters:,} parameters in {plan.dtype}")
    for title, message in _messages(plan):
        table = Table(
            "name", "shape", "bytes", title=f"{title}: {_bytes(sum(t.bytes for t in message))} in {_tensors(len(message))}"
        )
        for tensor in _shortened(message):
            table.add_row(tensor.name, " x ".join(map(str, tensor.shape)), f"{tensor.bytes:,}" if tensor.bytes else "")
        console.print(table)
    table = Table("", *(side.side for side in plan.sides), title="Each side")
    for label, cells in _rows(plan):
        table.add_row(label, *cells)
    console.print(table)
    for line in _lines(plan):
        print(line)


def _messages(plan: Plan) -> list[tuple[str, tuple[Sent, ...]]]:
    if plan.down == plan.up:
        return [("Trained and exchanged, down and up in every round", plan.up)]
    return [("Down in every round", plan.down), ("Trained, and up in every round", plan.up)]


def _shortened(message: Sequence[Sent]) -> list[Sent]:
    """Layers repeat: of a long list the beginning and the end."""
    if len(message) <= 12:
        return list(message)
    return [*message[:5], Sent(f"... {len(message) - 10} more (--json has them all)", (), 0), *message[-5:]]


def _rows(plan: Plan) -> list[tuple[str, list[str]]]:
    def row(label: str, cell: Any) -> tuple[str, list[str]]:
        return label, [cell(side) for side in plan.sides]

    return [
        row("layers (of these trained)", lambda s: f"{s.layers} ({s.trained_layers})"),
        row("parameters held", lambda s: f"{s.parameters:,}"),
        row("bytes held", lambda s: f"{s.held_bytes:,}"),
        row("share of the original's weights", lambda s: f"{s.disclosed_share:.1%}"),
        row("trained", lambda s: f"{s.trained_parameters / 1e6:.3f} M ({s.trained_parameters:,})"),
        row("GFLOP/token, FedBiOT's count", lambda s: _giga(s.paper_macs_per_token)),
        row("GFLOP/token, all operations", lambda s: _giga(s.flops_per_token)),
        row("peak memory, at most about", lambda s: _bytes(s.peak_bytes)),
    ]


def _lines(plan: Plan) -> list[str]:
    lines = [
        f"a client's round: {_bytes(plan.down_bytes + plan.up_bytes)}, down {plan.down_bytes:,} and up {plan.up_bytes:,} bytes"
    ]
    if (plan.down_most_bytes, plan.up_most_bytes) != (plan.down_bytes, plan.up_bytes):
        lines.append(f"  coded, at most {plan.down_most_bytes:,} bytes down and {plan.up_most_bytes:,} up")
    if plan.up_odd_bytes != plan.up_bytes:
        lines.append(f"  in odd rounds up {plan.up_odd_bytes:,} bytes")
    if plan.down_moved_bytes:
        odd, even = plan.down_moved_bytes
        lines.append(f"  down to who had the round before: {odd:,} bytes in odd rounds, {even:,} in even ones")
    lines += [f"  up from a client of rank {rank}: {num:,} bytes" for rank, num in plan.up_bytes_by_rank.items()]
    lines += ["  and down what the rule folds into the base, which grows with the cohort's ranks"] if plan.folds else []
    lines += [f"before the first round, to each client: {_bytes(plan.once_bytes)}"] if plan.once_bytes else []
    if plan.prealign_flops or plan.align_flops:
        before, within = (f"{flops / 1e9:,.2f} GFLOP" for flops in (plan.prealign_flops, plan.align_flops))
        lines.append(f"alignment on the server: at most {before} before the first round, {within} in every round")
    if plan.link_mbps is not None:
        once = f"; before the first {plan.once_s:.2f} s" if plan.once_bytes else ""
        lines.append(f"at {plan.link_mbps:g} Mbit/s a round's transfers take {plan.round_s:.2f} s{once}")
    if plan.clients is None or plan.cohort is None:
        return [*lines, "clients: as many as the data have; --clients N places them"]
    lines.append(
        f"{plan.clients} clients, {plan.cohort} per round: up to the server {plan.cohort * plan.up_bytes:,} bytes per round"
    )
    for rank, hosted in plan.placement.items():
        what = f"clients {', '.join(map(str, hosted))}" if hosted else "idle"
        server = "the server" + (f" and {what}" if hosted else "")
        lines.append(f"  rank {rank}: {server if rank == 0 else what}")
    return lines


def _bytes(num: int) -> str:
    return f"{num / 1e6:.2f} MB ({num:,} bytes)"


def _tensors(num: int) -> str:
    return "1 tensor" if num == 1 else f"{num} tensors"


def _giga(num: int | None) -> str:
    if num is None:
        return "-"
    return f"{num / 1e9:.2f}" if num >= 1e8 else f"{num / 1e9:.2g}"
