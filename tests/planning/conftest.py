from commands.conftest import own_folder, plain_folder, policy_folder, reward_folder  # noqa: F401  a folder of its own for each test
