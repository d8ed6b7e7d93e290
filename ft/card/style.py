"""The card's style sheet: light, dark, print and phone width, system fonts only."""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1c1f23; --soft: #5c636b;
  --rule: #dcd9d1; --panel: #f3f1eb; --accent: #1d4f7c; --weak: #8b9097; --good: #2c6a48;
  --warn: #8a5a00; --bad: #a2302a; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e6e4df; --soft: #a0a6ad;
  --rule: #343a41; --panel: #1d2126; --accent: #86b8e6; --weak: #7d858e; --good: #7cc39b;
  --warn: #e0b15a; --bad: #ee8f86; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --rule: #bbb;
  --panel: #f4f4f4; --accent: #1d4f7c; --weak: #777; --good: #2c6a48; --warn: #7a4f00;
  --bad: #8d2a25; } }
body:has(#all:checked) details::details-content { content-visibility: visible; display: block;
  block-size: auto; }
.all { display: none; }
@supports selector(::details-content) and selector(:has(a)) { .all { display: inline-block; } }
.skip { position: absolute; left: 1rem; top: -4rem; background: var(--paper); padding: .4rem .8rem;
  z-index: 1; } .skip:focus { top: .6rem; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui,
  "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif; font-variant-numeric:
  tabular-nums; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
header, main, footer { max-width: 62rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 3rem; }
header p { max-width: none; }
h1, .conclusion { font-family: Charter, "Iowan Old Style", Georgia, "Liberation Serif", serif; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; font-weight: 600; margin: .2rem 0
  .6rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; font-weight: 650; margin: 0 0 .9rem; line-height: 1.3; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.6rem 0 .5rem; }
p { margin: 0 0 .8rem; max-width: 44rem; overflow-wrap: anywhere; }
.eyebrow { font-size: .78rem; letter-spacing: .09em; text-transform: uppercase; color: var(--soft);
  margin: 0; }
.soft, footer, caption, figcaption { color: var(--soft); }
.conclusion { font-size: clamp(1.2rem, 3.2vw, 1.55rem); line-height: 1.4; margin: 0 0 1.4rem;
  max-width: 50rem; }
.note { border-left: 3px solid var(--warn); padding: .1rem 0 .1rem .9rem; margin: 1rem 0; }
nav { margin: 1.6rem 0 0; padding: .7rem 0; font-size: .88rem; border: solid var(--rule);
  border-width: 1px 0; display: flex; gap: .4rem 2rem; align-items: start;
  justify-content: space-between; flex-wrap: wrap; }
nav ul { list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: .25rem
  1.2rem; flex: 1 1 24rem; }
.all { white-space: nowrap; cursor: pointer; } .all input { accent-color: var(--accent);
  margin: 0 .35rem 0 0; vertical-align: -.1em; }
a { color: var(--accent); text-underline-offset: .18em; text-decoration-thickness: 1px; }
:is(a, summary, input, .scroll):focus-visible { outline: 2px solid var(--accent);
  outline-offset: 3px; }
section { border-bottom: 1px solid var(--rule); padding: 1.5rem 0 .3rem; scroll-margin-top: 1rem; }
section:has(> details) { padding: 0; } #verdict { border: 0; }
section > details { margin: 0; }
section > details > summary { padding: .85rem 0; display: flex; align-items: baseline; gap: .8rem;
  list-style: none; font-size: 1rem; }
section > details > summary::-webkit-details-marker { display: none; }
section > details > summary::before { content: ""; flex: none; width: .45rem; height: .45rem;
  border: solid var(--soft); border-width: 0 2px 2px 0; transform: rotate(-45deg);
  margin-right: .1rem; }
section > details[open] > summary::before { transform: rotate(45deg); }
section > details > summary:hover h2 { text-decoration: underline; text-decoration-thickness: 1px;
  text-underline-offset: .2em; }
summary h2, .empty h2 { margin: 0; font-size: 1.1rem; }
.evidence { padding: .4rem 0 1.2rem; scroll-margin-top: 3.6rem; }
.empty { display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: baseline;
  padding: .85rem 0 .85rem 1.35rem; } .empty p { margin: 0; font-size: .92rem; }
.tally { margin: -.6rem 0 1.4rem; }
.scroll { overflow-x: auto; margin: 0 0 1.2rem; }
table { border-collapse: collapse; font-size: .92rem; min-width: min(100%, 24rem); }
caption { text-align: left; font-size: .85rem; padding: 0 0 .5rem; }
th, td { text-align: left; vertical-align: top; padding: .38rem 1.3rem .38rem 0; border-bottom: 1px
  solid var(--rule); }
thead th { font-weight: 600; font-size: .82rem; color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 5.5rem; }
tr:last-child > * { border-bottom: 0; }
td.n, th.n { text-align: right; white-space: nowrap; }
.aside { display: none; }
td.n small { display: block; color: var(--soft); font-size: .8rem; }
tr.tuned > * { font-weight: 650; } tr.tuned small { font-weight: 400; }
.word { font-weight: 600; white-space: nowrap; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.none { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
  gap: 1.2rem 2.2rem; margin: 0 0 1.6rem; }
figure { margin: 0; max-width: 26rem; } figcaption { font-size: .88rem; margin-bottom: .3rem; }
figcaption b { color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11.5px; fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 10.5px; }
svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
svg .mid { text-anchor: middle; } svg .end { text-anchor: end; }
svg .row.weak { fill: var(--soft); }
svg .row.strong { font-weight: 600; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
svg .bar { stroke-width: 2; stroke-linecap: round; } svg .bar.strong { stroke: var(--accent);
  stroke-width: 3; } svg .bar.weak { stroke: var(--weak); }
svg .dot.strong { fill: var(--accent); } svg .dot.weak { fill: var(--weak); }
svg .band { fill: color-mix(in srgb, var(--accent) 16%, transparent); stroke: none; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .line.one { stroke: var(--accent); } svg .line.two { stroke: var(--weak); }
svg .line.two { stroke-dasharray: 5 3; }
svg .point.one { fill: var(--accent); }
svg .point.two { fill: color-mix(in srgb, var(--weak) 25%, var(--paper));
  stroke: var(--weak); stroke-width: 1.5; }
.matrix th, .matrix td { padding: .3rem .55rem; border: 0; text-align: right; }
.matrix td { background: color-mix(in srgb, var(--accent) calc(var(--s) * 45%), var(--panel));
  border: 2px solid var(--paper); min-width: 2.6rem; }
.matrix tr:last-child td { border: 2px solid var(--paper); }
.matrix thead th { font-weight: 500; color: var(--ink); }
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  font-size: .85rem; }
pre { background: var(--panel); padding: .8rem 1rem; margin: 0 0 1.2rem; white-space: pre-wrap;
  overflow-wrap: anywhere; border-radius: 3px; }
td code { overflow-wrap: anywhere; } td.long { overflow-wrap: anywhere; min-width: 12rem; }
details { margin: 0 0 1rem; } summary { cursor: pointer; font-size: .92rem; }
details[open] > summary { margin-bottom: .6rem; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; margin: 0 0
  1.2rem; font-size: .95rem; } dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0;
  overflow-wrap: anywhere; }
footer { padding-top: 1.5rem; padding-bottom: 3rem; font-size: .85rem; }
@media (max-width: 34rem) { header, main, footer { padding-left: 1.1rem; padding-right: 1.1rem; }
  header { padding-top: 1.8rem; } th, td { padding-right: .9rem; }
  dl.facts { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); }
  caption { position: sticky; left: 0; max-width: calc(100vw - 2.2rem); }
  /* A shade at the edge that has more to show, covered where the end is reached. */
  .scroll { --shade: color-mix(in srgb, var(--ink) 22%, transparent); background:
  linear-gradient(to right, var(--paper) 40%, transparent) left / 1.6rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 1.6rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / .5rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / .5rem 100% no-repeat scroll; } }
@media (max-width: 34rem) { .stack thead { display: none; } .stack tr { display: block; padding:
  .55rem 0; border-bottom: 1px solid var(--rule); } .stack th, .stack td { display: inline; padding:
  0; border: 0; } .stack td::before { content: " "; } .stack td.long { display: block; }
  .stack caption { display: block; } .stack, .stack tbody { display: block; }
  .stack .aside { display: inline; } .stack td.n { white-space: normal; } }
@media print { nav, .skip { display: none; } html { font-size: 12.5px; } body { font-size: 1rem; }
  header { padding-top: 0; } header, main, footer { max-width: none; padding-left: 0;
  padding-right: 0; }
  .scroll { overflow: visible; break-inside: avoid; }
  #verdict .scroll { break-inside: auto; } figure, tr, pre { break-inside: avoid; }
  h2, h3, caption, summary { break-after: avoid; }
  summary { list-style: none; } details > summary, details[open] > summary { margin-bottom: .4rem; }
  section > details > summary::before { display: none; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; } }
"""
