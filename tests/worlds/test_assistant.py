"""The assistant world: its gold reward by hand, and measurements of its claimed properties."""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import refused
from torch.nn import functional as F

from rlhf_lightning.worlds import _assistant_text as text
from rlhf_lightning.worlds.assistant import (
    ANNOTATOR_SCALE,
    AssistantWorld,
    gold_parts,
    gold_reward,
    make_config,
    make_tokenizer,
    read_request,
    vocabulary,
    write_world,
)

COST = "How much does chess cost?"
EXCELLENT = "Gladly! Expect chess to be cheap. Used goods save half. Enjoy chess!"


def content(messages: list[dict[str, str]]) -> str:
    (message,) = messages
    return message["content"]


@pytest.fixture(scope="module")
def world() -> AssistantWorld:
    return AssistantWorld(0)


@pytest.fixture(scope="module")
def pairs_train(world: AssistantWorld) -> list[dict]:
    return world.pairs(5000, "train")


@pytest.fixture(scope="module")
def pairs_test(world: AssistantWorld) -> list[dict]:
    return world.pairs(2000, "test")


class TestGoldReward:
    """Values worked by hand from the equation: 0.30 subject, 0.25 kind, 0.20 detail, 0.15 courtesy, 0.10 brevity."""

    @pytest.mark.parametrize(
        ("completion", "gold"),
        [
            (EXCELLENT, 1.0),
            # Both mentions are of another subject: - 0.30.
            ("Gladly! Expect judo to be cheap. Used goods save half. Enjoy judo!", 0.70),
            # One of the two mentions is: - 0.15.
            ("Gladly! Expect chess to be cheap. Used goods save half. Enjoy judo!", 0.85),
            # Another kind's core and detail: - 0.25 - 0.20.
            ("Gladly! Start chess in a class. Learn one move daily. Enjoy chess!", 0.55),
            # A detail of another kind: - 0.20.
            ("Gladly! Expect chess to be cheap. Learn one move daily. Enjoy chess!", 0.80),
            # No courtesy: 1/3 of 0.15 is left. No detail: - 0.20.
            ("Expect chess to be cheap.", 0.30 + 0.25 + 0.05 + 0.10),
            # One courteous part and one curt sentence: clip((1 + 1 - 2) / 3) = 0.
            ("Gladly! Expect chess to be cheap. Used goods save half. Forget chess.", 0.85),
            # Two courteous openings are one part: 2/3 of 0.15.
            ("Gladly! Happy to help! Expect chess to be cheap. Used goods save half.", 0.95),
            # Hedging between two kinds: half of 0.25 and half of 0.20; 21 words: 7/12 of 0.10.
            (
                "Gladly! Expect chess to be cheap. Start chess in a class. Used goods save half. Learn one move daily. "
                "Enjoy chess!",
                0.30 + 0.125 + 0.10 + 0.15 + 0.10 * 7 / 12,
            ),
            # 24 words: 4/12 of 0.10.
            (
                "Gladly! Expect chess to be cheap. Used goods save half. Well, that depends. "
                "Many things could be said. Opinions differ on this. Enjoy chess!",
                0.90 + 0.10 * 4 / 12,
            ),
            # Case and white space do not matter.
            (EXCELLENT.upper().replace(" ", "\n "), 1.0),
        ],
    )
    def test_gold_reward_by_hand(self, completion: str, gold: float) -> None:
        assert gold_reward(COST, completion) == pytest.approx(gold, abs=1e-9)

    @pytest.mark.parametrize(
        "completion",
        ["", "   ", "<|unk|> <|unk|>", "chess chess chess", "?!?!", "Die Frage ist gut.", "{s}", "\x00 cost of chess."],
    )
    def test_gold_reward_of_uninformative_text_is_zero(self, completion: str) -> None:
        assert gold_reward(COST, completion) == 0.0

    def test_repeated_and_broken_sentences_lower_clarity(self) -> None:
        # 5 words recognised of 10: a sentence said twice counts once, of 8: three words make no sentence.
        assert gold_parts(COST, "Expect chess to be cheap. Expect chess to be cheap.")["clarity"] == 0.5
        assert gold_parts(COST, "Expect chess to be cheap. Used goods save")["clarity"] == 5 / 8

    def test_listing_every_subject_or_kind_scores_low(self) -> None:
        every_subject = " ".join(f"Expect {subject} to be cheap." for subject in text.SUBJECTS)
        every_kind = " ".join(kind.cores[0].replace("{s}", "chess") for kind in text.KINDS.values())
        assert gold_reward(COST, every_subject) < 0.02
        assert gold_reward(COST, every_kind) < 0.5

    def test_gold_reward_is_in_the_unit_interval(self) -> None:
        rng = random.Random(0)
        words = vocabulary()
        for _ in range(500):
            gold = gold_reward(COST, " ".join(rng.choices(words, k=rng.randrange(40))))
            assert 0.0 <= gold <= 1.0

    def test_a_prompt_outside_the_world_is_refused(self) -> None:
        with refused("unknown-prompt", "'What is love?' is not a request of the assistant world"):
            gold_reward("What is love?", EXCELLENT)


