"""The style sheet and the script of every page: inline, so that a page is one file."""

CSS = """
:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #5d6879; --line: #dfe3ea;
  --right: #1a8f4c; --wrong: #d1373f; --accent: #2f5fd0; --loud: #fff3d1; --loud-ink: #6b4a00;
  --loud-line: #e3a008; --s0: #2f5fd0; --s1: #d9730d; --s2: #1a8f4c; --s3: #9a3fb5; --s4: #0f8b9d;
  --s5: #c2334d; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #12161d; --card: #1b212b; --ink: #e7ebf2; --soft: #98a4b6; --line: #303948;
  --right: #3fc67b; --wrong: #ff6b70; --accent: #86a9ff; --loud: #3a2e0c; --loud-ink: #ffdf8e;
  --loud-line: #c98f0a; --s0: #86a9ff; --s1: #ffab5e; --s2: #3fc67b; --s3: #d58cf0; --s4: #4fd0e3;
  --s5: #ff8199; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 36px 0 10px; }
h3 { font-size: 13px; margin: 0 0 4px; font-weight: 600; }
p { margin: 4px 0; } a { color: var(--accent); }
.soft { color: var(--soft); } small { font-size: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; overflow-x: auto; }
.warning + .card { margin-top: 16px; }
.warning { background: var(--loud); color: var(--loud-ink); border: 1px solid var(--loud-line);
  border-left-width: 8px; border-radius: 8px; padding: 12px 16px; margin: 16px 0 0;
  font-weight: 600; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > td { border-bottom: 0; }
td.number, th.number { text-align: right; }
table.wide { width: 100%; }
.gain { font-weight: 600; } .up { color: var(--right); } .down { color: var(--wrong); }
td.bar { width: 34%; min-width: 160px; vertical-align: middle; padding-right: 0; }
.track { position: relative; height: 10px; border-radius: 5px; background: var(--line); }
.track i { position: absolute; top: 0; bottom: 0; left: 0; border-radius: 5px; }
.track i { background: var(--accent); } .track .before { background: var(--soft); }
code, .mono { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 14px; }
details > summary { cursor: pointer; font-weight: 600; padding: 2px 0; }
details[open] > summary { margin-bottom: 8px; }
.more { margin-top: 14px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px; }
.plot svg { display: block; width: 100%; height: auto; }
.plot text { fill: var(--soft); font-size: 10px; font-variant-numeric: tabular-nums; }
.plot .grid { stroke: var(--line); stroke-width: 1; } .plot .cursor { stroke: var(--soft); }
.plot path { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.plot path.raw { stroke-width: 1; opacity: .3; }
.plot .frontier { stroke: var(--soft); stroke-dasharray: 4 4; }
.plot text.name { fill: var(--ink); } .plot circle.dominated { opacity: .45; }
.readout { color: var(--soft); font-size: 12px; min-height: 18px;
  font-variant-numeric: tabular-nums; }
.readout b { font-weight: 600; }
.s0 { stroke: var(--s0); color: var(--s0); } .s1 { stroke: var(--s1); color: var(--s1); }
.s2 { stroke: var(--s2); color: var(--s2); } .s3 { stroke: var(--s3); color: var(--s3); }
.s4 { stroke: var(--s4); color: var(--s4); } .s5 { stroke: var(--s5); color: var(--s5); }
circle.s0, circle.s1, circle.s2, circle.s3, circle.s4, circle.s5 { fill: currentColor; }
.filters { display: flex; flex-wrap: wrap; gap: 8px; margin: 12px 0; }
.filters label { border: 1px solid var(--line); background: var(--card); border-radius: 99px;
  padding: 4px 14px; cursor: pointer; font-size: 14px; }
.filters input { position: absolute; opacity: 0; }
.filters label:has(:checked) { background: var(--accent); border-color: var(--accent);
  color: var(--card); }
.filters label:has(:focus-visible) { outline: 3px solid var(--accent); outline-offset: 2px; }
.explorer:has(#show-first:checked) .query-row:not(.first-wrong) { display: none; }
.explorer:has(#show-none:checked) .query-row:not(.none-right) { display: none; }
.query-row { display: grid; grid-template-columns: 118px 1fr; gap: 18px; margin-bottom: 12px;
  padding: 12px 14px; }
.query-row .asked { border-right: 1px solid var(--line); padding-right: 14px; }
.tiles { list-style: none; margin: 0; padding: 0; display: grid;
  grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 10px; }
.tile { all: unset; box-sizing: border-box; display: block; width: 100%; cursor: zoom-in;
  font-size: 12px; line-height: 1.35; }
.tile:focus-visible .frame { outline: 3px solid var(--accent); outline-offset: 2px; }
.frame { position: relative; display: block; aspect-ratio: 1; border: 4px solid var(--line);
  border-radius: 8px; background: #fff; overflow: hidden; }
.frame img { width: 100%; height: 100%; object-fit: contain; display: block; }
.frame .absent { display: grid; place-items: center; height: 100%; color: #777; }
.right .frame { border-color: var(--right); } .wrong .frame { border-color: var(--wrong); }
.mark { position: absolute; left: 0; top: 0; padding: 0 7px; border-bottom-right-radius: 7px;
  font-weight: 700; background: var(--soft); color: var(--card); }
.right .mark { background: var(--right); } .wrong .mark { background: var(--wrong); }
.label { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  margin-top: 3px; }
.asked .label { white-space: normal; font-weight: 600; overflow-wrap: anywhere; }
.distance { color: var(--soft); font-variant-numeric: tabular-nums; }
dialog { border: 1px solid var(--line); border-radius: 14px; background: var(--card);
  color: var(--ink); padding: 22px; max-width: min(92vw, 720px); }
dialog::backdrop { background: rgb(0 0 0 / .55); }
dialog .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; }
dialog .tile { cursor: default; font-size: 14px; } dialog .frame { min-width: 220px; }
dialog .label { white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 620px) { .query-row { grid-template-columns: 1fr; }
  .query-row .asked { border: 0; max-width: 118px; } }
@media print { .filters, dialog { display: none; } .query-row { break-inside: avoid; } }
"""

