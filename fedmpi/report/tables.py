"""The tables of a run: results, numbers by round, clients, events, settings. Every text from a file is escaped here."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fedmpi.progress import size
from fedmpi.report.reading import Line, Run, number

MANY_CLIENTS = 12  # more rows than this fold away, so that the federation's row stays in sight
NONE = "–"


def results(run: Run) -> str:
    rows = run.rows()
    if not rows:
        return '<h2>Results</h2>\n<p class="note">Nothing has been evaluated yet.</p>'
    single = [row for row in rows if row[0].startswith("client ")]
    folded = single if len(single) > MANY_CLIENTS else []
    most = max((loss for _, scores in rows if (loss := number(scores.get("eval_loss"))) is not None), default=0.0)
    page = f"<h2>Results</h2>\n{_result_table([row for row in rows if row not in folded], most, 'Results')}"
    if folded:
        table = _result_table(folded, most, "Clients alone")
        page += f"\n<details><summary>Each of the {len(folded)} clients alone</summary>{table}</details>"
    return f'{page}\n<p class="note">{escape(" ".join(_result_notes(run)))}</p>'


def _result_table(rows: Sequence[tuple[str, Mapping[str, Any]]], most: float, name: str) -> str:
    body, emulated = "", any("eval_loss_emu" in scores for _, scores in rows)
    for label, scores in rows:
        loss = number(scores.get("eval_loss"))
        bar = f'<i style="width:{100 * loss / most:.1f}%"></i>' if loss is not None and most > 0 else ""
        cells = f'<td>{_form(loss, "{:.3f}")}</td><td class="bar" aria-hidden="true">{bar}</td>'
        cells += _shares(scores, "")
        if emulated:
            cells += f"<td>{_form(number(scores.get('eval_loss_emu')), '{:.3f}')}</td>{_shares(scores, '_emu')}"
        chief = ' class="chief"' if label.startswith("the federation") else ""
        body += f'<tr{chief}><th scope="row">{escape(label)}</th>{cells}</tr>\n'
    head = f'{_head("trained on", "held-out loss")}<td class="bar"></td>{_head("token accuracy", "exact match")}'
    head += _head("loss with emulator", "token accuracy", "exact match") if emulated else ""
    return _table(head, body, name)


def _shares(scores: Mapping[str, Any], ending: str) -> str:
    keys = (f"eval_token_accuracy{ending}", f"exact_match{ending}")
    return "".join(f"<td>{_form(number(scores.get(key)), '{:.1%}')}</td>" for key in keys)


def _result_notes(run: Run) -> list[str]:
    notes = ["Loss per supervised token, lower is better; token accuracy and exact match, higher is better."]
    if run.data:
        notes.append(f"Held-out rows: {run.data.get('heldout', NONE)}.")
    rows = run.settings.get("eval", {}).get("rows")
    if rows is not None:
        notes.append(f"Exact match on the first {rows} held-out rows.")
    expected = len(run.data.get("train_rows", ()))
    if run.alone and len(run.alone) < expected:
        notes.append(f"{len(run.alone)} of {expected} clients alone have finished so far.")
    return notes


def _form(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def _head(*names: str, middle: Sequence[str] = ()) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return cells + "".join(f'<th scope="col" class="mid">{escape(name)}</th>' for name in middle)


def _table(head: str, body: str, name: str) -> str:
    where = f'class="card scroll" tabindex="0" role="region" aria-label="{escape(name)}"'
    return f"<div {where}><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def numbers(run: Run) -> str:
    """The plots' numbers as text, folded away."""
    columns = ("train_loss", "{:.4f}"), ("eval_loss", "{:.4f}"), ("seconds", "{:.2f}"), ("wait_s", "{:.2f}"), ("tokens", "{:,.0f}")
    shown = [(key, form) for key, form in columns if run.points(key)]
    if not run.rounds:
        return ""
    body = ""
    for line in run.lines:
        if "event" in line and "eval_loss" not in line:
            continue
        cells = "".join(f"<td>{_form(number(line.get(key)), form)}</td>" for key, form in shown)
        cells += "".join(f"<td>{size(line[key]) if key in line else NONE}</td>" for key in ("up_bytes", "down_bytes"))
        counted = f"{len(line['counted'])} of {len(line['cohort'])}" if "counted" in line else NONE
        body += f'<tr><th scope="row">{round_name(line["round"])}</th>{cells}<td>{counted}</td></tr>\n'
    head = _head("round", *(key for key, _ in shown), "up", "down", "clients counted")
    return f"<details><summary>These numbers as a table</summary>{_table(head, body, 'Numbers by round')}</details>"


