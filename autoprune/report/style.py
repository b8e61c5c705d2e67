"""The report's look, in light and in dark."""

STYLE = """
:root{--ink:#1d2330;--soft:#5f6878;--line:#e3e6ec;--page:#fbfbfd;--card:#fff;--blue:#2563c9;--pale:#9db4d8;
--orange:#d9730d;--green:#1a7f4b;--red:#c0332b;--green-pale:#e6f4ec;--red-pale:#fbeae8;--empty:#e7ebf2}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9f0;--soft:#9aa3b5;--line:#2c3342;--page:#12151c;--card:#191d27;
--blue:#6ea4f7;--pale:#4a6391;--orange:#f09a45;--green:#5ccb8f;--red:#f0837b;--green-pale:#173325;--red-pale:#3a1d1c;
--empty:#2a3040}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-font-smoothing:antialiased}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:16px;margin:0 0 10px;font-weight:620}
.eyebrow{margin:0 0 6px;font-size:12px;letter-spacing:.08em;text-transform:uppercase;color:var(--soft)}
.goal{margin:0 0 16px;color:var(--soft)}
.verdict{margin:0 0 12px;padding:12px 16px;border-radius:8px}
.verdict.met{background:var(--green-pale)}.verdict.missed{background:var(--red-pale)}
.badge{font-weight:650;margin-right:6px;text-transform:uppercase;font-size:12px;letter-spacing:.05em}
.met .badge{color:var(--green)}.missed .badge{color:var(--red)}
section,figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px;margin:0 0 20px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:20px;margin-bottom:20px}
.figures figure{margin:0}.figures figure:first-child{grid-column:1/-1}
figcaption{font-size:13px;color:var(--soft);margin-top:6px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th{font-weight:500;color:var(--soft);text-align:left;font-size:12.5px}
th,td{padding:7px 14px 7px 0;border-bottom:1px solid var(--line);white-space:nowrap}
tbody tr:last-child td{border-bottom:0}
th:last-child,td:last-child{padding-right:0}
.number{text-align:right;font-variant-numeric:tabular-nums}
.strong td{font-weight:650}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 20px;margin:0;font-size:14px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
section>ul:not(.legend){margin:14px 0 0;padding-left:20px;font-size:14px;color:var(--soft)}
.plot{display:block;width:100%;height:auto}
.plot text{fill:var(--ink);font-size:12px;font-family:inherit}
.plot .tick{fill:var(--soft);font-variant-numeric:tabular-nums}
.plot .name{fill:var(--soft)}
.axis{stroke:var(--soft);fill:none}.grid{stroke:var(--line);fill:none}
.trial{fill:var(--pale)}.best,.front{stroke:var(--blue);stroke-width:2;fill:none}
.baseline,.limit{stroke:var(--orange);stroke-width:1.5;stroke-dasharray:5 4;fill:none}
.diagonal{stroke:var(--soft);stroke-dasharray:3 4;fill:none}
.finalist{fill:var(--card);stroke:var(--blue);stroke-width:2}.chosen{fill:var(--blue);stroke:var(--card);stroke-width:1.5}
.baseline-dot{fill:var(--orange)}
.bar{fill:var(--blue)}.bar-full{fill:var(--empty)}.dropped{display:none}
.dropped-full{fill:none;stroke:var(--red);stroke-dasharray:4 3}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;margin:0 0 8px;padding:0;font-size:12.5px;
color:var(--soft)}
.key{display:inline-block;width:16px;height:9px;margin-right:6px;border-radius:2px;vertical-align:middle}
i.trial{background:var(--pale);width:7px;height:7px;border-radius:50%}
i.best,i.front{background:var(--blue);height:2px}
i.baseline,i.limit{background:repeating-linear-gradient(90deg,var(--orange) 0 4px,transparent 4px 7px);height:2px}
i.diagonal{background:repeating-linear-gradient(90deg,var(--soft) 0 3px,transparent 3px 6px);height:2px}
i.finalist{border:2px solid var(--blue);width:10px;height:10px;border-radius:50%}
i.chosen{background:var(--blue);width:10px;height:10px;border-radius:50%}
i.baseline-dot{background:var(--orange);width:9px;height:9px;border-radius:50%}
i.bar{background:var(--blue)}i.bar-full{background:var(--empty)}
i.dropped-full{border:1px dashed var(--red);background:none}
@media print{body{background:#fff}section,figure{break-inside:avoid}}
""".strip()
