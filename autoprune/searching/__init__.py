"""The search: what to try, within the budget; and the record of what was tried. No torch."""
