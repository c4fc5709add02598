"""Scores against plain formulas, and the invariances that they are chosen for."""

import torch

from stages.functional import importance as score

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH = 6, 2, 4, 16, 150  # WIDTH: more than two blocks of rows, the last in part


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention() -> tuple[torch.Tensor, ...]:
    shapes = [(HEADS * HEAD_DIM, HIDDEN), (KV_HEADS * HEAD_DIM, HIDDEN), (KV_HEADS * HEAD_DIM, HIDDEN), (HIDDEN, HEADS * HEAD_DIM)]
    return tuple(random(*shape, seed=i) for i, shape in enumerate(shapes))


def test_blockwise_norms_equal_the_plain_ones() -> None:
    for weight in (random(WIDTH, 70).bfloat16(), random(3, WIDTH), random(64, 5).half()):
        torch.testing.assert_close(score.row_norms(weight), weight.double().norm(dim=1).float())
        torch.testing.assert_close(score.column_norms(weight), weight.double().norm(dim=0).float())


def test_neuron_magnitude_ignores_a_rescaling_that_the_function_does_not_see() -> None:
    gate, up, down = random(WIDTH, HIDDEN), random(WIDTH, HIDDEN, seed=1), random(HIDDEN, WIDTH, seed=2)
    plain = score.neuron_magnitude(gate, up, down)
    torch.testing.assert_close(plain, gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0))
    factors = 0.1 + 10 * torch.rand(WIDTH, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(score.neuron_magnitude(gate, up * factors[:, None], down / factors), plain)


def test_head_magnitude_is_the_product_over_what_a_head_uses() -> None:
    query, key, value, output = attention()
    found = score.head_magnitude(query, key, value, output, HEADS, KV_HEADS, qk_norm=False)
    for head in range(HEADS):
        own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        group = slice(head // 3 * HEAD_DIM, (head // 3 + 1) * HEAD_DIM)
        expected = query[own].norm() * key[group].norm() * value[group].norm() * output[:, own].norm()
        torch.testing.assert_close(found[head], expected)


def test_normalised_queries_and_keys_do_not_count() -> None:
    query, key, value, output = attention()
    found = score.head_magnitude(query, key, value, output, HEADS, KV_HEADS, qk_norm=True)
    assert torch.equal(found, score.head_magnitude(query * 3, key * 7, value, output, HEADS, KV_HEADS, qk_norm=True))
    assert not torch.equal(found, score.head_magnitude(query, key, value * 2, output, HEADS, KV_HEADS, qk_norm=True))


def test_activation_sums_are_over_tokens() -> None:
    x = random(2, 5, HEADS * HEAD_DIM)
    torch.testing.assert_close(score.neuron_activation(x), x.double().abs().sum((0, 1)), check_dtype=False)
    by_head = x.view(10, HEADS, HEAD_DIM).double().norm(dim=-1).sum(0)
    torch.testing.assert_close(score.head_activation(x, HEAD_DIM), by_head, rtol=1e-6, atol=0)


def test_block_influence_is_zero_along_a_direction_and_two_against_it() -> None:
    x = random(2, 3, HIDDEN)
    assert abs(score.block_influence(x, 5 * x)) < 1e-5
    assert abs(score.block_influence(x, -x) - 2 * 6) < 1e-5


def test_of_equal_scores_the_lower_index_stays() -> None:
    assert score.highest(torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]
    assert score.highest(torch.ones(1000), 10).tolist() == list(range(10))


def test_whole_groups_stay_by_the_sum_of_their_heads() -> None:
    scores = torch.tensor([9.0, 0.0, 0.0, 4.0, 4.0, 4.0])
    queries, groups = score.kept_groups(scores, num_kv_heads=2, count=1)
    assert (queries.tolist(), groups.tolist()) == ([3, 4, 5], [1])


def test_query_heads_leave_every_group_evenly() -> None:
    scores = torch.tensor([9.0, 0.0, 1.0, 40.0, 41.0, 42.0])
    assert score.kept_queries(scores, num_kv_heads=2, count=4).tolist() == [0, 2, 4, 5]
    assert score.rows_of_heads(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
