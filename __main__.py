"""`python -m dropformer` is the `prune` command, so that `accelerate launch -m dropformer analyze ...` works."""

from dropformer.cli import main

if __name__ == "__main__":
    main()
