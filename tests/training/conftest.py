from tiny_folders import one_thread, other_folder, policy_folder, reward_folder

__all__ = ["one_thread", "other_folder", "policy_folder", "reward_folder"]
