"""The style of a report: light and dark by the reader's system, one column on a phone, no script."""

STYLE = """
:root{color-scheme:light dark;--back:#fbfbf9;--card:#fff;--ink:#1d2226;--soft:#5b6670;--line:#e2e4e2;
--grid:#ecedea;--c0:#1767a8;--c1:#c8541f;--c2:#2c7d45;--c3:#7a4fa0;--c4:#93700a;--c5:#555d64;--shade:#f1efe6;
--ok:#1d7440;--open:#8a6100;--doubt:#b3261e;--none:#5b6670}
@media (prefers-color-scheme:dark){:root{--back:#14171a;--card:#1c2024;--ink:#e8eaec;--soft:#a3adb6;--line:#32383e;
--grid:#2a2f34;--c0:#6cb4f5;--c1:#ff9b6a;--c2:#73d296;--c3:#c9a4f5;--c4:#e2c05c;--c5:#b6bec6;--shade:#25282a;
--ok:#6fd696;--open:#f0c15a;--doubt:#ff8f86;--none:#a3adb6}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
overflow-wrap:anywhere}
main,header,footer{max-width:1280px;margin:0 auto;padding:0 20px}
h1,h2,h3{overflow-wrap:anywhere}
h1{font-size:1.65rem;line-height:1.2;margin:1.6rem 0 .3rem}
h2{font-size:1.25rem;margin:2.4rem 0 .7rem;padding-top:.5rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.5rem 0 .5rem}
p{margin:.4rem 0}
.soft,.told,.unit{color:var(--soft)}
.skip{position:absolute;left:-999px}
.skip:focus{left:8px;top:8px;background:var(--card);padding:6px 10px;z-index:2}
a{color:var(--c0)}
:focus-visible{outline:3px solid var(--c0);outline-offset:2px;border-radius:3px}
nav{display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.8rem 0}
nav a{padding:.35rem 0;max-width:100%}
.first{display:grid;grid-template-columns:minmax(0,5fr) minmax(0,7fr);gap:18px;margin:1rem 0}
.card,figure{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:14px 16px;margin:0;min-width:0}
.card h2{border:0;margin:0 0 .4rem;padding:0;font-size:1.1rem}
.numbers{display:flex;flex-wrap:wrap;gap:.8rem 2rem}
.numbers div{min-width:7.5rem}
.big{font-size:2.5rem;line-height:1.1;font-weight:650;font-variant-numeric:tabular-nums;white-space:nowrap}
.big small{font-size:1.1rem;font-weight:500}
.level{font-size:1.35rem;font-weight:650;margin:0 0 .3rem}
.is-ok{color:var(--ok)}.is-open{color:var(--open)}.is-doubt{color:var(--doubt)}.is-none{color:var(--none)}
ul.reasons{list-style:none;margin:.3rem 0 0;padding:0}
ul.reasons li{padding:.16rem 0 .16rem 1.6rem;text-indent:-1.6rem}
ul.reasons b{display:inline-block;width:1.6rem;text-indent:0}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:.5rem 1.4rem;margin:.8rem 0}
dl div{min-width:0}
dt{color:var(--soft);font-size:.85rem}
dd{margin:0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,370px),1fr));gap:14px;margin:.8rem 0}
.charts figure{max-width:560px;width:100%}
figcaption{display:flex;flex-wrap:wrap;gap:0 .7rem;align-items:baseline;margin-bottom:.2rem}
.unit,.legend,.told{font-size:.85rem}
.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem}
.legend svg{vertical-align:middle}
figure>svg{display:block;width:100%;height:auto;margin-top:.3rem}
svg text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--soft)}
svg text.mark{fill:var(--ink);font-size:11px;paint-order:stroke;stroke:var(--card);stroke-width:3px}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.grid{stroke:var(--grid)}.axis{stroke:var(--soft)}.shade{fill:var(--shade)}
.rule{fill:none;stroke-width:1.3;stroke-dasharray:3 3}.rule.ink{stroke:var(--ink)}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}
.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}.line.c5{stroke:var(--c5)}
.fill.c0{fill:var(--c0)}.fill.c1{fill:var(--c1)}.fill.c2{fill:var(--c2)}
.fill.c3{fill:var(--c3)}.fill.c4{fill:var(--c4)}.fill.c5{fill:var(--c5)}
.key{display:inline-block;width:.8rem;height:.8rem;border-radius:3px;margin-right:.45rem;vertical-align:-.05rem}
.key.c0{background:var(--c0)}.key.c1{background:var(--c1)}.key.c2{background:var(--c2)}
.key.c3{background:var(--c3)}.key.c4{background:var(--c4)}.key.c5{background:var(--c5)}
tbody th:has(>.key){position:relative;padding-left:1.25rem}
tbody th>.key{position:absolute;left:0;top:.65rem}
.stack thead th{white-space:normal;overflow-wrap:normal;vertical-align:bottom}
.scroll{overflow-x:auto;margin:.2rem 0 .8rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.93rem}
th,td{padding:.3rem .8rem .3rem 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
td{white-space:nowrap}
thead th{color:var(--soft);font-weight:500;white-space:nowrap}
tbody th{font-weight:600;min-width:6rem;max-width:14rem;overflow-wrap:break-word}
tbody th .told{font-weight:400}
.wide td:last-child{white-space:normal;min-width:14rem}
td .wrap{display:inline-block;white-space:normal;min-width:8rem;max-width:18rem}
td svg{display:block;margin-top:.2rem;width:190px;height:18px}
details{margin:.7rem 0}
summary{cursor:pointer;padding:.2rem 0}
pre,code{font:13px/1.45 ui-monospace,Menlo,Consolas,monospace}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.grid-images{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));gap:12px;
margin:.8rem 0}
.grid-images .three{display:grid;grid-template-columns:repeat(3,1fr);gap:6px}
.grid-images img{width:100%;aspect-ratio:1;object-fit:contain;image-rendering:pixelated;
border-radius:4px;background:#808080;display:block}
.grid-images span{font-size:.8rem;color:var(--soft)}
.grid-images p{font-size:.9rem}
footer{padding-top:1.5rem;padding-bottom:3rem;color:var(--soft);font-size:.85rem}
@media (max-width:700px){.first{grid-template-columns:minmax(0,1fr)}main,header,footer{padding:0 14px}
.numbers{gap:.8rem 1rem}.numbers div{min-width:6rem}.big{font-size:2.1rem}
dl{grid-template-columns:repeat(auto-fill,minmax(140px,1fr))}h1{font-size:1.4rem;margin-top:1rem}}
@media (max-width:700px){.stack thead{position:absolute;left:-9999px}.stack table,.stack tbody,.stack tr,.stack th,
.stack td{display:block}.stack tr{border-bottom:1px solid var(--line);padding:.4rem 0}.stack th,.stack td{border:0;
max-width:none;padding-bottom:.1rem}.stack td{display:flex;gap:.8rem;white-space:normal}
.stack td:empty{display:none}
.stack td::before{content:attr(data-column);color:var(--soft);flex:0 0 42%}.stack td .wrap{min-width:0}}
@media print{nav,.skip{display:none}figure,.card{break-inside:avoid}}
"""
