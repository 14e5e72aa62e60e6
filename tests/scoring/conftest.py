from tiny_folders import one_thread, policy_folder, reward_folder

__all__ = ["one_thread", "policy_folder", "reward_folder"]
