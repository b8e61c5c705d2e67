"""Models that do not come from a user's function: libraries' models by name, Hugging Face folders, ONNX and .pt2 files.

These files know torch and the libraries they read with, and nothing else of autoprune: they are copied beside
`rebuild.py`, which makes the unpruned model with them.
"""
