import pytest
import torch

from rlhf_lightning.sampling import drawing
from rlhf_lightning.sampling.drawing import philox, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_known_answers(counter: str, key: str, expected: str) -> None:
    words = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    first, second = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox(words, (first, second))] == expected.split()


def test_a_random_number_depends_only_on_its_own_address() -> None:
    episodes, positions = torch.arange(40), torch.arange(40) % 7
    together = uniform(3, episodes, positions)
    separate = torch.cat([uniform(3, episodes[i : i + 1], positions[i : i + 1]) for i in range(40)])
    assert torch.equal(together, separate)
    order = torch.randperm(40)
    assert torch.equal(uniform(3, episodes[order], positions[order]), together[order])


def test_a_random_number_depends_on_every_part_of_its_address() -> None:
    base, one = torch.tensor([5]), torch.tensor([1])
    numbers = [
        uniform(0, base, base),
        uniform(1, base, base),
        uniform(2**32, base, base),
        uniform(0, base + one, base),
        uniform(0, base + 2**32, base),
        uniform(0, -one - base, base),
        uniform(0, base, base + one),
    ]
    assert len({float(number) for number in numbers}) == len(numbers)


def test_numbers_are_uniform_and_uncorrelated() -> None:
    episodes = torch.arange(400).repeat_interleave(50)
    positions = torch.arange(50).repeat(400)
    grid = uniform(11, episodes, positions).view(400, 50)
    counts = torch.histc(grid, bins=20, min=0, max=1)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 43.8  # 0.999 quantile at 19 degrees of freedom
    for first, second in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        correlation = float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])
        assert abs(correlation) < 0.025  # 3.5 standard errors


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_extreme_words_map_into_the_open_unit_interval(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    monkeypatch.setattr(drawing, "philox", lambda *_: (torch.tensor([word]),) * 4)
    assert 0.0 < float(uniform(0, torch.tensor([0]), torch.tensor([0]))) < 1.0
