"""lm-eval and Inspect on `rlhf serve`: their figures equal our own on the same prompts.

Each tool runs in a separate environment: RLHF_LM_EVAL names the program lm_eval, RLHF_INSPECT the program inspect.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from rlhf_lightning import tokenization
from rlhf_lightning.commands.completion_api import make_app
from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.commands.serve import policy_api
from rlhf_lightning.commands.web_server import listen, served
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import sample

QUESTIONS = ["one", "two two", "a longer question than that", "?", "five", "six", "seven", "eight"]
CHOICES = ["yes", "no way", "x"]
TOKENS = 8


def program(variable):
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{variable} names no program: install the tool into an environment of its own and name it")
    return found


@pytest.fixture(scope="module")
def server(policy_folder):
    arguments = SamplingArguments(max_new_tokens=TOKENS, batch_size=4)
    with (
        policy_api(policy_folder, "tiny", arguments, 60.0) as api,
        served(make_app(api), listen("127.0.0.1", 0)) as port,
    ):
        yield f"http://localhost:{port}"


@pytest.fixture(scope="module")
def policy(policy_folder):
    return load_policy(policy_folder).eval(), tokenization.load_tokenizer(policy_folder)


def greedy(policy, prompt, stop=None):
    model, tokenizer = policy
    ids, ends = torch.tensor(tokenization.encode_prompt(tokenizer, prompt)), tokenization.end_token_ids(tokenizer)
    drawn = sample(model, [ids], torch.tensor([0]), SamplingSettings(TOKENS, temperature=0), 0, ends)
    text = tokenization.completion_text(tokenizer, drawn.ids[0].tolist())
    return text.partition(stop)[0] if stop else text


def chat(question):
    return [{"role": "user", "content": question}]


def run(command, folder, **environment):
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, "HF_HOME": str(folder / "hf"), "PYTHONPATH": "", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def write_task(folder, name, rows, **settings):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, "dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "metadata": {"version": 1}, **settings}  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def read_results(folder, task):
    (results,) = Path(folder).rglob("results_*.json")
    (samples,) = Path(folder).rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"][task], sorted(rows, key=lambda row: row["doc_id"])


def lm_eval(model, url, tasks, folder, out, *flags):
    given = {"base_url": url, "model": "tiny", "num_concurrent": 4}
    command = [program("RLHF_LM_EVAL"), "run", "--model", model, "--tasks", tasks, "--include_path", str(folder),
               "--output_path", str(folder / out), "--log_samples",
               "--model_args", ",".join(f"{name}={value}" for name, value in given.items())]  # fmt: skip
    run([*command, *flags, *(["--apply_chat_template"] if "chat" in model else [])], folder, OPENAI_API_KEY="none")


def test_lm_eval_gets_the_policys_logprobs(server, policy, tmp_path):
    program("RLHF_LM_EVAL")
    rows = [{"question": one, "choices": CHOICES, "label": number % 3} for number, one in enumerate(QUESTIONS)]
    write_task(tmp_path, "tiny_choice", rows, output_type="multiple_choice", doc_to_choice="{{choices}}",
               doc_to_target="{{label}}", metric_list=[{"metric": "acc"}])  # fmt: skip
    lm_eval("local-completions", f"{server}/v1/completions", "tiny_choice", tmp_path, "choice", "--batch_size", "2")
    figures, samples = read_results(tmp_path / "choice", "tiny_choice")
    model, tokenizer = policy
    right = 0
    for row, said in zip(rows, samples, strict=True):
        own = []
        for choice in CHOICES:
            before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in
                             (row["question"], f" {choice}"))  # fmt: skip
            with torch.no_grad():
                logits = model.model(torch.tensor([before + after])).logits[0].log_softmax(-1)
            places = range(len(before) - 1, len(before) + len(after) - 1)
            own.append(sum(float(logits[place, index]) for place, index in zip(places, after, strict=True)))
        theirs = [float(one[0][0]) for one in said["resps"]]
        assert theirs == pytest.approx(own, abs=1e-3)
        right += max(range(3), key=own.__getitem__) == row["label"]
    assert figures["acc,none"] == pytest.approx(right / len(rows))


@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_lm_eval_gets_the_policys_greedy_texts(server, policy, tmp_path, kind):
    program("RLHF_LM_EVAL")
    asked = [chat(one) if "chat" in kind else one for one in QUESTIONS]
    own = [greedy(policy, prompt, "e") for prompt in asked]
    rows = [{"question": one, "target": text if number % 2 else "something else"}
            for number, (one, text) in enumerate(zip(QUESTIONS, own, strict=True))]  # fmt: skip
    write_task(
        tmp_path, "tiny_text", rows, output_type="generate_until", doc_to_target="{{target}}", target_delimiter="",
        generation_kwargs={"until": ["e"], "max_gen_toks": TOKENS, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    route = "/v1/chat/completions" if "chat" in kind else "/v1/completions"
    lm_eval(kind, f"{server}{route}", "tiny_text", tmp_path, "text")
    figures, samples = read_results(tmp_path / "text", "tiny_text")
    assert [said["resps"][0][0] for said in samples] == own
    expected = sum(row["target"] == text for row, text in zip(rows, own, strict=True)) / len(rows)
    assert figures["exact_match,none"] == pytest.approx(expected)


INSPECT_TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.scorer import includes
from inspect_ai.solver import generate


@task
def tiny():
    return Task(dataset=json_dataset("rows.jsonl"), solver=generate(), scorer=includes(ignore_case=False))
"""


def test_inspect_gets_the_policys_answers(server, policy, tmp_path):
    inspect = program("RLHF_INSPECT")
    own = [greedy(policy, chat(one)) for one in QUESTIONS]
    rows = [{"input": one, "target": text if number % 2 else "something else"}
            for number, (one, text) in enumerate(zip(QUESTIONS, own, strict=True))]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.py").write_text(INSPECT_TASK)
    command = [inspect, "eval", "tiny.py", "--model", "openai-api/local/tiny", "--temperature", "0", "--max-tokens",
               str(TOKENS), "--log-dir", "logs", "--log-format", "json", "--display", "none"]  # fmt: skip
    run(command, tmp_path, LOCAL_API_KEY="none", LOCAL_BASE_URL=f"{server}/v1")
    (log,) = (tmp_path / "logs").glob("*.json")
    found = json.loads(log.read_text())
    assert found["status"] == "success"
    said = {one["input"]: one["output"]["choices"][0]["message"]["content"] for one in found["samples"]}
    assert [said[one] for one in QUESTIONS] == own
    accuracy = found["results"]["scores"][0]["metrics"]["accuracy"]["value"]
    assert accuracy == pytest.approx(
        sum(row["target"] in text for row, text in zip(rows, own, strict=True)) / len(rows)
    )
