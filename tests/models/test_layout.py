import torch
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import sequences

from rlhf_lightning.models.layout import padded_layout, select
from rlhf_lightning.types import Sequences

EXAMPLE = sequences([([5, 6, 7], [8, 9, 2]), ([4], [3, 9, 6, 5, 8, 7, 2])])


def test_a_padded_layout_by_hand() -> None:
    layout = padded_layout(EXAMPLE)

    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 9, 2, 0, 0], [4, 3, 9, 6, 5, 8, 7, 2]]
    assert layout.completion_mask.tolist() == [[True] * 3 + [False] * 4, [True] * 7]
    assert layout.targets.tolist() == [8, 9, 2, 3, 9, 6, 5, 8, 7, 2]
    # Row 0: the last prompt position, 2, predicts the first completion token; row 1 starts at flat position 8.
    assert layout.predictors.tolist() == [2, 3, 4, 8, 9, 10, 11, 12, 13, 14]
    assert layout.cells.tolist() == [0, 1, 2, 7, 8, 9, 10, 11, 12, 13]
    assert layout.last.tolist() == [5, 15]


def test_scatter_places_values_and_zero_elsewhere() -> None:
    grid = padded_layout(EXAMPLE).scatter(torch.arange(1.0, 11.0))
    assert grid.tolist() == [[1, 2, 3, 0, 0, 0, 0], [4, 5, 6, 7, 8, 9, 10]]


def test_scatter_is_differentiable() -> None:
    values = torch.arange(1.0, 11.0, requires_grad=True)
    weights = torch.arange(14.0).view(2, 7)
    (padded_layout(EXAMPLE).scatter(values) * weights).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 2, 7, 8, 9, 10, 11, 12, 13]


def test_unsupervised_tokens_are_input_but_not_predicted() -> None:
    batch = sequences([([5, 6], [7, 8, 9, 2])], supervised=[[True, False, False, True]])
    layout = padded_layout(batch)
    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 9, 2]]
    assert layout.targets.tolist() == [7, 2]
    assert layout.predictors.tolist() == [1, 4]
    assert layout.completion_mask.tolist() == [[True, False, False, True]]


def test_the_first_token_after_an_empty_prompt_is_not_predicted() -> None:
    layout = padded_layout(sequences([([], [7, 8, 2]), ([5], [6])]))
    assert layout.completion_mask.tolist() == [[False, True, True], [True, False, False]]
    assert layout.targets.tolist() == [8, 2, 6]
    assert layout.predictors.tolist() == [0, 1, 3]
    assert layout.last.tolist() == [2, 4]


def test_an_empty_completion_is_refused() -> None:
    with refused("empty-completion", "a completion is empty; drop such rows"):
        padded_layout(sequences([([5], [6]), ([5, 6], [])]))


def test_completions_use_the_prompt_of_their_parent_index() -> None:
    shared = Sequences(
        prompts=(torch.tensor([5, 6]), torch.tensor([7])),
        completions=(torch.tensor([8]), torch.tensor([9]), torch.tensor([10])),
        parents=(1, 0, 1),
        supervised=(torch.ones(1, dtype=torch.bool),) * 3,
    )
    assert padded_layout(shared).input_ids.tolist() == [[7, 8, 0], [5, 6, 9], [7, 10, 0]]
    assert shared.lengths == [2, 3, 2]


def test_end_state_adds_the_position_of_the_last_token() -> None:
    layout = padded_layout(EXAMPLE).with_end_state()
    assert layout.completion_mask.tolist() == [[True] * 4 + [False] * 4, [True] * 8]
    grid = layout.scatter(layout.predictors.float())
    assert grid.tolist() == [[2, 3, 4, 5, 0, 0, 0, 0], [8, 9, 10, 11, 12, 13, 14, 15]]


def test_end_state_does_not_depend_on_supervision() -> None:
    layout = padded_layout(
        sequences([([5, 6], [7, 8, 9, 2]), ([], [4, 9])], supervised=[[True, False, False, True], [True, True]])
    ).with_end_state()
    assert layout.completion_mask.tolist() == [[True, False, False, True, True], [False, True, True, False, False]]
    assert layout.scatter(layout.predictors.float()).tolist() == [[1, 0, 0, 4, 5], [0, 6, 7, 0, 0]]


ids = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@given(st.lists(st.tuples(st.lists(st.integers(1, 50), max_size=5), ids), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_every_supervised_token_is_predicted_by_its_predecessor(rows: list[tuple[list[int], list[int]]]) -> None:
    layout = padded_layout(sequences(rows))
    grid = layout.scatter(layout.targets)
    before = layout.scatter(layout.input_ids.flatten()[layout.predictors])
    for row, (prompt, completion) in enumerate(rows):
        start = 0 if prompt else 1
        whole = prompt + completion
        assert grid[row, start : len(completion)].tolist() == completion[start:]
        assert before[row, start : len(completion)].tolist() == whole[len(prompt) + start - 1 : -1]
        assert grid[row, len(completion) :].sum() == 0
        assert int(layout.input_ids.flatten()[layout.last[row]]) == completion[-1]


def test_select_drops_unused_prompts() -> None:
    pairs = Sequences(
        prompts=(torch.tensor([1]), torch.tensor([2, 2]), torch.tensor([3, 3, 3])),
        completions=tuple(torch.tensor([token]) for token in (11, 12, 13, 21, 22, 23)),
        parents=(0, 1, 2, 0, 1, 2),
        supervised=tuple(torch.tensor([flag]) for flag in (True, False, True, True, True, False)),
    )
    chosen = select(pairs, [5, 0, 2])
    assert [prompt.tolist() for prompt in chosen.prompts] == [[1], [3, 3, 3]]
    assert [completion.tolist() for completion in chosen.completions] == [[23], [11], [13]]
    assert chosen.parents == (1, 0, 1)
    assert [flags.tolist() for flags in chosen.supervised] == [[False], [True], [True]]
