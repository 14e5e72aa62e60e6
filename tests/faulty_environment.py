"""Environments for tests, importable in other processes without the training stack: working ones and failing ones."""

import os
import signal
import subprocess
import time
from typing import Any

from rlhf_lightning.types import Episode, Reply


class Talks:
    """Rewards each turn by its last token, and ends after a token divisible by 5."""

    def reset(self, row: Any) -> Any:
        return row["prompt"]

    def reply(self, episode: Episode) -> Reply:
        last = episode.ids[-1]
        return Reply(f"w{last} w7", reward=last / 10, done=last % 5 == 0)


class Faulty(Talks):
    """Fails in episodes with an odd number."""

    def __init__(self, how: str = "raises") -> None:
        self.how = how

    def reply(self, episode: Episode) -> Reply:
        if episode.number % 2:
            if self.how == "raises":
                raise OSError("the simulator is away")
            if self.how == "hangs":
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reply(episode)


class Hangs(Talks):
    """Writes the process ids of itself and of a child into a file, and hangs."""

    def __init__(self, file: str) -> None:
        self.file = file

    def reply(self, episode: Episode) -> Reply:
        child = subprocess.Popen(["sleep", "300"])
        with open(self.file, "a") as file:
            file.write(f"{os.getpid()} {child.pid}\n")
        time.sleep(300)
        return super().reply(episode)


class Deadly(Talks):
    """Kills the process after the number of replies in the file named by DEADLY_REPLIES, if the file exists."""

    def reply(self, episode: Episode) -> Reply:
        name = os.environ.get("DEADLY_REPLIES")
        if name and os.path.exists(name):
            with open(name) as file:
                left = int(file.read()) - 1
            with open(name, "w") as file:
                file.write(str(left))
            if left == 0:
                os.remove(name)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().reply(episode)


class Opens(Talks):
    """Puts a word before each prompt."""

    def reset(self, row: Any) -> Any:
        return f"w99 {row['prompt']}"


def words_of_prompts(prompts: Any, completions: Any, kind: Any, **columns: Any) -> list[float]:
    """Score by the number of words in the conversation, which grows after some turns."""
    return [float(len(prompt.split())) for prompt in prompts]
