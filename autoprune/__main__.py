"""`python -m autoprune` is the same as `autoprune`."""

from autoprune.cli import main

if __name__ == "__main__":
    main()
