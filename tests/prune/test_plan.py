"""The drop spec, and which layers it takes."""

import pytest

from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.choosing import choose, choose_forms
from dropformer.prune.errors import DropformerError, PlanError
from dropformer.prune.outline import BranchOutline, Outline, StackOutline
from dropformer.prune.plan import Plan, make_plan
from dropformer.prune.spec import check_stacks, parse_keep, parse_spec


def outline(blocks: int = 6) -> Outline:
    every = list(range(blocks))
    attn = BranchOutline(kind="attn", blocks=every, modules={"self_attn": ["zeros", None]}, parameters=10, kv=4)
    mlp = BranchOutline(kind="mlp", blocks=every, modules={"mlp": "zeros"}, parameters=30)
    return Outline(stacks=[StackOutline(path="model.layers", blocks=blocks, branches=[attn, mlp])], parameters=1000)


def scored(**values: list[float]) -> dict[Layer, float]:
    return {Layer(kind, i): v for kind, numbers in values.items() for i, v in enumerate(numbers)}


ATTN = [0.1, 0.9, 0.5, 0.9, 0.2, 0.3]
MLP = [0.1, 0.2, 0.95, 0.4, 0.3, 0.2]
SCORES = scored(attn=ATTN, mlp=MLP, block=[0.1, 0.2, 0.3, 0.8, 0.7, 0.1])


def names(spec: str, keep: tuple[int, ...] = (), scores: dict[Layer, float] | None = SCORES) -> list[str]:
    return [str(layer) for layer in choose(outline(), spec, scores, keep)]


def test_the_most_similar_layers_go_first():
    assert names("mlp:2") == ["mlp:2", "mlp:3"]


def test_ties_drop_the_deeper_layer():
    assert names("attn:1") == ["attn:3"]
    assert names("attn:2") == ["attn:3", "attn:1"]


def test_joint_ranks_attention_and_mlp_together():
    assert names("joint:3") == ["mlp:2", "attn:3", "attn:1"]


def test_a_percentage_rounds_down():
    assert names("attn:49%") == names("attn:2")


def test_explicit_indices_need_no_scores_and_negative_ones_count_from_the_end():
    assert names("attn=1,-1,mlp=0", scores=None) == ["attn:1", "attn:5", "mlp:0"]


def test_kept_blocks_are_not_dropped():
    assert names("attn:2", keep=(3, -1)) == ["attn:1", "attn:2"]


def test_blocks_are_chosen_first_and_their_layers_are_not_dropped_twice():
    assert names("attn:1,block:1") == ["block:3", "attn:1"]


def test_a_published_list_is_taken_in_its_order():
    chosen, _ = choose_forms(outline(), "published:attn:2", None, (), lambda kind, count: [4, 1, 0][:count])
    assert [str(layer) for layer in chosen] == ["attn:4", "attn:1"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("attn", "cannot be read"),
        ("attn:", "cannot be read"),
        ("attn:0", "drops nothing"),
        ("attn:101%", "more than all"),
        ("heads:3", "cannot be read"),
        ("published:linear:4", "published list"),
        ("linear:2@256", "only windows and agents"),
        ("window:3@+fold", "cannot be read"),
        ("attn:2;mlp:1", "cannot be read"),
        ("", "cannot be read"),
        ("joint=1", "joint takes a count"),
        ("published:attn:10%", "takes a count"),
        ("attn:7", "the model has 6"),
        ("attn:6", "every attention layer"),
        ("block:6", "every attention layer"),
        ("attn=6", "names attention layer 6"),
        ("attn=1,1", "twice"),
        ("attn:1%", "rounds down to no layer"),
        ("encoder.attn:1", "none named `encoder`"),
        ("published:attn:1", "needs a recipe"),
    ],
)
def test_a_wrong_spec_gets_one_line_that_says_what_is_wrong(spec: str, said: str):
    with pytest.raises(PlanError, match=said) as error:
        names(spec)
    assert "\n" not in str(error.value)


def test_protected_layers_cannot_be_named():
    with pytest.raises(PlanError, match="protected"):
        names("attn=3", keep=(3,))


def test_keep_outside_the_model_is_an_error():
    with pytest.raises(PlanError, match="0 to 5"):
        names("attn:1", keep=(6,))
    with pytest.raises(PlanError, match="--keep"):
        parse_keep("0,x")


def test_missing_or_nan_scores_are_an_error():
    with pytest.raises(PlanError, match="attn:0"):
        names("attn:1", scores={**SCORES, Layer("attn", 0): float("nan")})
    with pytest.raises(PlanError, match="needs scores"):
        names("attn:1", scores=None)


def test_selectors_print_as_they_were_written():
    for spec in ("attn:8", "mlp:25%", "attn=1,-1", "published:attn:8", "encoder.attn:3", "joint:12"):
        assert str(parse_spec(spec)[0]) == spec


def test_a_plan_states_its_savings_and_survives_its_file(tmp_path):
    layers = choose(outline(), "attn:1,block:1", SCORES)
    plan = make_plan(outline(), ModelRef(name="m"), "attn:1,block:1", layers, SCORES)
    assert plan.savings.parameters_after == 1000 - 10 - 40
    assert (plan.savings.kv, plan.savings.kv_after) == (24, 16)
    assert plan.dropped() == {"attention": [1], "mlp": [], "blocks": [3]}
    assert Plan.read(plan.write(tmp_path / "plan.json")) == plan


@pytest.mark.parametrize("text", ["{", '{"artifact": "scores"}', "[]", '{"artifact": "plan", "extra": 1}'])
def test_a_file_that_is_no_plan_gets_one_line(tmp_path, text: str):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(DropformerError) as error:
        Plan.read(tmp_path / "p.json")
    assert "\n" not in str(error.value)


OPT = ["model.decoder.embed_tokens.weight", "model.decoder.layers.0.fc1.weight", "model.decoder.layers.1.fc1.weight"]
BART = ["model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight", "model.shared.weight"]
FUNNEL = ["funnel.encoder.blocks.0.1.ffn.weight", "funnel.encoder.blocks.1.0.ffn.weight"]


@pytest.mark.parametrize(
    "spec, tensors",
    [("decoder.attn:1", OPT), ("layers.attn:1", OPT), ("vision.attn:1", BART), ("encoder_blocks_2.attn=1", FUNNEL)],
)
def test_a_stack_that_no_tensor_can_belong_to_is_refused_by_the_files_alone(spec, tensors):
    with pytest.raises(PlanError, match="no stack named"):
        check_stacks(spec, tensors, "m")


@pytest.mark.parametrize(
    "spec, tensors", [("attn:1", OPT), ("decoder.attn:1", BART), ("encoder_blocks_0.attn=1", FUNNEL)]
)
def test_a_stack_of_the_files_may_be_named(spec, tensors):
    check_stacks(spec, tensors, "m")
