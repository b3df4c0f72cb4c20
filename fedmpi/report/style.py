"""The look of the report, in light and in dark. It knows class names only."""

CSS = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1b2028; --soft: #59626f; --rule: #dfe3e8;
  --grid: #e8ebef; --a: #2360c5; --b: #c2500a; --c: #8b94a1; --thin: #2360c5; --good: #17734a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #101318; --card: #181c23; --ink: #e7eaee; --soft: #a2abb8; --rule: #2c333d;
    --grid: #262c35; --a: #79aefc; --b: #ff9d57; --c: #7c8694; --thin: #79aefc; --good: #63cf9c; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 56px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 12px; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 8px 0; }
.note { color: var(--soft); font-size: .875rem; }
.badge { display: inline-block; margin-left: 10px; padding: 3px 10px; border: 1px solid currentColor; border-radius: 99px;
  font-size: .8rem; font-weight: 600; line-height: 1.3; vertical-align: .25em; color: var(--soft); }
.badge.finished { color: var(--good); } .badge.failed { color: var(--bad); } .badge.running { color: var(--a); }
.badge.preempted { color: var(--b); }
.facts { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 12px 0 0; }
.facts div { display: flex; gap: 8px; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 0; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; }
.tile { padding: 14px 12px; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .8125rem; display: block; }
.scroll { overflow: auto; max-height: 30rem; } .scroll:focus-visible { outline: 2px solid var(--a); outline-offset: 2px; }
.card.scroll { padding: 0; max-height: 38rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9375rem; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
thead th { position: sticky; top: 0; z-index: 2; background: var(--card); color: var(--soft);
  font-size: .8125rem; font-weight: 600; }
tbody th { font-weight: 400; position: sticky; left: 0; background: var(--card); } tbody tr:last-child > * { border-bottom: 0; }
.text, tbody th, thead th:first-child { text-align: left; }
td.text:last-child { white-space: normal; overflow-wrap: anywhere; width: 99%; }
tr.chief > * { font-weight: 650; }
td.bar { width: 34%; }
.bar i { display: block; height: 10px; border-radius: 0 3px 3px 0; background: var(--c); }
tr.chief .bar i { background: var(--a); }
.heat { text-align: center; padding: 7px 6px; background: color-mix(in srgb, var(--a) calc(var(--h) * 48%), transparent); }
.heat.none { color: var(--soft); }
thead th.mid { text-align: center; padding: 7px 6px; }
figure { margin: 0; } figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 18px; margin-bottom: 8px; }
.key { color: var(--soft); font-size: .875rem; display: inline-flex; align-items: center; gap: 7px; }
.key i { width: 16px; height: 4px; border-radius: 2px; background: var(--c); } .key i.block { width: 11px; height: 11px; }
.key i.a { background: var(--a); } .key i.b { background: var(--b); }
.key i.faint { height: 2px; background: var(--thin); opacity: .5; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; } .plots .wide { grid-column: 1 / -1; }
@media (max-width: 760px) { main { padding: 20px 14px 40px; } .plots { grid-template-columns: minmax(0, 1fr); }
  .bar { display: none; } th, td { padding: 7px 9px; } tbody th { white-space: normal; } }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
svg .axis { fill: var(--ink); } .grid { stroke: var(--grid); } .tick { stroke: var(--c); fill: none; }
.hit { fill: transparent; } .hit:hover { fill: var(--ink); opacity: .07; }
.thin path, .line path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.thin path { stroke: var(--thin); stroke-width: 1.3; } .thin .dot { stroke-width: 7; stroke-opacity: .4; }
.line path { stroke-width: 2.5; }
.line.a path { stroke: var(--a); } .line.b path { stroke: var(--b); }
.line circle { stroke: var(--card); stroke-width: 1.2; } .line.a circle { fill: var(--a); } .line.b circle { fill: var(--b); }
.block.a { fill: var(--a); } .block.b { fill: var(--b); } .block.c { fill: var(--c); }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--soft); padding: 4px 0; } details > .card { margin-top: 8px; }
.settings { columns: 3 260px; column-gap: 28px; font-size: .875rem; }
.settings section { break-inside: avoid; margin-bottom: 14px; }
.settings dl { margin: 2px 0 0; } .settings dl div { display: flex; justify-content: space-between; gap: 14px; }
.settings dt { flex: none; }
.settings dd { text-align: right; font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .8125rem; }
footer { margin-top: 32px; color: var(--soft); font-size: .8125rem; overflow-wrap: anywhere; }
@media print { body { background: none; } .scroll { max-height: none; overflow: visible; } .card { break-inside: avoid; } }
"""
