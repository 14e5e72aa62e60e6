"""PPO for RLHF on one page: sample, score, estimate advantages, update policy and critic, in plain PyTorch.

    python experiments/ppo_on_one_page.py --policy SFT_FOLDER --reward REWARD_FOLDER --prompts PROMPTS.jsonl

The script is meant for reading: one process, padded batches, no checkpoints. `rlhf fit --config recipe:ppo` computes
the same update.
"""

import argparse
import json
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_lightning.functional.logprobs import kl_k1, masked_mean, masked_whiten, token_logprobs
from rlhf_lightning.functional.policy_gradient import clipped_value_loss, generalized_advantages, token_rewards
from rlhf_lightning.functional.surrogates import clipped_surrogate_loss


class Settings(NamedTuple):
    kl_coef: float = 0.05  # beta: KL penalty coefficient, in score units per nat
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # GAE's lambda
    clip: float = 0.2  # ratio clip range, relative to the policy that sampled the rollout
    value_clip: float = 0.2
    value_coef: float = 0.1
    ppo_epochs: int = 4
    max_grad_norm: float = 1.0
    temperature: float = 1.0


class Episodes(NamedTuple):
    """Prompt and completion, right-padded. Masks and per-token values have shape (episodes, length - 1); column t
    belongs to token t + 1.
    """

    ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor  # True where token t + 1 was sampled by the policy, including the end token
    scores: Tensor  # s(x, y), one per episode


def logprobs_of(model: Any, episodes: Episodes, temperature: float) -> Tensor:
    """Return log pi(token t + 1 | tokens up to t)."""
    logits = model(input_ids=episodes.ids, attention_mask=episodes.attention_mask).logits[:, :-1]
    return token_logprobs(logits, episodes.ids[:, 1:], temperature)


def values_of(critic: Any, episodes: Episodes) -> Tensor:
    """Return V(tokens up to t), the critic's estimate of the remaining reward."""
    trunk = getattr(critic, critic.base_model_prefix)
    hidden = trunk(input_ids=episodes.ids, attention_mask=episodes.attention_mask).last_hidden_state
    values: Tensor = critic.score(hidden[:, :-1]).squeeze(-1)
    return values


def ppo_update(
    policy: Any, critic: Any, reference: Any, optimizer: Any, episodes: Episodes, s: Settings
) -> dict[str, float]:
    """Update policy and critic on one rollout with ``ppo_epochs`` full-batch steps."""
    mask = episodes.completion_mask
    with torch.no_grad():
        old_logprobs = logprobs_of(policy, episodes, s.temperature)
        old_values = values_of(critic, episodes)
        # r_t = -beta (log pi - log pi_ref) on every token, and the score on the last one.
        kl = kl_k1(old_logprobs, logprobs_of(reference, episodes, s.temperature))
        rewards = token_rewards(episodes.scores, kl, mask, s.kl_coef)
        # A_t = sum_k (gamma lam)^k delta_{t+k},  delta_t = r_t + gamma V_{t+1} - V_t;  R_t = A_t + V_t.
        advantages, returns = generalized_advantages(rewards, old_values, mask, s.gamma, s.lam)
        advantages = masked_whiten(advantages, mask)
    for _ in range(s.ppo_epochs):
        # L_policy = mean_t max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)),  ratio = pi / pi_old.
        ratio = (logprobs_of(policy, episodes, s.temperature) - old_logprobs).exp()
        policy_loss = masked_mean(clipped_surrogate_loss(ratio, advantages, s.clip), mask)
        # L_value = mean_t 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).
        values = values_of(critic, episodes)
        value_loss = masked_mean(clipped_value_loss(values, old_values, returns, s.value_clip), mask)
        (policy_loss + s.value_coef * value_loss).backward()
        torch.nn.utils.clip_grad_norm_([*policy.parameters(), *critic.parameters()], s.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    sequence_kl = torch.where(mask, kl, 0.0).sum(-1).mean()
    return {"score": float(episodes.scores.mean()), "kl": float(sequence_kl), "value_loss": float(value_loss)}


@torch.no_grad()
def sample(
    policy: Any, reward_model: Any, tokenizer: Any, prompts: list[list[int]], temperature: float, length: int
) -> Episodes:
    """Sample one completion per prompt and score it with the reward model."""
    end, rows = tokenizer.eos_token_id, []
    for prompt in prompts:
        answer = policy.generate(
            torch.tensor([prompt]), do_sample=True, temperature=temperature, top_k=0, max_new_tokens=length,
            eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        rows.append((len(prompt), answer[0]))
    ids = torch.nn.utils.rnn.pad_sequence([row for _, row in rows], True, tokenizer.pad_token_id)
    place = torch.arange(ids.shape[1])
    lengths = torch.tensor([len(row) for _, row in rows]).unsqueeze(1)
    starts = torch.tensor([start for start, _ in rows]).unsqueeze(1)
    real = place < lengths
    scores = reward_model(input_ids=ids, attention_mask=real.long()).logits.squeeze(-1)
    unfinished = torch.tensor([int(row[-1]) != end for _, row in rows])
    scores = torch.where(unfinished, -1.0, scores)  # the reward model was trained on finished completions only
    return Episodes(ids, real.long(), (real & (place >= starts))[:, 1:], scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("policy", "reward", "prompts"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    policy, reference = (AutoModelForCausalLM.from_pretrained(args.policy).eval() for _ in range(2))
    reward_model, critic = (AutoModelForSequenceClassification.from_pretrained(args.reward).eval() for _ in range(2))
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=args.learning_rate, weight_decay=0)
    with open(args.prompts) as file:
        texts = [json.loads(line)["prompt"] for line in file]
    prompts = [encoded(tokenizer, text) for text in texts]
    for rollout in range(args.rollouts):
        first = rollout * args.episodes % max(len(prompts) - args.episodes, 1)
        chosen = prompts[first : first + args.episodes]
        episodes = sample(policy, reward_model, tokenizer, chosen, 1.0, args.max_new_tokens)
        found = ppo_update(policy, critic, reference, optimizer, episodes, Settings())
        print(f"rollout {rollout}: " + "  ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)


def encoded(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Encode a prompt. Conversations go through the chat template; plain text is encoded unchanged."""
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


if __name__ == "__main__":
    main()
