import torch

from dropformer.eval.tasks.prefix_cache import PrefixCache, longest_stem


def test_padding_moves_behind_the_stem_and_the_rest_stays_last():
    stem = PrefixCache(torch.tensor([5, 6]), None)
    ids = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 8, 9], [0, 5, 6, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    moved, visible = stem.under(ids, mask)
    assert moved.tolist() == [[5, 6, 0, 0, 7], [5, 6, 7, 8, 9], [5, 6, 0, 8, 9]]
    assert visible.tolist() == [[1, 1, 0, 0, 1], [1, 1, 1, 1, 1], [1, 1, 0, 1, 1]]


def test_a_prompt_without_the_stem_or_with_nothing_behind_it_is_left_alone():
    stem = PrefixCache(torch.tensor([5, 6]), None)
    ones = torch.ones(1, 3, dtype=torch.long)
    assert stem.under(torch.tensor([[5, 7, 8]]), ones) is None
    assert stem.under(torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]])) is None


def test_the_stem_leaves_a_token_of_the_shortest_prompt():
    assert longest_stem([[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 5]]) == 2
    assert longest_stem([[1, 2, 3], [1, 9]]) == 1
