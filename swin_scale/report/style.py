"""The style sheet and the small script of a report. Without the script only the values under the pointer are missing.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart, lighter on dark ground; heat
maps have a scale of their own, see `palette`, dark for the most on a light page and pale for the most on a dark one.
"""

from swin_scale.report.palette import LEVELS


def _levels(colours: tuple[str, ...]) -> str:
    return ";".join(f"--h{at}:{colour}" for at, colour in enumerate(colours))


_HEAT = f"""
:root{{{_levels(LEVELS)}}}
@media (prefers-color-scheme:dark){{:root{{{_levels(LEVELS[::-1])}}}}}
{"".join(f"svg .h{at}{{fill:var(--h{at})}}" for at in range(len(LEVELS)))}
.cells{{shape-rendering:crispEdges}}
svg[data-cells]{{touch-action:manipulation}}
.scale{{flex:0 1 190px;align-self:center;min-width:120px;margin:4px 0 2px;font-size:.78rem;color:var(--soft);
font-variant-numeric:tabular-nums}}
.scale svg{{height:10px;border-radius:3px;border:1px solid var(--rule)}}
.scale div{{display:flex;justify-content:space-between}}
.minis{{display:grid;grid-template-columns:repeat(auto-fill,minmax(76px,1fr));gap:12px 10px;margin:8px 0 4px}}
@media (min-width:521px){{.minis.large{{grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}}}}
.minis>div{{position:relative;min-width:0}}
.minis svg{{border:1px solid var(--rule);border-radius:3px}}
.minis b{{display:block;font-size:.78rem;font-weight:600;line-height:1.3}}
.minis span{{display:block;color:var(--soft);font-weight:400;white-space:nowrap}}
.k{{white-space:nowrap;width:1%}}
.part{{margin:26px 0 12px}}
svg .bar{{fill:var(--c)}}
.wide{{grid-column:1/-1}}
.drawn{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,560px),1fr));gap:16px}}
.drawn img{{display:block;max-width:100%;height:auto;border-radius:4px}}
"""

