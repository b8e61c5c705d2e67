"""What a choice costs: counted, and timed on the target. Interleaved clock, latency table, cost model."""
