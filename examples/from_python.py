"""A search from Python, on the embedded demo: half of the multiply-adds, twelve trials."""

import autoprune
from autoprune.demo.data import data
from autoprune.demo.network import model

outcome = autoprune.search(model(), **data(), budget="50%macs", plan=autoprune.Plan(trials=12, finalists=2))
print("met:" if outcome.met else "missed:", outcome.record.verdict)
print(outcome.folder / "report.html")
