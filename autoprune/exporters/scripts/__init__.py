"""Scripts that are written beside exports and pruned models. Each is real Python that needs nothing of autoprune."""
