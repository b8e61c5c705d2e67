"""The model side: which units it has, how they are coupled, and how a choice becomes a really cut model."""