# Two small helps, without which the page still reads: values under the pointer on a plot, and a
# query beside one of its neighbours, enlarged (arrow keys walk along them, Escape leaves).
SCRIPT = """
for (const plot of document.querySelectorAll('.plot[data-series]')) {
  const svg = plot.querySelector('svg'), readout = plot.querySelector('.readout');
  const cursor = plot.querySelector('.cursor'), rest = readout.innerHTML;
  const series = JSON.parse(plot.dataset.series);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const near = series.map(s => s.points.reduce(
      (best, p) => Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best));
    const x = near.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    cursor.setAttribute('x1', x[0]); cursor.setAttribute('x2', x[0]);
    cursor.style.visibility = 'visible';
    readout.replaceChildren(`step ${x[1]}`);
    near.forEach((p, i) => {
      const name = document.createElement('b');
      name.className = 's' + i % 6; name.textContent = ` ${series[i].name} ${p[2]}`;
      readout.append(name);
    });
  });
  svg.addEventListener('pointerleave', () => {
    readout.innerHTML = rest; cursor.style.visibility = 'hidden';
  });
}
const dialog = document.querySelector('dialog');
if (dialog) {
  const pair = dialog.querySelector('.pair'), where = dialog.querySelector('.where');
  let shown = null;
  const show = tile => {
    shown = tile;
    const asked = tile.closest('.query-row').querySelector('.asked .tile');
    pair.replaceChildren(...[asked, tile].map(t => {
      const holder = document.createElement('div');
      holder.className = t.parentElement.className;
      const copy = document.createElement('div');
      copy.className = 'tile'; copy.innerHTML = t.innerHTML;
      holder.append(copy);
      return holder;
    }));
    where.replaceChildren(asked.title, document.createElement('br'), tile.title);
    if (!dialog.open) dialog.showModal();
  };
  document.addEventListener('click', event => {
    const tile = event.target.closest('button.tile');
    if (tile) show(tile); else if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener('keydown', event => {
    const step = {ArrowRight: 'nextElementSibling', ArrowLeft: 'previousElementSibling'}[event.key];
    const next = step && shown.parentElement[step];
    if (next && next.querySelector('button.tile')) show(next.querySelector('button.tile'));
  });
}
"""
