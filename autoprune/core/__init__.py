"""The values of autoprune: what is decided, what it costs, what came out. Standard library and pydantic only."""