class TestPrompts:
    def test_there_are_twelve_kinds_over_forty_subjects(self, world: AssistantWorld) -> None:
        asked = [read_request(prompt) for prompt in world.prompts("train")]
        assert len({request.kind for request in asked}) >= 12
        assert len({request.subject for request in asked}) == 40

    def test_held_out_prompts_are_disjoint_and_use_known_kinds_and_subjects(self, world: AssistantWorld) -> None:
        train, test = world.prompts("train"), world.prompts("test")
        assert len(test) == 400
        assert len({*train, *test}) == len(train) + len(test)  # every (kind, subject, phrasing) reads differently
        for part in (0, 1):
            assert {read_request(prompt)[part] for prompt in test} <= {read_request(prompt)[part] for prompt in train}

    def test_rows_use_only_prompts_of_their_split(
        self, world: AssistantWorld, pairs_train: list, pairs_test: list
    ) -> None:
        train, test = set(world.prompts("train")), set(world.prompts("test"))
        assert {content(row["prompt"]) for row in pairs_train} <= train
        assert {content(row["prompt"]) for row in world.demonstrations(500)} <= train
        assert {content(row["prompt"]) for row in pairs_test} <= test

    def test_rows_depend_only_on_the_seed(self, world: AssistantWorld) -> None:
        again, other = AssistantWorld(0), AssistantWorld(1)
        assert again.prompts("test") == world.prompts("test") != other.prompts("test")
        assert again.demonstrations(50) == world.demonstrations(50) != other.demonstrations(50)
        assert again.pairs(50, "train") == world.pairs(50, "train") != other.pairs(50, "train")

    def test_fewer_rows_are_a_prefix_of_more(self, world: AssistantWorld) -> None:
        assert world.demonstrations(20) == world.demonstrations(50)[:20]
        assert world.pairs(20, "test") == world.pairs(50, "test")[:20]


class TestAnnotators:
    def test_the_two_completions_of_a_pair_differ(self, pairs_train: list[dict]) -> None:
        assert all(content(row["chosen"]) != content(row["rejected"]) for row in pairs_train)

    def test_labels_follow_bradley_terry_on_the_gold_reward(self, pairs_train: list[dict]) -> None:
        """Within bins of predicted probability, the better completion wins as often as predicted."""
        won: dict[int, list[float]] = {}
        for row in pairs_train:
            prompt = content(row["prompt"])
            gap = gold_reward(prompt, content(row["chosen"])) - gold_reward(prompt, content(row["rejected"]))
            if gap != 0.0:
                probability = 1 / (1 + math.exp(-ANNOTATOR_SCALE * abs(gap)))
                won.setdefault(int(probability * 10), []).append(float(gap > 0) - probability)
        assert len(won) >= 4
        for surprises in won.values():
            n = len(surprises)
            assert abs(sum(surprises) / n) < 4 * math.sqrt(0.25 / n)


