"""A search from Python, on the embedded demo: half of the multiply-adds, twenty trials."""

from autoprune.api import search
from autoprune.demo.data import data
from autoprune.demo.network import model
from autoprune.pursue import Plan

outcome = search(model(), **data(), budget="50%macs", plan=Plan(trials=20))
print(outcome.record.verdict)
print(outcome.folder / "report.html")
