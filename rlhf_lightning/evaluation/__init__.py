"""What a trained policy is worth: samples on held-out prompts, intervals, the reward-KL frontier, reports."""
