"""Plans whose survivors pair up as (attention, MLP) again: the pruned model is a stock, shorter one in any engine.

A stack's branches are a sequence A0 M0 A1 M1 ...  What is left of it alternates exactly when the dropped branches
fall into pairs of neighbours: a whole block (A_i, M_i), or an MLP with the next block's attention (M_i, A_i+1).  The
best set of pairs is found exactly, by dynamic programming over the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import map_blocks
from dropformer.prune.choosing import choose
from dropformer.prune.errors import PlanError
from dropformer.prune.outline import Outline
from dropformer.prune.spec import parse_spec

WAY_OUT = "write joint:N with an even N (N/2 pairs of attention and MLP), or block:N, which packs as it is"


def choose_packable(
    outline: Outline, spec: str, similarity: Mapping[Layer, float], keep: Sequence[int] = ()
) -> tuple[list[Layer], float]:
    """As many layers as a `joint` spec drops, in pairs that pack, most similar in sum; and what that costs.

    The cost is the mean similarity of the layers that the spec alone would drop, less that of these: at least 0.
    Raises PlanError for a spec or a model that cannot pack.
    """
    selectors = parse_spec(spec)
    if len(selectors) != 1 or selectors[0].kind != "joint":
        raise PlanError(f"`{spec}` does not say how many pairs go; {WAY_OUT}")
    stack = outline.stack(selectors[0].stack)
    free = choose(outline, spec, similarity, keep)
    if len(free) % 2:
        raise PlanError(f"`{spec}` drops {len(free)} layers, and pairs make an even number; {WAY_OUT}")
    kept = {index % stack.blocks for index in keep}
    order = [Layer(kind, i, stack.name) for i in range(stack.blocks) for kind in ("attn", "mlp")]
    worth = [None if layer.index in kept else similarity.get(layer) for layer in order]
    pairs = best_pairs(worth, len(free) // 2)
    chosen = [order[k] for pair in pairs or () for k in (pair, pair + 1)]
    if not pairs or not map_blocks(outline, chosen).packed:
        raise PlanError(
            f"no {len(free) // 2} pairs of {outline.stacks[0].path} pack (its blocks are parallel, differ, lack a "
            "branch or are protected by --keep); leave out --packable"
        )
    cost = sum(similarity[layer] for layer in free) - sum(similarity[layer] for layer in chosen)
    return sorted(chosen, key=lambda layer: (-similarity[layer], -layer.index)), cost / len(free)


def best_pairs(worth: Sequence[float | None], count: int) -> list[int] | None:
    """Where `count` disjoint pairs of neighbours begin whose worth is largest in sum; None if there are not so many.

    None is what must stay.  Ties go to the later pair.  Time: len(worth) x count.
    """
    none = float("-inf")
    best = [[0.0, *[none] * count] for _ in range(len(worth) + 1)]  # best[i][k]: k pairs among the first i
    taken = [[False] * (count + 1) for _ in range(len(worth) + 1)]
    for i in range(1, len(worth) + 1):
        for k in range(1, count + 1):
            best[i][k] = best[i - 1][k]
            one, two = (worth[i - 2], worth[i - 1]) if i > 1 else (None, None)
            if one is not None and two is not None and best[i - 2][k - 1] > none:
                value = best[i - 2][k - 1] + one + two
                if value >= best[i][k]:
                    best[i][k], taken[i][k] = value, True
    if best[-1][count] == none:
        return None
    found, i, k = [], len(worth), count
    while k:
        if taken[i][k]:
            found.append(i - 2)
            i, k = i - 2, k - 1
        else:
            i -= 1
    return found[::-1]