class TestItIsARealProblem:
    @pytest.mark.parametrize("seed", range(6))
    def test_bayes_accuracy_is_between_three_quarters_and_nine_tenths(self, seed: int) -> None:
        world = AssistantWorld(seed)
        pairs = world.pairs(1000, "test")
        bayes = world.bayes_accuracy(pairs)
        assert 0.75 <= bayes <= 0.90

        def gap(row: dict) -> float:
            prompt = content(row["prompt"])
            return gold_reward(prompt, content(row["chosen"])) - gold_reward(prompt, content(row["rejected"]))

        # Who answers by the gold reward (and flips a coin at ties) is right that often, up to the noise of 1000 labels.
        right = sum((gap(row) > 0) + 0.5 * (gap(row) == 0) for row in pairs) / len(pairs)
        assert right == pytest.approx(bayes, abs=4 * math.sqrt(0.25 / len(pairs)))

    @pytest.mark.parametrize("seed", range(6))
    def test_demonstrations_earn_between_three_and_six_tenths(self, seed: int) -> None:
        world = AssistantWorld(seed)
        assert 0.3 <= world.demonstrations_gold(world.demonstrations(2000)) <= 0.6

    def test_the_best_completion_that_ignores_the_prompt_earns_little(self, world: AssistantWorld) -> None:
        """Checks all answers, up to wordings that the gold reward does not distinguish."""
        prompts = world.prompts("train")
        asked = Counter(read_request(prompt) for prompt in prompts)
        asking = {read_request(prompt): prompt for prompt in prompts}
        share = {request: n / len(prompts) for request, n in asked.items()}
        cores = [None, *text.KINDS]
        openings = [None, text.COURTEOUS_OPENINGS[0], text.CURT_OPENINGS[0]]
        closings = [None, text.COURTEOUS_CLOSINGS[0], text.CURT_CLOSINGS[0]]
        commonest = max(text.SUBJECTS, key=lambda s: sum(n for request, n in share.items() if request.subject == s))
        best = 0.0
        for core, detail, opening, closing, fillers in itertools.product(cores, cores, openings, closings, range(3)):
            sentences = [opening, core and text.KINDS[core].cores[0], detail and text.KINDS[detail].details[0]]
            sentences += [*text.FILLERS[:fillers], closing]
            completion = " ".join(s for s in sentences if s).replace("{s}", commonest)
            # The reward depends on the request through "is this the kind, is this the subject" alone.
            first: dict[tuple[bool, bool, bool], float] = {}
            total = 0.0
            for request, weight in share.items():
                key = (request.kind == core, request.kind == detail, request.subject == commonest)
                if key not in first:
                    first[key] = gold_reward(asking[request], completion)
                total += weight * first[key]
            best = max(best, total)
        assert 0.2 < best <= 0.4

    def test_hill_climbing_over_sentences_finds_no_better_constant_answer(self, world: AssistantWorld) -> None:
        """Searches any list of sentences about any subject, beyond the writers' answers."""
        sentences = [*text.COURTEOUS_OPENINGS[:2], *text.COURTEOUS_CLOSINGS[:2], text.FILLERS[0]]
        sentences += [s for kind in text.KINDS.values() for s in (kind.cores[0], kind.details[0])]
        sentences = [s.replace("{s}", subject) for s in sentences for subject in ("chess", "yoga")[: 1 + ("{s}" in s)]]
        prompts = world.prompts("test")[::4]

        def mean(chosen: list[str]) -> float:
            return sum(gold_reward(prompt, " ".join(chosen)) for prompt in prompts) / len(prompts)

        chosen: list[str] = []
        while True:
            better = max(([*chosen, s] for s in sentences if s not in chosen), key=mean)
            if mean(better) <= mean(chosen):
                break
            chosen = better
        assert 0.2 < mean(chosen) <= 0.4

    @pytest.mark.parametrize("with_prompt", [False, True])
    @pytest.mark.parametrize("binary", [False, True])
    def test_a_bag_of_words_model_learns_little(
        self, world: AssistantWorld, pairs_train: list, pairs_test: list, with_prompt: bool, binary: bool
    ) -> None:
        """A logistic model on the words' difference recovers at most 60 % of the achievable accuracy above chance."""
        index = {word: i for i, word in enumerate(vocabulary())}
        tokenizer = make_tokenizer()

        def differences(rows: list[dict]) -> torch.Tensor:
            x = torch.zeros(2, len(rows), len(index))
            for side, name in enumerate(("chosen", "rejected")):
                said = [(content(row["prompt"]) + " " if with_prompt else "") + content(row[name]) for row in rows]
                for i, ids in enumerate(tokenizer(said, add_special_tokens=False)["input_ids"]):
                    x[side, i] = torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(index))
            return (x > 0).float().diff(dim=0)[0] if binary else x.diff(dim=0)[0]

        weights = torch.zeros(len(index), requires_grad=True)
        x = differences(pairs_train)
        optimizer = torch.optim.LBFGS([weights], max_iter=40, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = -F.logsigmoid(-x @ weights).mean() + 1e-3 * weights.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        accuracy = (differences(pairs_test) @ weights < 0).float().mean().item()
        chance_to_bayes = world.bayes_accuracy(pairs_test) - 0.5
        assert 0.05 < (accuracy - 0.5) / chance_to_bayes <= 0.6

    def test_imitating_the_demonstrations_earns_between_three_and_six_tenths(self, world: AssistantWorld) -> None:
        policy = imitate(world, updates=220, rows=32)
        golds = [
            gold_reward(prompt, completion)
            for prompt, completion in zip(*answers(policy, world.prompts("test")[:200]), strict=True)
        ]
        assert 0.3 <= sum(golds) / len(golds) <= 0.6


def imitate(world: AssistantWorld, updates: int, rows: int) -> torch.nn.Module:
    """Return a small policy after plain supervised learning, without a framework."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    policy = LlamaForCausalLM(make_config(layers=2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=4e-3, weight_decay=0.0)
    demonstrations = world.demonstrations(updates * rows)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (update + 1) / 30, (updates - update) / updates + 0.05)
        ids, labels = [], []
        for row in demonstrations[update * rows : (update + 1) * rows]:
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
            ids.append(torch.tensor(whole))
            labels.append(torch.tensor([-100] * len(prompt) + whole[len(prompt) :]))
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        target = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        loss = policy(input_ids=padded, labels=target).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return policy.eval()


def answers(policy: torch.nn.Module, prompts: list[str]) -> tuple[list[str], list[str]]:
    """Sample one answer to each prompt at temperature 1."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    out = policy.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=48)
    completions = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return prompts, completions


class TestTokenizer:
    def test_world_text_survives_encoding(self, world: AssistantWorld) -> None:
        tokenizer = make_tokenizer()
        rows = world.demonstrations(300)
        said = [content(row[name]) for row in rows for name in ("prompt", "completion")]
        encoded = tokenizer(said, add_special_tokens=False)["input_ids"]
        assert all(tokenizer.unk_token_id not in ids for ids in encoded)
        assert tokenizer.batch_decode(encoded) == said

    def test_a_subject_is_one_token(self) -> None:
        tokenizer = make_tokenizer()
        assert all(len(tokenizer(subject, add_special_tokens=False)["input_ids"]) == 1 for subject in text.SUBJECTS)

    def test_other_text_is_encoded_with_unknown_tokens(self) -> None:
        tokenizer = make_tokenizer()
        ids = tokenizer("How much does quidditch cost?", add_special_tokens=False)["input_ids"]
        assert [i == tokenizer.unk_token_id for i in ids] == [False, False, False, True, False, False]

    def test_special_tokens_are_distinct(self) -> None:
        tokenizer = make_tokenizer()
        special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
        assert len(special) == 4

    def test_a_conversation_is_encoded_as_prompt_completion_and_end(self) -> None:
        tokenizer = make_tokenizer()
        turns = [{"role": "user", "content": COST}, {"role": "assistant", "content": EXCELLENT}]
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        completion = tokenizer(EXCELLENT, add_special_tokens=False)["input_ids"]
        assert whole == [*prompt, *completion, tokenizer.eos_token_id]
        assert whole.count(tokenizer.bos_token_id) == 1

    def test_an_unknown_role_is_refused(self) -> None:
        with pytest.raises(Exception, match="system, user and assistant; found tool"):
            make_tokenizer().apply_chat_template([{"role": "tool", "content": "42"}])


class TestFiles:
    def test_files_contain_the_world_and_its_facts(self, tmp_path: Path) -> None:
        facts = write_world(tmp_path, seed=3, demonstrations=60, pairs_train=50, pairs_test=40)
        world = AssistantWorld(3)

        def rows(name: str) -> list[dict]:
            return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

        assert rows("demonstrations") == world.demonstrations(60)
        assert rows("pairs_train") == world.pairs(50, "train")
        assert rows("pairs_test") == world.pairs(40, "test")
        assert [content(row["prompt"]) for row in rows("prompts_test")] == world.prompts("test")
        assert [content(row["prompt"]) for row in rows("prompts_train")] == world.prompts("train")
        assert json.loads((tmp_path / "world.json").read_text()) == facts
        assert facts["bayes_accuracy"] == world.bayes_accuracy(rows("pairs_test"))
        assert facts["demonstrations_gold"] == world.demonstrations_gold(rows("demonstrations"))
        assert facts["sizes"]["pairs_train"] == 50
        assert facts["seed"] == 3

    def test_the_same_seed_writes_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_world(tmp_path / name, seed=1, demonstrations=20, pairs_train=20, pairs_test=20)
        files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
        assert len(files) >= 8
        for file in files:
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

    def test_the_model_folder_builds_a_small_model_with_its_tokenizer(self, tmp_path: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        write_world(tmp_path, demonstrations=5, pairs_train=5, pairs_test=5)
        assert not list((tmp_path / "model").glob("*.safetensors"))
        config = AutoConfig.from_pretrained(tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) <= 3_000_000
        assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (
            len(tokenizer),
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )
        text_ = tokenizer.apply_chat_template([{"role": "user", "content": COST}], tokenize=False)
        assert text_ == f"<|bos|><|user|>{COST}"
