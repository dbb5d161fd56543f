"""The subcommands of `prune` that load no weights: engines, estimate, push, recipes."""

from __future__ import annotations

from dropformer import cli_options as options
from dropformer.prune.errors import EvaluationError


def engines(folder: options.Loadable, full: options.Full = False, as_json: options.Json = False) -> None:
    """Which engines load a checkpoint, by which command, and what to do for the others."""
    from dropformer import console
    from dropformer.prune.engines.registry import engines as answers

    console.show_engines(answers(folder), as_json, full)


def estimate(
    model: options.ConfigOf,
    drop: options.NeededDrop,
    hardware: options.Hardware = "a6000",
    context: options.TotalTokens = None,
    new_tokens: options.AnswerTokens = None,
    batch: options.Batch = 1,
    draft: options.DraftEstimate = False,
    as_json: options.Json = False,
) -> None:
    """Predict from the config alone what a drop saves: bytes, FLOPs, roofline times, speed-up."""
    from dropformer.prune.spec import parse_spec

    parse_spec(drop)
    if draft and new_tokens:
        raise EvaluationError("--new-tokens has no effect beside --draft, which counts single steps; leave it out")
    from dropformer import console
    from dropformer.eval.cost import estimate as costs
    from dropformer.eval.cost.encoder import check_encoder
    from dropformer.eval.cost.hardware import hardware as named_hardware
    from dropformer.eval.cost.roofline import Workload
    from dropformer.recipes.recipe import recipe_for

    device, recipe, cost = named_hardware(hardware), recipe_for(model), costs.cost_of_name(model)
    lists = recipe.published if recipe else None
    if cost.tokens:
        check_encoder(model, draft, new_tokens)
        encoder = costs.forward_estimate(cost, drop, device, context, batch)
        console.show(encoder.to_json() if as_json else None, *encoder.lines())
        return
    workload = Workload(context or 4096, batch, new_tokens)
    if draft:
        from dropformer.eval.draft.estimate import draft_estimate

        pays = draft_estimate(cost, drop, workload, device)
        console.show(pays.to_json() if as_json else None, *pays.lines())
        return
    found = costs.estimate(cost, drop, device, workload, lists)
    console.show_estimate(found, costs.published_speedup(recipe, drop), as_json)


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