def round_name(index: int) -> str:
    """A round in a table; metrics.jsonl calls the state before the first one -1."""
    return "start" if index < 0 else str(index)


def clients(run: Run) -> str:
    """What each client has and what it did."""
    train, heldout = run.data.get("train_rows", ()), run.data.get("heldout_rows", ())
    turns, losses = _turns(run), {client: points[-1][1] for client, points in run.traces.items() if points}
    if not train and not turns:
        return '<h2>Clients</h2>\n<p class="note">Their rows will stand here when the first summary is written.</p>'
    shares = run.data.get("client_categories", ())
    categories = sorted({name for share in shares for name in share})
    body = ""
    for client in range(len(train)) if train else sorted(turns):
        cells = f"<td>{train[client]:,}</td><td>{heldout[client]:,}</td>" if train else ""
        cells += f"<td>{turns.get(client, 0):,}</td>" if turns else ""
        cells += f"<td>{_form(losses.get(client), '{:.3f}')}</td>" if losses else ""
        cells += "".join(_heat(shares[client].get(name, 0), sum(shares[client].values())) for name in categories)
        body += f'<tr><th scope="row">client {client}</th>{cells}</tr>\n'
    names = ["client", *(("training rows", "held out") if train else ())]
    names += (["counted"] if turns else []) + (["last loss"] if losses else [])
    return f"<h2>Clients</h2>\n{_table(_head(*names, middle=categories), body, 'Clients')}\n{_clients_note(run, categories)}"


def _turns(run: Run) -> dict[int, int]:
    """How many rounds counted each client; only where the clients of the rounds are the parties of the data."""
    counted = [client for line in run.rounds if run.federated for client in line.get("counted", ())]
    return {client: counted.count(client) for client in set(counted)}


def _heat(count: int, total: int) -> str:
    return f'<td class="heat{"" if count else " none"}" style="--h:{count / total if total else 0:.3f}">{count:,}</td>'


def _clients_note(run: Run, categories: Sequence[str]) -> str:
    parts = [f"Splitter {run.data['splitter']}."] if "splitter" in run.data else ["Their rows are told by the summary, at the end."]
    parts += ["Counted: the rounds that its update counted in."] if run.rounds and run.federated else []
    parts += ["Tinted: training rows by category, the stronger the larger a part of the client's rows."] if categories else []
    return f'<p class="note">{escape(" ".join(parts))}</p>'


def events(run: Run) -> str:
    """What happened besides rounds that went well."""
    rows = [row for line in run.lines for row in _happened(line)]
    if not rows:
        return '<h2>Events</h2>\n<p class="note">None: no failure, no resume, no round repeated.</p>'
    body = "".join(
        f'<tr><th scope="row">{round_name(index)}</th><td class="text">{escape(what)}</td>'
        f'<td class="text">{escape(text)}</td></tr>\n'
        for index, what, text in rows
    )
    head = '<th scope="col">round</th><th scope="col" class="text">what</th><th scope="col" class="text">message</th>'
    return f"<h2>Events</h2>\n{_table(head, body, 'Events')}"


def _happened(line: Line) -> Iterator[tuple[int, str, str]]:
    index, kind = line["round"], line.get("event")
    if kind is not None and kind != "evaluation":
        rest = {key: value for key, value in line.items() if key not in ("round", "event", "message")}
        told = [str(line.get("message", "")), *(f"{key} {value}" for key, value in rest.items())]
        yield index, str(kind).replace("_", " "), "; ".join(part for part in told if part)
    for client, failure in line.get("failures", {}).items():
        yield index, f"failure of client {client}", str(failure)


def settings(run: Run) -> str:
    """config.yaml, by group."""
    groups = {"": {key: value for key, value in run.settings.items() if not isinstance(value, dict)}}
    groups |= {key: value for key, value in run.settings.items() if isinstance(value, dict)}
    sections = "".join(
        f"<section><h3>{escape(name or 'run')}</h3><dl>{pairs({k: _value(v) for k, v in group.items()})}</dl></section>"
        for name, group in groups.items()
    )
    return f'<h2>Settings</h2>\n<div class="card settings">{sections}</div>'


def _value(value: object) -> str:
    """A setting as it is written on a command line."""
    if value is None or value in ([], {}):
        return NONE
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return ",".join(f"{key}={part}" for key, part in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def pairs(facts: Mapping[str, Any]) -> str:
    """Terms and what they are; what is not known is left out."""
    known = {key: value for key, value in facts.items() if value is not None}
    return "".join(f"<div><dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd></div>" for key, value in known.items())
