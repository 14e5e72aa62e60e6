"""Sample completions of equal length with vLLM, and print a line of figures like `gpu_report.py --sample`.

    VLLM/bin/python experiments/benchmarks/vllm_rollouts.py --model FOLDER --batch 64 --length 256 --steps 6

vLLM pins other releases of torch, so it runs in an environment of its own, and this script imports nothing else. The
time to start is not counted.
"""

import argparse
import json
import random
import resource
import time


def main() -> None:
    """Sample ``--steps`` times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    for number in ("--batch", "--length", "--steps"):
        parser.add_argument(number, type=int, required=True)
    args = parser.parse_args()
    from vllm import LLM, SamplingParams

    longest = 16 + args.batch + args.length
    model = LLM(args.model, dtype=args.dtype, max_model_len=longest, max_num_seqs=args.batch, generation_config="vllm")
    settings = SamplingParams(max_tokens=args.length, temperature=1.0, logprobs=0)  # the sampled token's alone
    lot = random.Random(0)
    prompts = [{"prompt_token_ids": lot.choices(range(5, 500), k=16 + row)} for row in range(args.batch)]
    seconds, tokens = [], [0]
    for _ in range(args.steps):
        began = time.perf_counter()
        drawn = model.generate(prompts, settings, use_tqdm=False)
        seconds.append(round(time.perf_counter() - began, 3))
        tokens.append(tokens[-1] + sum(len(one.outputs[0].token_ids) for one in drawn))
    memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3)
    line = {"seconds": seconds, "tokens": tokens[1:], "loss": [], "batch": args.batch, "peak_rss_gb": memory}
    print("OURS " + json.dumps(line))


if __name__ == "__main__":
    main()
