"""A pruned or quantised model as one small file: zeros as bitmasks, everything entropy coded, read back bit for bit."""
