"""The subcommands of `prune` that load no model: engines, push, recipes."""

from __future__ import annotations

from dropformer import cli_options as options


def engines(folder: options.Loadable, full: options.Full = False, as_json: options.Json = False) -> None:
    """Which engines load a checkpoint, by which command, and what to do for the others."""
    from dropformer import console
    from dropformer.prune.engines.registry import engines as answers

    console.show_engines(answers(folder), as_json, full)


def push(
    folder: options.Pushed, repo: options.Repository, private: options.Private = False, quiet: options.Quiet = False
) -> None:
    """Publish a pruned checkpoint with its model card on the Hugging Face Hub."""
    from dropformer import console
    from dropformer.recipes.push import push as upload

    console.show(None, f"pushed to {upload(folder, repo, private, console.Terminal(quiet).say)}")


def recipes(as_json: options.Json = False) -> None:
    """List the models that dropformer knows by name."""
    from dropformer import console
    from dropformer.recipes import recipes as known

    console.show_recipes(known(), as_json)
