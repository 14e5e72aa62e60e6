from commands.conftest import own_folder, plain_folder, policy_folder, reward_folder  # noqa: F401
from people.conftest import make_store  # noqa: F401