CSS = (
    """
:root{color-scheme:light dark;--ground:#f6f7f9;--card:#fff;--ink:#1b2330;--soft:#5b6675;--rule:#dde2e9;
--c1:#0072b2;--c2:#d55e00;--c3:#00805e;--c4:#a8488a;--good:#00704f;--bad:#b3261e;--wait:#8a5a00;--mark:#8a94a3}
@media (prefers-color-scheme:dark){:root{--ground:#10151c;--card:#19212b;--ink:#e6ebf2;--soft:#9aa7b8;--rule:#2c3744;
--c1:#56b4e9;--c2:#ff9a56;--c3:#35cba0;--c4:#e79ac8;--good:#4fd6a8;--bad:#ff8a80;--wait:#f0c060;--mark:#6f7d8f}}
*{box-sizing:border-box}
body{margin:0 auto;padding:28px 24px 48px;max-width:1500px;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif}
h1{font-size:1.65rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:36px 0 12px}
h3{font-size:1rem;margin:0}
a{color:var(--c1)}
header{display:flex;flex-wrap:wrap;gap:8px 18px;align-items:center}
header p{margin:0;color:var(--soft);flex-basis:100%;overflow-wrap:anywhere}
.badge{border:1.5px solid;border-radius:99px;padding:2px 12px;font-weight:600;font-size:.9rem}
.good{color:var(--good)}.bad{color:var(--bad)}.wait{color:var(--wait)}
.cause{border-left:4px solid var(--bad);background:var(--card);border-radius:0 8px 8px 0;padding:10px 14px;
margin:18px 0 0;overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:12px;margin:20px 0 0}
.facts div,figure,.table{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.facts div{flex:1 1 128px;max-width:240px;padding:10px 14px;min-width:0}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
dd small{display:block;font-size:.8rem;font-weight:400;color:var(--soft)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:16px}
figure{margin:0;padding:14px 14px 10px;position:relative;min-width:0}
figcaption{display:flex;flex-wrap:wrap;gap:2px 12px;align-items:baseline;margin:0 0 6px}
figcaption span{color:var(--soft);font-size:.84rem}
.key::before{content:"";display:inline-block;width:16px;height:3px;border-radius:2px;background:var(--c);
margin-right:6px;vertical-align:middle}
figure p{color:var(--soft);font-size:.84rem;margin:4px 0 0;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
.x{text-anchor:middle}.y,.lane{text-anchor:end}
.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}
svg path{fill:none;vector-effect:non-scaling-stroke}
.grid{stroke:var(--rule)}.axis{stroke:var(--mark)}
.mark{stroke:var(--mark);stroke-dasharray:4 3;stroke-width:1.4}
.line{stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.raw{stroke:var(--c);stroke-width:1;stroke-linejoin:round;stroke-linecap:round;opacity:.38}
svg .band{fill:var(--c);fill-opacity:.22;stroke:var(--c);stroke-opacity:.5;stroke-width:1;stroke-linejoin:round}
svg .dot{fill:var(--card);stroke:var(--c);stroke-width:2}
.tick{stroke:var(--c);stroke-width:2}
.tip{position:absolute;pointer-events:none;background:var(--ink);color:var(--card);border-radius:6px;padding:4px 9px;
font-size:.8rem;line-height:1.35;white-space:pre;font-variant-numeric:tabular-nums;z-index:1}
.table{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 14px;border-top:1px solid var(--rule);vertical-align:top;overflow-wrap:anywhere}
thead th{border-top:0;color:var(--soft);font-weight:600;white-space:nowrap}
td.n,th.n{text-align:right;white-space:nowrap}
tr.head td{background:var(--ground);font-weight:600}
td.from{color:var(--soft)}tr.default td{color:var(--soft)}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
details{margin:0 0 12px}
summary{cursor:pointer;font-size:1.15rem;font-weight:600;margin:28px 0 12px}
.more summary{font-size:.95rem;margin:12px 0 8px}
.note{color:var(--soft);font-size:.88rem;margin:0 0 12px}
footer{margin-top:40px;color:var(--soft);font-size:.84rem}
@media (max-width:520px){body{padding:18px 12px 36px;font-size:14px}.facts{gap:8px}
figure{padding:12px 8px 8px}svg text{font-size:14px}th,td{padding:6px 9px}}
@media print{body{background:#fff}figure,.table{break-inside:avoid}}
"""
    + _HEAT
)

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-hover]")) {
  const cells = JSON.parse(svg.dataset.hover), tip = document.createElement("div");
  const rule = document.createElementNS(svg.namespaceURI, "path");
  tip.className = "tip"; tip.hidden = true; rule.setAttribute("class", "axis");
  svg.parentNode.append(tip); svg.append(rule);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; rule.removeAttribute("d"); });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / scale;
    let low = 0, high = cells.length - 1;
    while (low < high) { const mid = (low + high) >> 1; if (cells[mid][0] < x) low = mid + 1; else high = mid; }
    if (low && x - cells[low - 1][0] < cells[low][0] - x) low--;
    const [at, step, words] = cells[low];
    tip.textContent = "step " + step.toLocaleString() + "\\n" + words;
    tip.hidden = false;
    rule.setAttribute("d", "M" + at + " 8V196");
    const left = svg.offsetLeft || box.left - svg.parentNode.getBoundingClientRect().left;
    const place = left + at * scale, right = place + 12 + tip.offsetWidth > box.width;
    tip.style.left = (right ? place - tip.offsetWidth - 10 : place + 10) + "px";
    tip.style.top = (event.clientY - svg.parentNode.getBoundingClientRect().top - 12) + "px";
  });
}
for (const svg of document.querySelectorAll("svg[data-cells]")) {
  let map, tip;
  svg.addEventListener("pointerleave", () => { if (tip) tip.hidden = true; });
  svg.addEventListener("pointermove", (event) => {
    map = map || JSON.parse(svg.dataset.cells);
    if (!tip) { tip = document.createElement("div"); tip.className = "tip"; svg.parentNode.append(tip); }
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const column = Math.floor(((event.clientX - box.left) / scale - map.area[0]) / map.area[2] * map.columns.length);
    const row = Math.floor(((event.clientY - box.top) / scale - map.area[1]) / map.area[3] * map.rows.length);
    const inside = row >= 0 && column >= 0 && row < map.rows.length && column < map.columns.length;
    const value = inside ? map.values[row * map.columns.length + column] : null;
    tip.hidden = value === null;
    if (tip.hidden) return;
    tip.textContent = map.rows[row] + "\\n" + map.columns[column] + "\\n" + value.toLocaleString() + map.unit;
    const frame = svg.parentNode.getBoundingClientRect(), x = event.clientX - frame.left;
    const page = document.documentElement.clientWidth;
    const right = event.clientX + 24 + tip.offsetWidth > page;
    tip.style.left = (right ? Math.max(x - tip.offsetWidth - 12, -frame.left) : x + 14) + "px";
    tip.style.top = (event.clientY - frame.top + 14) + "px";
  });
}
"""
