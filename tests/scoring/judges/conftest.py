from commands.conftest import plain_folder, policy_folder, reward_folder

__all__ = ["plain_folder", "policy_folder", "reward_folder"]
